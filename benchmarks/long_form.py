"""Long recordings: our sequential and batched modes against stock Transformers' long form.

    python benchmarks/long_form.py --model package:tiny.en --audio recordings \\
        --output benchmarks/results/long-form.json

Every system transcribes each recording from samples in memory to text, features included, by turns.
All decode greedily, once, without thresholds, and are told the language, so that they do the same;
`sequential` should then say what stock says, and whether it does is told. A transcript beside a
recording (talk.txt beside talk.flac) adds word error rates: for `batched` they say what it costs.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.parity.report import WordErrors
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.inputs import find_inputs

Samples = npt.NDArray[np.float32]
System = Callable[[Samples], str]
PLAIN: dict[str, Any] = {
    "temperature": 0.0,
    "compression_ratio_threshold": None,
    "logprob_threshold": None,
    "no_speech_threshold": None,
    "condition_on_previous_text": False,
}


def stock(transcriber: Transcriber, attention: str, language: str) -> System:
    """Stock Whisper with the same weights, through its own long form."""
    segments = stock_segments(transcriber, attention, language)
    return lambda samples: "".join(text for _, _, text in segments(samples)).strip()


def stock_segments(
    transcriber: Transcriber, attention: str, language: str, **options: Any
) -> Callable[[Samples], list[tuple[float, float, str]]]:
    """Starts and ends in seconds, and texts, by stock Whisper with the same weights.

    Args:
        transcriber: whose weights are copied.
        attention: eager or sdpa.
        language: code of the language spoken.
        options: of stock's `generate`.
    """
    config = copy.deepcopy(transcriber.model.config)
    config._attn_implementation = attention
    model: Any = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(transcriber.model.state_dict())
    model.generation_config = copy.deepcopy(transcriber.model.generation_config)
    model.to(transcriber.model.device, transcriber.model.dtype)
    multilingual = transcriber.languages != ("en",)
    asked = {"language": language, "task": "transcribe"} if multilingual else {}
    processor: Any = transcriber.processor

    def transcribe(samples: Samples) -> list[tuple[float, float, str]]:
        is_long = samples.size > 30 * SAMPLING_RATE
        whole = {"truncation": False, "padding": "longest"} if is_long else {}
        inputs = processor(
            samples,
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            **whole,
        ).to(model.device, model.dtype)
        found = model.generate(
            **inputs, return_timestamps=True, return_segments=True, **asked, **options
        )
        return [
            (
                float(row["start"]),
                float(row["end"]),
                processor.tokenizer.decode(row["tokens"], skip_special_tokens=True),
            )
            for row in found["segments"][0]
        ]

    return transcribe


def ours(transcriber: Transcriber, mode: str, language: str, batch_size: int) -> System:
    """This package's transcriber in one of its modes."""
    options = DecodeOptions(mode=mode, **PLAIN)

    def transcribe(samples: Samples) -> str:
        return transcriber.transcribe(
            samples, language=language, options=options, batch_size=batch_size
        ).text

    return transcribe


def normalised(text: str) -> str:
    """Lower case, without punctuation."""
    kept = (letter if letter.isalnum() or letter in " '" else " " for letter in text.lower())
    return "".join(kept)


def measure(systems: dict[str, System], samples: Samples, rounds: int) -> dict[str, Any]:
    """Texts, and the median seconds of every system; they take turns after one call each."""
    texts = {name: system(samples) for name, system in systems.items()}
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            start = time.perf_counter()
            system(samples)
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": times[name],
            "seconds_median": median(times[name]),
            "text": texts[name],
            "same_as_stock": texts[name].split() == texts["stock"].split(),
        }
        for name in systems
    }


def main(
    audio: Annotated[list[str], typer.Option(help="Recordings or folders; repeatable.")],
    model: Annotated[str, typer.Option(help="As `whisper-flash transcribe --model`.")],
    language: Annotated[str, typer.Option(help="Code of the language spoken.")] = "en",
    attention: Annotated[str, typer.Option(help="Of stock: eager or sdpa.")] = "sdpa",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks at a time.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
) -> None:
    """Compare transcriptions of long recordings, and their times."""
    console = Console()
    transcriber = Transcriber.from_pretrained(model, device=device)
    systems = {"stock": stock(transcriber, attention, language)}
    systems |= {
        mode: ours(transcriber, mode, language, batch_size) for mode in ("sequential", "batched")
    }
    table = Table("recording", "s", "system", "s taken", "x stock", "as stock", "WER")
    rows = []
    for entry in find_inputs(audio):
        samples = load_audio(entry.name)
        transcript = Path(entry.name).with_suffix(".txt")
        found = measure(systems, samples, rounds)
        for name, row in found.items():
            errors = WordErrors()
            if transcript.is_file():
                errors.add(normalised(transcript.read_text("utf-8")), normalised(row["text"]))
            row |= {"system": name, "recording": Path(entry.name).name, "wer": errors.rate}
            row["audio_seconds"] = samples.size / SAMPLING_RATE
            rows.append(row)
            ratio = found["stock"]["seconds_median"] / row["seconds_median"]
            table.add_row(
                row["recording"],
                f"{row['audio_seconds']:.0f}",
                name,
                f"{row['seconds_median']:.2f}",
                f"{ratio:.2f}",
                "yes" if row["same_as_stock"] else "no",
                "" if errors.rate is None else f"{errors.rate:.2%}",
            )
    console.print(table)
    if output is not None:
        environment = describe_environment(str(transcriber.model.device), commit).as_json()
        document = {"model": model, "attention": attention, "batch_size": batch_size}
        document |= {"threads": torch.get_num_threads(), "environment": environment, "rows": rows}
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
