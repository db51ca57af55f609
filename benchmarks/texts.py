"""Compare the texts of recordings, and the times of words, with those of other systems.

    python benchmarks/texts.py compare --model package:tiny.en --audio recordings \\
        --output benchmarks/results/texts-tiny.en-cpu.json
    python benchmarks/texts.py compare --model package:tiny.en --audio recordings \\
        --system sequential --system batched --system "batched, no detector" --joined --noises
    python benchmarks/texts.py long-form --model package:tiny.en --audio recordings \\
        --output benchmarks/results/long-form-tiny.en-cpu.json
    pip install openai-whisper
    python benchmarks/texts.py compare --model package:tiny.en --audio recordings --openai
    python benchmarks/texts.py words --model package:tiny.en --audio recordings \\
        --output benchmarks/results/word-times-tiny.en-cpu.json

`compare` and `long-form` decode greedily, once, without thresholds, in a given language, so that
all systems do the same; `sequential` should then give stock's text. In `compare`, recordings of
more than 30 s are also decoded with the text of the previous window as context. Where texts differ,
the reason may be digital silence, which we do not decode. openai-whisper, which decodes the same
windows, should give the text of `sequential`; but it pads the features of a short recording with
zeros, where stock pads the samples with silence, so short ones are also padded with silence for it.
Word error rates are over recordings with transcripts. Batched mode, with the detector and without,
must not lose words of sequential mode: rows have deletions and insertions against the transcript
and against `sequential`. `--joined` adds recordings of one language joined to more than 3 minutes,
`--noises` sounds without speech, for which the text should be empty.

`long-form` times every system, in turns, from samples in memory to text, features included. `words`
compares words and their times with openai-whisper's at temperature 0 with the same weights, each
system with its own windows; times are compared for words that both have.

A folder's `index.json`, if it has one, is a list of objects with `file`, `language` and
`transcript`; elsewhere a transcript is in a `.txt` file beside the recording.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import jiwer
import numpy as np
import numpy.typing as npt
import torch
import typer
from _harness import Commit, Output, app_of, console, print_rows, time_in_turns, write_json
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.benchmark.peer_checkpoints import openai_model
from whisper_flash_attention.benchmark.spoken import (
    Spoken,
    find_spoken,
    normalised,
    with_transcript,
    word_errors,
)
from whisper_flash_attention.benchmark.word_alignment import TimedWord
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.parity.report import WordErrors
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.inputs import find_inputs

Samples = npt.NDArray[np.float32]
Segments = list[tuple[float, float, str]]
System = Callable[[Samples], Segments]

PLAIN: dict[str, Any] = {
    "temperature": 0.0,
    "compression_ratio_threshold": None,
    "logprob_threshold": None,
    "no_speech_threshold": None,
    "condition_on_previous_text": False,
}
LONG_SECONDS = 30
# Systems, and those that should give the same text. In names, which committed results have, "told"
# is with the text of the previous window as context.
PAIRS = {
    "sequential": "stock",
    "sequential, told": "stock, told",
    "openai-whisper": "sequential",
    "openai-whisper, told": "sequential, told",
    "openai-whisper, padded": "sequential",
}
TOLERANCE = 0.1  # seconds between the times of a word

Audio = Annotated[list[str], typer.Option(help="Recordings or folders; repeatable.")]
Model = Annotated[str, typer.Option(help="As `whisper-flash transcribe --model`.")]
Language = Annotated[str, typer.Option(help="Code, for recordings without one in an index.json.")]
Attention = Annotated[str, typer.Option(help="Of stock: eager or sdpa.")]
Device = Annotated[str, typer.Option(help="cpu, cuda ...")]
ComputeType = Annotated[str, typer.Option(help="float32, int8 ...; auto as transcribe.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Chunks at a time.")]


# --- recordings and systems ----------------------------------------------------------------------


def stock_segments(
    transcriber: Transcriber, attention: str, language: str, **options: Any
) -> System:
    """Stock Whisper's own long form with a copy of the transcriber's weights.

    `options` are those of stock's `generate`.
    """
    config = copy.deepcopy(transcriber.model.config)
    config._attn_implementation = attention
    model: Any = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(transcriber.model.state_dict())
    model.generation_config = copy.deepcopy(transcriber.model.generation_config)
    model.to(transcriber.model.device, transcriber.model.dtype)
    if transcriber.languages != ("en",):
        options |= {"language": language, "task": "transcribe"}
    processor: Any = transcriber.processor

    def transcribe(samples: Samples) -> Segments:
        is_long = samples.size > LONG_SECONDS * SAMPLING_RATE
        whole: dict[str, Any] = {"truncation": False, "padding": "longest"} if is_long else {}
        whole |= {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
        inputs = processor(samples, return_attention_mask=True, **whole)
        inputs = inputs.to(model.device, model.dtype)
        found = model.generate(**inputs, return_timestamps=True, return_segments=True, **options)
        rows = found["segments"][0]
        texts = processor.batch_decode([row["tokens"] for row in rows], skip_special_tokens=True)
        times = [(float(row["start"]), float(row["end"])) for row in rows]
        return [(*each, text) for each, text in zip(times, texts, strict=True)]

    return transcribe


def our_segments(
    transcriber: Transcriber, language: str, batch_size: int, **options: Any
) -> System:
    """This package's transcriber; one segment with the whole text, which has the blanks."""
    decode = DecodeOptions(**{**PLAIN, **options})

    def transcribe(samples: Samples) -> Segments:
        found = transcriber.transcribe(
            samples, language=language, options=decode, batch_size=batch_size
        )
        return [(0.0, found.seconds, found.text)]

    return transcribe


