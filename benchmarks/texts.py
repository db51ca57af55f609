"""What is understood of recordings: stock Transformers, and our sequential and batched modes.

    python benchmarks/texts.py --model package:tiny.en --audio recordings \\
        --output benchmarks/results/texts-tiny.en-cpu.json
    pip install openai-whisper
    python benchmarks/texts.py --model package:tiny.en --audio recordings --openai

    python benchmarks/texts.py --model package:tiny.en --audio recordings --system sequential \\
        --system batched --system "batched, no detector" --joined --noises

All decode greedily, once, without thresholds, and are told the language, so that they do the same.
`sequential` should say what stock says. Recordings of more than 30 s are also read with every
window told what was said before it. Where texts differ, it is told whether that is in digital
silence alone, which we do not decode. openai-whisper, which reads the same windows, should say what
`sequential` says; but it lets zeros follow the features of a short recording, too, where stock lets
silence follow the sound, so it is also given short ones with that silence. Word error rates are
over recordings with transcripts (`spoken.py`).

Batched mode, with the detector and without, must not lose words that sequential mode hears: rows
have their deletions and insertions against the transcript and against `sequential`. `--joined` adds
recordings of one language joined to more than 3 minutes, and `--noises` sounds in which nobody
speaks: nothing may be heard in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jiwer
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
from whisper_flash_attention.parity.words import WordErrors
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
        deletions, insertions: against the transcript, and against what sequential mode hears.
        found_words: in the text.
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
    deletions: int | None = None
    insertions: int | None = None
    found_words: int = 0
    deletions_of_sequential: int | None = None
    insertions_to_sequential: int | None = None


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
        "stock": lambda samples: stock_segments(transcriber, attention, language)(samples),
        "sequential": ours(),
        "batched": ours(mode="batched"),
        "batched, no detector": ours(mode="batched", vad_filter=False),
        "batched, no detector, words": ours(mode="batched", vad_filter=False, word_timestamps=True),
        "batched, no detector, no timestamps": ours(
            mode="batched", vad_filter=False, without_timestamps=True
        ),
    }
    if is_long:
        told = {"condition_on_prev_tokens": True}
        systems["stock, told"] = lambda samples: stock_segments(
            transcriber, attention, language, **told
        )(samples)
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
        lost, added = changes(spoken.transcript, text, spoken.language)
        sequential = _text(heard["sequential"]) if "sequential" in heard else None
        lost_of, added_to = changes(sequential, text, spoken.language)
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
                deletions=lost,
                insertions=added,
                found_words=len(normalised(text, spoken.language).split()),
                deletions_of_sequential=lost_of,
                insertions_to_sequential=added_to,
            )
        )
    return rows


def changes(reference: str | None, text: str, language: str) -> tuple[int | None, int | None]:
    """Deletions and insertions from one text to another; None without any words to compare."""
    wanted = normalised(reference or "", language)
    if not wanted.split():
        return None, None
    found = jiwer.process_words(wanted, normalised(text, language))
    return found.deletions, found.insertions


def lost_words(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Sums of words and their changes of every system, and what it hears where nobody speaks."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row.system for row in rows):
        mine = [row for row in rows if row.system == name]
        known = [row for row in mine if row.words]
        joined = [row for row in mine if row.recording.startswith("joined")]
        found[name] = {
            "words": sum(row.words or 0 for row in known),
            "deletions": sum(row.deletions or 0 for row in known),
            "insertions": sum(row.insertions or 0 for row in known),
            "found_words_joined": sum(row.found_words for row in joined),
            "deletions_of_sequential_joined": sum(
                row.deletions_of_sequential or 0 for row in joined
            ),
            "insertions_to_sequential_joined": sum(
                row.insertions_to_sequential or 0 for row in joined
            ),
            "found_words_where_nobody_speaks": sum(
                row.found_words for row in mine if row.language == "none"
            ),
        }
    return found


def joined_recordings(
    spoken: list[tuple[Spoken, Samples]], seconds: float = 180
) -> list[tuple[Spoken, Samples]]:
    """Recordings of one language, one after the other, in parts of more than so many seconds."""
    found = []
    for language in dict.fromkeys(each.language for each, _ in spoken):
        waiting: list[tuple[Spoken, Samples]] = []
        for each, samples in spoken:
            if each.language != language or not each.transcript:
                continue
            waiting.append((each, samples))
            if sum(part.size for _, part in waiting) > seconds * SAMPLING_RATE:
                number = 1 + sum(one.language == language for one, _ in found)
                text = " ".join(one.transcript or "" for one, _ in waiting)
                whole = Spoken(Path(f"joined {language} {number}"), language, text)
                found.append((whole, np.concatenate([part for _, part in waiting])))
                waiting = []
    return found


def noises(seconds: float = 35) -> dict[str, Samples]:
    """Sounds in which nobody speaks: noise of three colours and two levels, hum, tones, clicks."""
    rng = np.random.default_rng(0)
    size = round(seconds * SAMPLING_RATE)
    times = np.arange(size) / SAMPLING_RATE
    spectrum = np.fft.rfft(rng.standard_normal(size))
    rates = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLING_RATE), 20)
    found: dict[str, Samples] = {}
    for name, power in (("white", 0.0), ("pink", 0.5), ("brown", 1.0)):
        wave = np.fft.irfft(spectrum / rates**power, size)
        wave /= np.abs(wave).max()
        for level in (0.5, 0.05, 0.002):
            found[f"{name} noise, {level}"] = level * wave
        swelling = (np.sin(2 * np.pi * times / 7) > 0.3) * 0.3 + 0.003
        found[f"{name} noise, on and off"] = swelling * wave
    found["hum of 50 Hz"] = 0.2 * np.sin(2 * np.pi * 50 * times)
    found["tone of 1 kHz"] = 0.2 * np.sin(2 * np.pi * 1000 * times)
    clicks = np.zeros(size)
    clicks[:: SAMPLING_RATE // 2] = 0.8
    found["clicks"] = clicks
    roots = 220 * 2 ** (np.array([0, 5, 7, 3])[(times % 4).astype(int)] / 12)
    phase = 2 * np.pi * np.cumsum(roots) / SAMPLING_RATE
    chord = sum(np.sin(phase * ratio) for ratio in (1, 1.26, 1.5))
    found["chords"] = 0.15 * chord * np.exp(-3 * (times % 1))
    return {name: wave.astype(np.float32) for name, wave in found.items()}


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
    table = Table("system", "words", "deletions", "insertions", "joined: words", "-", "+", "noise")
    for name, sums in lost_words(rows).items():
        table.add_row(name, *(str(each) for each in sums.values()))
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
    system: Annotated[
        list[str] | None, typer.Option(help="Only these systems; repeatable.")
    ] = None,
    joined: Annotated[bool, typer.Option(help="Join recordings, too.")] = False,
    noise: Annotated[bool, typer.Option("--noises", help="Add generated noise.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
) -> None:
    """Compare texts, and their word error rates."""
    console = Console()
    transcriber = Transcriber.from_pretrained(model, device=device)
    other = openai_model(transcriber) if openai else None
    rows: list[Row] = []
    recordings = [(each, load_audio(each.path)) for each in find_spoken(audio, language)]
    if joined:
        recordings += joined_recordings(recordings)
    if noise:
        recordings += [(Spoken(Path(name), "none", None), wave) for name, wave in noises().items()]
    for spoken, samples in recordings:
        # Of noise nobody's language is known.
        code = "en" if spoken.language == "none" else spoken.language
        if code not in transcriber.languages:
            continue
        is_long = samples.size > LONG_SECONDS * SAMPLING_RATE
        systems = systems_for(transcriber, attention, code, batch_size, other, is_long=is_long)
        if system:
            systems = {name: systems[name] for name in system if name in systems}
        rows += compare(spoken, samples, systems)
        console.print(f"{spoken.path.name}: done")
    show(console, rows)
    if output is not None:
        environment = describe_environment(str(transcriber.model.device), commit).as_json()
        document = {"model": model, "attention": attention, "batch_size": batch_size}
        document |= {"threads": torch.get_num_threads(), "environment": environment}
        document |= {"word_error_rates": rates(rows), "differing": differing(rows)}
        document |= {"lost_words": lost_words(rows)}
        document |= {"rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
