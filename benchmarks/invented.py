"""Count the words that each system writes where nobody speaks.

    pip install faster-whisper openai-whisper pywhispercpp
    python benchmarks/invented.py --model package:tiny.en --model package:base \\
        --output benchmarks/results/invented-cpu.json
    python benchmarks/invented.py --model package:base --system ours-batched \\
        --output benchmarks/results/invented-cpu.json

The sounds are those of `_sounds.py`: silence, noise, hum, tones, typing, music and breath. Every
system has the same weights in float32 and its own defaults, which its row names: a user who changes
nothing gets this. Nobody names a language. Texts are compared after Whisper's normaliser, which
removes punctuation and descriptions of sounds in brackets; in scripts without blanks a character is
a word. Where a system samples, its seed is fixed.

The output file is written after each sound, and what it has already is not measured again: a run
that was interrupted continues.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _harness import Commit, Output, Threads, app_of, console, one_of, print_rows
from _sounds import Samples, make_sounds
from transformers import WhisperForConditionalGeneration, pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.benchmark.environment import describe_environment, package_version
from whisper_flash_attention.benchmark.peer_checkpoints import openai_model, write_checkpoint
from whisper_flash_attention.benchmark.peer_systems import CTRANSLATE2, GGML
from whisper_flash_attention.transcribe import Transcriber

# The text of samples at 16 kHz.
Transcribe = Callable[[Samples], str]

# Scripts without blanks: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = "฀-໿က-႟ក-៿぀-ヿ㐀-鿿"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_normalise = BasicTextNormalizer()


def count_words(text: str) -> int:
    """Words of a text, without descriptions of sounds in brackets."""
    return len(WORD.findall(_normalise(text)))


def load_ours(model: str, **options: Any) -> Transcribe:
    """This package's transcriber."""
    transcriber = Transcriber.from_pretrained(model, device="cpu")
    return lambda samples: transcriber.transcribe(samples, **options).text


def load_stock(model: str, **options: Any) -> Transcribe:
    """Transformers' pipeline with stock Whisper."""
    ours = Transcriber.from_pretrained(model, device="cpu")
    stock: Any = WhisperForConditionalGeneration(copy.deepcopy(ours.model.config)).eval()
    stock.load_state_dict(ours.model.state_dict())
    stock.generation_config = copy.deepcopy(ours.model.generation_config)
    processor: Any = ours.processor
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    recognise = pipeline("automatic-speech-recognition", model=stock, **parts)
    return lambda samples: recognise(samples.copy(), **options)["text"]


def load_openai_whisper(model: str, **options: Any) -> Transcribe:
    """openai-whisper's `transcribe`."""
    loaded = openai_model(Transcriber.from_pretrained(model, device="cpu").model)
    return lambda samples: loaded.transcribe(samples, **options)["text"]


def load_faster_whisper(model: str, *, batched: bool, **options: Any) -> Transcribe:
    """faster-whisper's model, or its pipeline for batches."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    with tempfile.TemporaryDirectory() as folder:
        files = write_checkpoint(model, [CTRANSLATE2], Path(folder)).files
        loaded = WhisperModel(files[CTRANSLATE2], device="cpu", compute_type="float32")
    runner: Any = BatchedInferencePipeline(loaded) if batched else loaded
    return lambda samples: "".join(each.text for each in runner.transcribe(samples, **options)[0])


def load_whisper_cpp(model: str, **options: Any) -> Transcribe:
    """whisper.cpp, as pywhispercpp carries it; weights in float16."""
    from pywhispercpp.model import Model

    with tempfile.TemporaryDirectory() as folder:
        written = write_checkpoint(model, [GGML], Path(folder))
        loaded = Model(written.files[GGML], redirect_whispercpp_logs_to=None, print_progress=False)
    language = "auto" if written.is_multilingual else "en"
    return lambda samples: " ".join(
        each.text for each in loaded.transcribe(samples, language=language, **options)
    )


# Name -> distribution, loader, and what is not a default: a pipeline has to be given one or the
# other for more than 30 s, and openai-whisper warns about float16 on a CPU.
SYSTEMS: dict[str, tuple[str, Callable[..., Transcribe], dict[str, Any]]] = {
    "ours-sequential": ("whisper-flash-attention", load_ours, {}),
    "ours-batched": ("whisper-flash-attention", load_ours, {"mode": "batched"}),
    "stock-chunked": ("transformers", load_stock, {"chunk_length_s": 30}),
    "stock-long-form": ("transformers", load_stock, {"return_timestamps": True}),
    "openai-whisper": ("openai-whisper", load_openai_whisper, {"fp16": False}),
    "faster-whisper-sequential": ("faster-whisper", load_faster_whisper, {"batched": False}),
    "faster-whisper-batched": ("faster-whisper", load_faster_whisper, {"batched": True}),
    "whisper.cpp": ("pywhispercpp", load_whisper_cpp, {}),
}


def new_row(system: str, model: str, commit: str | None) -> dict[str, Any]:
    """A row without sounds."""
    distribution, _, options = SYSTEMS[system]
    return {
        "setting": "invented",
        "system": system,
        "version": package_version(distribution),
        "checkpoint": model,
        "device": "cpu",
        "dtype": "float32",
        "settings": options,
        "environment": describe_environment("cpu", commit).as_json(),
        "clips": [],
    }


def measure(row: dict[str, Any], sounds: dict[str, Samples], keep: Callable[[], None]) -> None:
    """Transcribe the sounds that a row lacks; `keep` is called after each."""
    clips: list[dict[str, Any]] = row["clips"]
    missing = sounds.keys() - {clip["sound"] for clip in clips}
    if not missing:
        return
    _, load, options = SYSTEMS[row["system"]]
    transcribe = load(row["checkpoint"], **options)
    for name, samples in sounds.items():
        if name not in missing:
            continue
        torch.manual_seed(0)
        text = transcribe(samples).strip()
        clip = {"sound": name, "seconds": samples.size / SAMPLING_RATE}
        clips.append(clip | {"words": count_words(text), "text": text})
        row["invented_words"] = sum(clip["words"] for clip in clips)
        row["sounds_with_words"] = sum(clip["words"] > 0 for clip in clips)
        row["sounds"] = len(clips)
        keep()


def main(
    model: Annotated[list[str] | None, typer.Option(help="package:NAME; repeatable.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    threads: Threads = 1,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Count the words that each system writes where nobody speaks."""
    names = system or list(SYSTEMS)
    one_of("system", names, SYSTEMS)
    torch.set_num_threads(threads)
    sounds = make_sounds()
    rows = json.loads(output.read_text("utf-8"))["rows"] if output and output.exists() else []
    found = {(row["checkpoint"], row["system"]): row for row in rows}

    def keep() -> None:
        if output is not None:
            text = json.dumps({"rows": list(found.values())}, indent=1, ensure_ascii=False)
            output.write_text(text + "\n", encoding="utf-8")

    for checkpoint in model or ("package:tiny.en",):
        for name in names:
            if package_version(SYSTEMS[name][0]) is None:
                console.print(f"{name}: not installed: pip install {SYSTEMS[name][0]}")
                continue
            row = found.setdefault((checkpoint, name), new_row(name, checkpoint, commit))
            measure(row, sounds, keep)
    columns: dict[str, Any] = {
        "checkpoint": "{checkpoint}",
        "system": "{system}",
        "version": "{version}",
        "words": "{invented_words}",
        "sounds with words": "{sounds_with_words} of {sounds}",
    }
    print_rows("words where nobody speaks", found.values(), columns)


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