def openai_segments(model: Any, language: str, *, with_context: bool) -> System:
    """openai-whisper, decoding as the others do."""
    options = PLAIN | {"condition_on_previous_text": with_context}

    def transcribe(samples: Samples) -> Segments:
        found = model.transcribe(samples, language=language, fp16=False, **options)
        return [(each["start"], each["end"], each["text"]) for each in found["segments"]]

    return transcribe


def joined_recordings(
    spoken: list[tuple[Spoken, Samples]], seconds: float = 180
) -> list[tuple[Spoken, Samples]]:
    """Recordings of one language, one after the other, in parts of more than `seconds`."""
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


def generate_noises(seconds: float = 35) -> dict[str, Samples]:
    """Sounds without speech: noise of three colours and two levels, hum, tones, clicks."""
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


# --- texts ---------------------------------------------------------------------------------------


def systems_for(
    transcriber: Transcriber,
    reference: Transcriber,
    attention: str,
    language: str,
    batch_size: int,
    openai: Any,
    *,
    is_long: bool,
) -> dict[str, System]:
    """Systems by name; those with context only for long recordings.

    Args:
        reference: whose model stock has a copy of.
        openai: openai-whisper's model, or None to leave it out.
    """

    def ours(**options: Any) -> System:
        return our_segments(transcriber, language, batch_size, **options)

    def stock(**options: Any) -> System:
        # Weights are copied only for a system that is run.
        return lambda samples: stock_segments(reference, attention, language, **options)(samples)

    no_detector = {"mode": "batched", "vad_filter": False}
    systems = {
        "stock": stock(),
        "sequential": ours(),
        "batched": ours(mode="batched"),
        "batched, no detector": ours(**no_detector),
        "batched, no detector, words": ours(**no_detector, word_timestamps=True),
        "batched, no detector, no timestamps": ours(**no_detector, without_timestamps=True),
    }
    if is_long:
        systems["stock, told"] = stock(condition_on_prev_tokens=True)
        systems["sequential, told"] = ours(condition_on_previous_text=True)
    if openai is not None:
        plain = openai_segments(openai, language, with_context=False)
        systems["openai-whisper"] = plain
        if is_long:
            systems["openai-whisper, told"] = openai_segments(openai, language, with_context=True)
        else:
            window = LONG_SECONDS * SAMPLING_RATE
            systems["openai-whisper, padded"] = lambda samples: plain(
                np.pad(samples, (0, window - samples.size))
            )
    return systems


