"""Measure the times of words against reference alignments of real speech.

    pip install openai-whisper faster-whisper
    python benchmarks/word_times.py --model package:tiny.en --model package:base \\
        --output benchmarks/results/word-errors-cpu.json aligned/

A recording's alignment is beside it: `.wrd` (lines of start, end and word; in seconds, or, as in
TIMIT, in samples at 16 kHz) or the `.json` of the aligner Gentle. Recordings with alignments are in
two repositories on GitHub: six sentences of TIMIT and three others, segmented by hand, in
compi1234/spchlab (data/demo), and ten Harvard sentences, aligned by Kaldi, in the history of
lowerquality/gentle (commit 1a7633d, tests/data, the files of list 30).

Every system transcribes in float32 at temperature 0 with word timestamps, and its other defaults.
Words are matched in their order; the errors of a word that both have are those of its start and of
its end. The mean boundary error is over both. Systems that agree on a word less are not punished
for it here: `found` is the share of the reference's words that a system has.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer
from _harness import Commit, Output, Threads, app_of, console, one_of, print_rows, write_json
from texts import Word

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.benchmark.environment import package_version
from whisper_flash_attention.benchmark.peer_checkpoints import openai_model, write_checkpoint
from whisper_flash_attention.benchmark.peer_systems import CTRANSLATE2
from whisper_flash_attention.benchmark.spoken import normalised
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.inputs import find_inputs

# The words of a recording.
Align = Callable[[Path], list[Word]]
WITHIN = (0.02, 0.05, 0.1)  # seconds
# No recording is so long in seconds; as samples it is a fraction of one.
MOST_SECONDS = 3600


def read_alignment(recording: Path) -> list[Word] | None:
    """The words of the file beside a recording; None where there is none."""
    lines, gentle = recording.with_suffix(".wrd"), recording.with_suffix(".json")
    if lines.is_file():
        rows = [
            line.split(None, 2) for line in lines.read_text("utf-8").splitlines() if line.strip()
        ]
        found = [Word(word.strip(), float(start), float(end)) for start, end, word in rows]
        if found[-1].end < MOST_SECONDS and any("." in end for _, end, _ in rows):
            return found
        return [
            Word(word, start / SAMPLING_RATE, end / SAMPLING_RATE) for word, start, end in found
        ]
    if gentle.is_file():
        words = json.loads(gentle.read_text("utf-8"))["words"]
        aligned = (word for word in words if word["case"] == "success")
        return [Word(each["word"], each["start"], each["end"]) for each in aligned]
    return None


def boundary_errors(reference: Sequence[Word], found: Sequence[Word]) -> list[tuple[float, float]]:
    """Differences in seconds of starts and of ends, of the words that both have."""
    texts = [[normalised(word.text).strip() for word in words] for words in (reference, found)]
    blocks = SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks()
    pairs = [
        (reference[each.a + i], found[each.b + i]) for each in blocks for i in range(each.size)
    ]
    return [(theirs.start - word.start, theirs.end - word.end) for word, theirs in pairs]


def load_ours(model: str) -> Align:
    """This package's transcriber."""
    transcriber = Transcriber.from_pretrained(model, device="cpu")

    def align(path: Path) -> list[Word]:
        found = transcriber.transcribe(
            load_audio(path), language="en", temperature=0.0, word_timestamps=True
        )
        words = (word for segment in found.segments for word in segment.words)
        return [Word(each.text, each.start, each.end) for each in words]

    return align


def load_openai_whisper(model: str) -> Align:
    """openai-whisper's `transcribe`."""
    loaded = openai_model(Transcriber.from_pretrained(model, device="cpu").model)

    def align(path: Path) -> list[Word]:
        options: dict[str, Any] = {"temperature": 0.0, "word_timestamps": True, "fp16": False}
        found = loaded.transcribe(load_audio(path), language="en", **options)
        words = (word for segment in found["segments"] for word in segment["words"])
        return [Word(each["word"], float(each["start"]), float(each["end"])) for each in words]

    return align


def load_faster_whisper(model: str) -> Align:
    """faster-whisper's model."""
    from faster_whisper import WhisperModel

    with tempfile.TemporaryDirectory() as folder:
        files = write_checkpoint(model, [CTRANSLATE2], Path(folder)).files
        loaded = WhisperModel(files[CTRANSLATE2], device="cpu", compute_type="float32")

    def align(path: Path) -> list[Word]:
        options: dict[str, Any] = {"temperature": 0.0, "beam_size": 1, "word_timestamps": True}
        segments, _ = loaded.transcribe(load_audio(path), language="en", **options)
        words = (word for segment in segments for word in segment.words or ())
        return [Word(each.word, each.start, each.end) for each in words]

    return align


SYSTEMS: dict[str, tuple[str, Callable[[str], Align]]] = {
    "ours": ("whisper-flash-attention", load_ours),
    "openai-whisper": ("openai-whisper", load_openai_whisper),
    "faster-whisper": ("faster-whisper", load_faster_whisper),
}


def measure(
    system: str, model: str, recordings: Sequence[tuple[Path, list[Word]]]
) -> dict[str, Any]:
    """A row: errors over all recordings, and the differences of each."""
    distribution, load = SYSTEMS[system]
    align = load(model)
    differences = {
        path.name: boundary_errors(reference, align(path)) for path, reference in recordings
    }
    pairs = [pair for found in differences.values() for pair in found]
    errors = [abs(each) for pair in pairs for each in pair]
    words = sum(len(reference) for _, reference in recordings)
    return {
        "setting": "word-times",
        "system": system,
        "version": package_version(distribution),
        "checkpoint": model,
        "device": "cpu",
        "dtype": "float32",
        "words": words,
        "found": len(pairs) / words,
        "mean_error_ms": 1e3 * fmean(errors),
        "median_error_ms": 1e3 * median(errors),
        "mean_start_error_ms": 1e3 * fmean(abs(start) for start, _ in pairs),
        "mean_end_error_ms": 1e3 * fmean(abs(end) for _, end in pairs),
        "within": {f"{most:g}": fmean(each <= most for each in errors) for most in WITHIN},
        "differences": {
            name: [[round(each, 3) for each in pair] for pair in found]
            for name, found in differences.items()
        },
    }


def main(
    audio: Annotated[list[str], typer.Argument(help="Recordings or folders.")],
    model: Annotated[list[str] | None, typer.Option(help="package:NAME; repeatable.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    threads: Threads = 1,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Measure the times of words against reference alignments."""
    names = system or list(SYSTEMS)
    one_of("system", names, SYSTEMS)
    torch.set_num_threads(threads)
    paths = [Path(entry.name) for entry in find_inputs(audio)]
    aligned = [(path, words) for path in paths if (words := read_alignment(path))]
    rows = []
    for checkpoint in model or ("package:tiny.en",):
        for name in names:
            if package_version(SYSTEMS[name][0]) is None:
                console.print(f"{name}: not installed: pip install {SYSTEMS[name][0]}")
                continue
            rows.append(measure(name, checkpoint, aligned))
    columns: dict[str, Any] = {
        "checkpoint": "{checkpoint}",
        "system": "{system}",
        "words": "{words}",
        "found": "{found:.1%}",
        "mean error, ms": "{mean_error_ms:.1f}",
        "start": "{mean_start_error_ms:.1f}",
        "end": "{mean_end_error_ms:.1f}",
        "median": "{median_error_ms:.1f}",
    }
    print_rows("errors of words' boundaries", rows, columns)
    document = {"recordings": [path.name for path, _ in aligned], "rows": rows}
    write_json(output, "cpu", commit, document, indent=None)


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
