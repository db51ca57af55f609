"""What is understood of recordings: stock Transformers, and our sequential and batched modes.

    python benchmarks/texts.py --model package:tiny.en --audio recordings \\
        --output benchmarks/results/texts-tiny.en-cpu.json
    pip install openai-whisper
    python benchmarks/texts.py --model package:tiny.en --audio recordings --openai

All decode greedily, once, without thresholds, and are told the language, so that they do the same.
`sequential` should say what stock says. Recordings of more than 30 s are also read with every
window told what was said before it. Where texts differ, it is told whether that is in digital
silence alone, which we do not decode. openai-whisper, which reads the same windows, should say what
`sequential` says; but it lets zeros follow the features of a short recording, too, where stock lets
silence follow the sound, so it is also given short ones with that silence. Word error rates are
over recordings with transcripts (`spoken.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from long_form import PLAIN, Samples, stock_segments
from rich.console import Console
from rich.table import Table
from spoken import Spoken, find_spoken, normalised
from word_times import openai_model

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.parity.report import WordErrors
from whisper_flash_attention.transcribe import Transcriber

Segments = list[tuple[float, float, str]]
System = Callable[[Samples], Segments]
LONG_SECONDS = 30
PARTS = ("all", "long", "short")
# Systems, and those that should say the same.
PAIRS = {
    "sequential": "stock",
    "sequential, told": "stock, told",
    "openai-whisper": "sequential",
    "openai-whisper, told": "sequential, told",
    "openai-whisper, padded": "sequential",
}


@dataclass(frozen=True)
class Row:
    """One recording, transcribed by one system.

    Args:
        same: whether the text is that of the system in `PAIRS`; None where there is none.
        same_where_sound_is: the same, without what either hears in digital silence.
    """

    recording: str
    language: str
    audio_seconds: float
    system: str
    seconds: float
    text: str
    errors: int | None
    words: int | None
    same: bool | None = None
    same_where_sound_is: bool | None = None


def openai_segments(model: Any, language: str, *, told: bool) -> System:
    """openai-whisper, decoding as the others do."""

    def transcribe(samples: Samples) -> Segments:
        found = model.transcribe(
            samples,
            language=language,
            fp16=False,
            **PLAIN | {"condition_on_previous_text": told},
        )
        return [(each["start"], each["end"], each["text"]) for each in found["segments"]]

    return transcribe


def systems_for(
    transcriber: Transcriber,
    attention: str,
    language: str,
    batch_size: int,
    openai: Any,
    *,
    is_long: bool,
) -> dict[str, System]:
    """Systems by name; those that are told what was said before only for long recordings.

    Args:
        openai: openai-whisper's model, if it is to be compared.
    """

    def ours(**options: Any) -> System:
        decode = DecodeOptions(**{**PLAIN, **options})

        def transcribe(samples: Samples) -> Segments:
            found = transcriber.transcribe(
                samples, language=language, options=decode, batch_size=batch_size
            )
            # The text has the blanks between segments, where the language has any.
            return [(0.0, found.seconds, found.text)]

        return transcribe

    systems = {
        "stock": stock_segments(transcriber, attention, language),
        "sequential": ours(),
        "batched": ours(mode="batched"),
    }
    if is_long:
        told = {"condition_on_prev_tokens": True}
        systems["stock, told"] = stock_segments(transcriber, attention, language, **told)
        systems["sequential, told"] = ours(condition_on_previous_text=True)
    if openai is not None:
        untold = openai_segments(openai, language, told=False)
        systems["openai-whisper"] = untold
        if is_long:
            systems["openai-whisper, told"] = openai_segments(openai, language, told=True)
        else:
            window = LONG_SECONDS * SAMPLING_RATE
            systems["openai-whisper, padded"] = lambda samples: untold(
                np.pad(samples, (0, window - samples.size))
            )
    return systems


def compare(spoken: Spoken, samples: Samples, systems: dict[str, System]) -> list[Row]:
    """What all systems say of one recording."""
    rows: list[Row] = []
    heard: dict[str, Segments] = {}
    for name, system in systems.items():
        start = time.perf_counter()
        heard[name] = system(samples)
        seconds = time.perf_counter() - start
        text = _text(heard[name])
        errors = WordErrors()
        if spoken.transcript is not None:
            errors.add(*(normalised(each, spoken.language) for each in (spoken.transcript, text)))
        expected = heard.get(PAIRS.get(name, ""))
        rows.append(
            Row(
                recording=spoken.path.name,
                language=spoken.language,
                audio_seconds=samples.size / SAMPLING_RATE,
                system=name,
                seconds=seconds,
                text=text,
                errors=errors.errors if errors.words else None,
                words=errors.words or None,
                same=None if expected is None else text == _text(expected),
                same_where_sound_is=None
                if expected is None
                else _text(_sounding(heard[name], samples)) == _text(_sounding(expected, samples)),
            )
        )
    return rows


def _text(segments: Segments) -> str:
    return "".join(text for _, _, text in segments).strip()


def _sounding(segments: Segments, samples: Samples) -> Segments:
    return [each for each in segments if has_sound(samples, *each[:2])]


def has_sound(samples: Samples, start: float, end: float) -> bool:
    """Whether anything but one constant number is between two times (seconds)."""
    part = samples[round(start * SAMPLING_RATE) : round(end * SAMPLING_RATE)]
    return part.size > 0 and bool(np.ptp(part) > 0)


def rates(rows: list[Row]) -> dict[str, dict[str, float | int | None]]:
    """Word error rates of every system: of all recordings, of long and of short ones."""
    found: dict[str, dict[str, float | int | None]] = {}
    for name in dict.fromkeys(row.system for row in rows):
        mine = [row for row in rows if row.system == name and row.errors is not None]
        parts = {
            "all": mine,
            "long": [row for row in mine if row.audio_seconds > LONG_SECONDS],
            "short": [row for row in mine if row.audio_seconds <= LONG_SECONDS],
        }
        found[name] = {"recordings": len(mine)}
        for part, chosen in parts.items():
            errors = WordErrors(
                sum(row.errors or 0 for row in chosen), sum(row.words or 0 for row in chosen)
            )
            found[name][part] = errors.rate
    return found


def differing(rows: list[Row]) -> dict[str, str]:
    """Recordings in which a system should say what another says, and does not, and why."""
    padded = {row.recording for row in rows if row.system.endswith(", padded") and row.same}

    def why(row: Row) -> str:
        if row.same_where_sound_is:
            return "in digital silence alone"
        if row.system == "openai-whisper" and row.recording in padded:
            return "not when padded with silence"
        return "unexplained"

    return {f"{row.recording}, {row.system}": why(row) for row in rows if row.same is False}


def show(console: Console, rows: list[Row]) -> None:
    table = Table("system", "recordings", "WER", "over 30 s", "up to 30 s", "as it should")
    for name, found in rates(rows).items():
        compared = [row.same for row in rows if row.system == name and row.same is not None]
        percent = (f"{found[part]:.2%}" if found[part] is not None else "" for part in PARTS)
        same = f"{sum(compared)} of {len(compared)}" if compared else ""
        table.add_row(name, str(found["recordings"]), *percent, same)
    console.print(table)
    for place, why in differing(rows).items():
        console.print(f"{place}: {why}")


def main(
    audio: Annotated[list[str], typer.Option(help="Recordings or folders; repeatable.")],
    model: Annotated[str, typer.Option(help="As `whisper-flash transcribe --model`.")],
    language: Annotated[str, typer.Option(help="Code, where no index.json tells.")] = "en",
    attention: Annotated[str, typer.Option(help="Of stock: eager or sdpa.")] = "sdpa",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks at a time.")] = 8,
    openai: Annotated[bool, typer.Option(help="Compare openai-whisper, too.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
) -> None:
    """Compare texts, and their word error rates."""
    console = Console()
    transcriber = Transcriber.from_pretrained(model, device=device)
    other = openai_model(transcriber) if openai else None
    rows: list[Row] = []
    for spoken in find_spoken(audio, language):
        # Of noise nobody's language is known.
        code = "en" if spoken.language == "none" else spoken.language
        if code not in transcriber.languages:
            continue
        samples = load_audio(spoken.path)
        is_long = samples.size > LONG_SECONDS * SAMPLING_RATE
        systems = systems_for(transcriber, attention, code, batch_size, other, is_long=is_long)
        rows += compare(spoken, samples, systems)
        console.print(f"{spoken.path.name}: done")
    show(console, rows)
    if output is not None:
        environment = describe_environment(str(transcriber.model.device), commit).as_json()
        document = {"model": model, "attention": attention, "batch_size": batch_size}
        document |= {"threads": torch.get_num_threads(), "environment": environment}
        document |= {"word_error_rates": rates(rows), "differing": differing(rows)}
        document |= {"rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