def compare_texts(
    spoken: Spoken, samples: Samples, systems: dict[str, System]
) -> list[dict[str, Any]]:
    """Rows of all systems for one recording.

    `same` is whether the text is that of the system in `PAIRS` (None where there is none),
    `same_where_sound_is` the same without the segments of either in digital silence. Deletions and
    insertions are against the transcript, and against the text of sequential mode.
    """
    rows = []
    found: dict[str, Segments] = {}
    for name, system in systems.items():
        start = time.perf_counter()
        found[name] = system(samples)
        seconds = time.perf_counter() - start
        text = joined_text(found[name])
        errors = word_errors(spoken, text)
        row: dict[str, Any] = {"recording": spoken.path.name, "language": spoken.language}
        row |= {"audio_seconds": samples.size / SAMPLING_RATE, "system": name}
        row |= {"seconds": seconds, "text": text, "words": errors.words or None}
        row |= {"errors": errors.errors if errors.words else None}
        row |= {"found_words": len(normalised(text, spoken.language).split())}
        row |= {"same": None, "same_where_sound_is": None}
        if (expected := found.get(PAIRS.get(name, ""))) is not None:
            row["same"] = text == joined_text(expected)
            ours, theirs = (text_of_sound(each, samples) for each in (found[name], expected))
            row["same_where_sound_is"] = ours == theirs
        sequential = joined_text(found.get("sequential", []))
        names = (
            ("deletions", "insertions"),
            ("deletions_of_sequential", "insertions_to_sequential"),
        )
        for pair, reference in zip(names, (spoken.transcript, sequential), strict=True):
            row |= zip(pair, changes(reference, text, spoken.language), strict=True)
        rows.append(row)
    return rows


def changes(reference: str | None, text: str, language: str) -> tuple[int | None, int | None]:
    """Deletions and insertions from one text to another; None without any words to compare."""
    expected = normalised(reference or "", language)
    if not expected.split():
        return None, None
    found = jiwer.process_words(expected, normalised(text, language))
    return found.deletions, found.insertions


def joined_text(segments: Segments) -> str:
    return "".join(text for _, _, text in segments).strip()


def text_of_sound(segments: Segments, samples: Samples) -> str:
    """The text without segments in digital silence."""
    return joined_text([each for each in segments if has_sound(samples, *each[:2])])


def has_sound(samples: Samples, start: float, end: float) -> bool:
    """Whether anything but one constant number is between two times (seconds)."""
    part = samples[round(start * SAMPLING_RATE) : round(end * SAMPLING_RATE)]
    return part.size > 0 and bool(np.ptp(part) > 0)


def rates(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Word error rates of every system: of all recordings, of long and of short ones."""
    found: dict[str, dict[str, float | int | None]] = {}
    for name in dict.fromkeys(row["system"] for row in rows):
        known = [row for row in rows if row["system"] == name and row["errors"] is not None]
        parts = {"all": known}
        for part, is_long in (("long", True), ("short", False)):
            parts[part] = [row for row in known if (row["audio_seconds"] > LONG_SECONDS) == is_long]
        found[name] = {"recordings": len(known)} | {
            part: WordErrors(
                *(sum(row[field] for row in some) for field in ("errors", "words"))
            ).rate
            for part, some in parts.items()
        }
    return found


def differing(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Recordings and systems whose text is not that of the system in `PAIRS`, and why."""
    padded = {
        row["recording"] for row in rows if row["system"].endswith(", padded") and row["same"]
    }

    def why(row: dict[str, Any]) -> str:
        if row["same_where_sound_is"]:
            return "in digital silence alone"
        if row["system"] == "openai-whisper" and row["recording"] in padded:
            return "not when padded with silence"
        return "unexplained"

    different = [row for row in rows if row["same"] is False]
    return {f"{row['recording']}, {row['system']}": why(row) for row in different}


def lost_words(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums of words and their changes of every system, and its words where nobody speaks."""

    def total(name: str, some: list[dict[str, Any]]) -> int:
        return sum(row[name] or 0 for row in some)

    found: dict[str, dict[str, float]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        known = [row for row in own if row["words"]]
        joined = [row for row in own if row["recording"].startswith("joined")]
        silent = [row for row in own if row["language"] == "none"]
        found[system] = {name: total(name, known) for name in ("words", "deletions", "insertions")}
        found[system] |= {
            f"{name}_joined": total(name, joined)
            for name in ("found_words", "deletions_of_sequential", "insertions_to_sequential")
        }
        found[system]["found_words_where_nobody_speaks"] = total("found_words", silent)
    return found


def show_texts(rows: list[dict[str, Any]]) -> None:
    def as_expected(line: Mapping[str, Any]) -> str | None:
        compared = [row["same"] for row in rows if row["system"] == line["system"]]
        compared = [same for same in compared if same is not None]
        return f"{sum(compared)} of {len(compared)}" if compared else None

    columns: dict[str, Any] = {"system": "{system}", "recordings": "{recordings}"}
    columns |= {"WER": "{all:.2%}", "over 30 s": "{long:.2%}", "up to 30 s": "{short:.2%}"}
    lines = [{"system": name, **found} for name, found in rates(rows).items()]
    print_rows(None, lines, columns | {"as expected": as_expected})
    names = ("words", "deletions", "insertions", "joined: words", "-", "+", "noise")
    lost = [
        {"system": name} | dict(zip(names, sums.values(), strict=True))
        for name, sums in lost_words(rows).items()
    ]
    print_rows(None, lost, {name: itemgetter(name) for name in ("system", *names)})
    for recording, why in differing(rows).items():
        console.print(f"{recording}: {why}")


def compare(
    audio: Audio,
    model: Model,
    language: Language = "en",
    attention: Attention = "sdpa",
    device: Device = "auto",
    compute_type: ComputeType = "auto",
    batch_size: BatchSize = 8,
    openai: Annotated[bool, typer.Option(help="Compare openai-whisper, too.")] = False,
    system: Annotated[
        list[str] | None, typer.Option(help="Only these systems; repeatable.")
    ] = None,
    joined: Annotated[bool, typer.Option(help="Join recordings, too.")] = False,
    noises: Annotated[bool, typer.Option("--noises", help="Add generated noise.")] = False,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare texts with stock's and openai-whisper's, and word error rates."""
    transcriber = Transcriber.from_pretrained(model, device=device, compute_type=compute_type)
    # Its model runs on Transformers' modules once it is read: ours must stay on the engine.
    stock_type = "float32" if compute_type == "int8" else compute_type
    reference = Transcriber.from_pretrained(model, device=device, compute_type=stock_type)
    other = openai_model(reference.model) if openai else None
    recordings = [(each, load_audio(each.path)) for each in find_spoken(audio, language)]
    if joined:
        recordings += joined_recordings(recordings)
    if noises:
        sounds = generate_noises().items()
        recordings += [(Spoken(Path(name), "none", None), wave) for name, wave in sounds]
    rows: list[dict[str, Any]] = []
    for spoken, samples in recordings:
        # Noise has no language.
        code = "en" if spoken.language == "none" else spoken.language
        if code not in transcriber.languages:
            continue
        is_long = samples.size > LONG_SECONDS * SAMPLING_RATE
        systems = systems_for(
            transcriber, reference, attention, code, batch_size, other, is_long=is_long
        )
        if system:
            systems = {name: systems[name] for name in system if name in systems}
        rows += compare_texts(spoken, samples, systems)
        console.print(f"{spoken.path.name}: done")
    show_texts(rows)
    document = {"model": model, "attention": attention, "batch_size": batch_size}
    document |= {"dtype": str(reference.model.dtype).removeprefix("torch.")}
    document |= {"compute_type": compute_type}
    document |= {"threads": torch.get_num_threads(), "word_error_rates": rates(rows)}
    document |= {"differing": differing(rows), "lost_words": lost_words(rows)}
    document |= {"rows": rows}
    write_json(output, str(reference.model.device), commit, document)


# --- long form, timed ----------------------------------------------------------------------------


def time_systems(
    systems: dict[str, Callable[[Samples], str]], samples: Samples, rounds: int
) -> dict[str, dict[str, Any]]:
    """Texts, and the median seconds of every system; they take turns after one call each."""
    texts = {name: system(samples) for name, system in systems.items()}
    works = {
        name: lambda system=system: system(samples)  # type: ignore[misc]
        for name, system in systems.items()
    }
    times = time_in_turns(works, rounds)
    return {
        name: {
            "seconds": times[name],
            "seconds_median": median(times[name]),
            "text": texts[name],
            "same_as_stock": texts[name].split() == texts["stock"].split(),
        }
        for name in systems
    }


def long_form(
    audio: Audio,
    model: Model,
    language: Language = "en",
    attention: Attention = "sdpa",
    device: Device = "auto",
    batch_size: BatchSize = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 3,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare transcriptions of long recordings with stock's, and their times."""
    transcriber = Transcriber.from_pretrained(model, device=device)
    reference = Transcriber.from_pretrained(model, device=device)
    segments = {"stock": stock_segments(reference, attention, language)}
    for mode in ("sequential", "batched"):
        segments[mode] = our_segments(transcriber, language, batch_size, mode=mode)
    systems = {
        name: lambda samples, system=system: joined_text(system(samples))  # type: ignore[misc]
        for name, system in segments.items()
    }
    rows = []
    for entry in find_inputs(audio):
        spoken = with_transcript(Path(entry.name), language)
        samples = load_audio(spoken.path)
        found = time_systems(systems, samples, rounds)
        for name, row in found.items():
            row |= {"system": name, "recording": spoken.path.name}
            row |= {"wer": word_errors(spoken, row["text"]).rate}
            rows.append(row | {"audio_seconds": samples.size / SAMPLING_RATE})
    stock = {row["recording"]: row["seconds_median"] for row in rows if row["system"] == "stock"}
    columns: dict[str, Any] = {
        "recording": "{recording}",
        "s": "{audio_seconds:.0f}",
        "system": "{system}",
        "seconds": "{seconds_median:.2f}",
        "x stock": lambda row: f"{stock[row['recording']] / row['seconds_median']:.2f}",
        "as stock": lambda row: "yes" if row["same_as_stock"] else "no",
        "WER": "{wer:.2%}",
    }
    print_rows(None, rows, columns)
    document = {"model": model, "attention": attention, "batch_size": batch_size}
    document |= {"threads": torch.get_num_threads(), "rows": rows}
    write_json(output, str(reference.model.device), commit, document)


# --- words and their times -----------------------------------------------------------------------


def compare_words(
    name: str, language: str, ours: Sequence[TimedWord], theirs: Sequence[TimedWord]
) -> dict[str, Any]:
    """Match words in their order, and compare the times of those that are the same.

    Counts are of words: of each system, the same in both, and of those how many begin, end, and do
    both within the tolerance. Differences are of starts and ends, in seconds.
    """
    texts = [[normalised(word.text).strip() for word in words] for words in (ours, theirs)]
    matcher = SequenceMatcher(None, *texts, autojunk=False)
    pairs = [
        (ours[block.a + i], theirs[block.b + i])
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    ]
    differences = [(round(a.start - b.start, 3), round(a.end - b.end, 3)) for a, b in pairs]
    close = [[abs(each) <= TOLERANCE + 1e-6 for each in pair] for pair in differences]
    row = {"recording": name, "language": language, "ours": len(ours), "theirs": len(theirs)}
    row |= {"same": len(pairs), "starts": sum(start for start, _ in close)}
    row |= {"ends": sum(end for _, end in close), "both": sum(all(pair) for pair in close)}
    return row | {"differences": differences}


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, int | float | None]:
    """Words of all recordings, and shares of the same ones that are within the tolerance."""
    found: dict[str, int | float | None] = {"tolerance_seconds": TOLERANCE}
    for name in ("ours", "theirs", "same"):
        found[f"words_{name}"] = sum(row[name] for row in rows)
    for name in ("starts", "ends", "both"):
        close, same = sum(row[name] for row in rows), found["words_same"]
        found[f"{name}_within"] = close / same if same else None
    return found


def words(
    audio: Audio,
    model: Model,
    language: Language = "en",
    device: Device = "auto",
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare words and their times with openai-whisper's."""
    import whisper

    transcriber = Transcriber.from_pretrained(model, device=device, compute_type="float32")
    reference = Transcriber.from_pretrained(model, device=device, compute_type="float32")
    other = openai_model(reference.model)
    rows = []
    for spoken in find_spoken(audio, language):
        if spoken.language not in transcriber.languages:
            continue
        samples = load_audio(spoken.path)
        options: dict[str, Any] = {"temperature": 0.0, "word_timestamps": True}
        decode = DecodeOptions(**options)
        ours = transcriber.transcribe(samples, language=spoken.language, options=decode)
        theirs = other.transcribe(samples, language=spoken.language, fp16=False, **options)
        our_words = [TimedWord(w.text, w.start, w.end) for s in ours.segments for w in s.words]
        their_words = [
            TimedWord(word["word"].strip(), float(word["start"]), float(word["end"]))
            for segment in theirs["segments"]
            for word in segment["words"]
        ]
        row = compare_words(spoken.path.name, spoken.language, our_words, their_words)
        rows.append(row)
        console.print(f"{row['recording']}: {row['both']} of {row['same']} within {TOLERANCE} s")
    sums = totals(rows)
    columns = {"ours": "{words_ours}", "openai-whisper's": "{words_theirs}"}
    columns |= {"the same": "{words_same}"}
    columns |= {name: f"{{{name}_within:.1%}}" for name in ("starts", "ends", "both")}
    print_rows(f"words, and their times within {TOLERANCE} s", [sums], columns)
    document = {"model": model, "openai_whisper": whisper.__version__, "totals": sums}
    document |= {"rows": rows}
    write_json(output, str(reference.model.device), commit, document, indent=None)


app = app_of(__doc__, compare, long_form, words)

if __name__ == "__main__":
    app()
