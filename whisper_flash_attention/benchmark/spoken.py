"""Recordings with transcripts, what is made of them, and errors against them.

A folder's `index.json`, if it has one, is a list of objects with `file`, `language`, `transcript`
and `words`, of which the last two may be left out; elsewhere a transcript is in a `.txt` file
beside the recording, and words with their times in a file that `read_alignment` knows. MLPerf
Inference joins LibriSpeech's utterances, which are short, to samples of nearly 30 s; `repack` does
so with the recordings of any manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.benchmark.features import CLIP_SAMPLES
from whisper_flash_attention.benchmark.from_files import CONTAINERS, encode
from whisper_flash_attention.benchmark.word_alignment import (
    TimedWord,
    read_alignment,
    read_text,
    words_of_entry,
)
from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.parity.report import WordErrors
from whisper_flash_attention.transcribe.inputs import find_inputs

# Descriptions of sounds in brackets, as Whisper's normaliser removes them.
_DESCRIPTION = re.compile(r"\[[^\]]*\]|\([^)]*\)")
# In place of a language: nobody speaks.
SILENCE = "none"
# Of a recording that is joined, in seconds: a day.
LONGEST = 86_400.0
# Written without blanks: a character counts as a word.
CHARACTER_LANGUAGES = frozenset({"ja", "zh", "yue", "th", "lo", "my", "km"})


@dataclass(frozen=True)
class Spoken:
    """A recording and what is known of it.

    Args:
        path: the file.
        language: its code, or `SILENCE`.
        transcript: what is said.
        seconds: its length.
        words: of a reference alignment; those whose times are not known are left out.
    """

    path: Path
    language: str
    transcript: str | None
    seconds: float | None = None
    words: tuple[TimedWord, ...] = ()

    @property
    def is_silent(self) -> bool:
        """Whether it is known to have no words."""
        return self.language == SILENCE


def find_spoken(audio: Sequence[str], language: str) -> list[Spoken]:
    """Recordings of files and folders; `language` is that of those without one in an index.

    Raises:
        BenchmarkError: an index or a transcript cannot be read.
        OptionError: a file is not there.
    """
    found: list[Spoken] = []
    for name in audio:
        path = Path(name)
        if indexed := _indexed(path):
            found += indexed
        elif listed := [each for each in _indexed(path.parent) if each.path.name == path.name]:
            found += listed
        else:
            found += [with_transcript(Path(entry.name), language) for entry in find_inputs([name])]
    return found


def _indexed(folder: Path) -> list[Spoken]:
    """The recordings that a folder's index lists; none where there is no index."""
    index = folder / "index.json"
    if not index.is_file():
        return []
    try:
        rows = json.loads(read_text(index))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{index} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise BenchmarkError(f"{index} is no list: give {_ENTRIES}")
    return [_entry(row, number, index) for number, row in enumerate(rows, start=1)]


_ENTRIES = (
    "objects with 'file', 'language' and, if they are known, 'transcript' and 'words' (objects "
    "with 'word', 'start' and 'end')"
)


def _entry(row: Any, number: int, index: Path) -> Spoken:
    values: Mapping[str, Any] = row if isinstance(row, dict) else {}
    file, language, transcript = map(values.get, ("file", "language", "transcript"))
    named = all(isinstance(each, str) and each for each in (file, language))
    try:
        if not named or not isinstance(transcript, str | None):
            raise ValueError("a field is missing or is no text")
        words = words_of_entry(values)
    except ValueError as error:
        wrong = f"entry {number} of {index} is {check.shown(row)}: give {_ENTRIES}"
        raise BenchmarkError(wrong) from error
    return Spoken(index.parent / str(file), str(language), transcript or None, words=words)


def with_transcript(path: Path, language: str) -> Spoken:
    """A recording, with the `.txt` file and the alignment beside it.

    Raises:
        BenchmarkError: one of them cannot be read.
    """
    beside = path.with_suffix(".txt")
    transcript = read_text(beside) if beside.is_file() else None
    return Spoken(path, language, transcript, words=read_alignment(path))


def normalised(text: str, language: str = "en") -> str:
    """Lower case, without punctuation and descriptions of sounds in brackets; single characters of
    languages written without blanks.
    """
    words = _DESCRIPTION.sub(" ", text.lower())
    kept = (letter if letter.isalnum() or letter in " '" else " " for letter in words)
    plain = "".join(kept)
    return " ".join("".join(plain.split())) if language in CHARACTER_LANGUAGES else plain


def word_errors(spoken: Spoken, text: str) -> WordErrors:
    """Errors against the transcript; of no words where there is none."""
    errors = WordErrors()
    if spoken.transcript is not None:
        errors.add(*(normalised(each, spoken.language) for each in (spoken.transcript, text)))
    return errors


def boundary_errors(spoken: Spoken, found: Sequence[TimedWord]) -> list[tuple[float, float]]:
    """Differences in seconds of starts and of ends from the alignment, of words that both have.

    Words are matched in their order, without case and punctuation.
    """
    expected, given = (
        [normalised(word.text, spoken.language).strip() for word in words]
        for words in (spoken.words, found)
    )
    blocks = SequenceMatcher(None, expected, given, autojunk=False).get_matching_blocks()
    pairs = [
        (spoken.words[each.a + i], found[each.b + i]) for each in blocks for i in range(each.size)
    ]
    return [(theirs.start - word.start, theirs.end - word.end) for word, theirs in pairs]


def bundled_spoken() -> list[Spoken]:
    """The recordings that come with this package."""
    return [Spoken(clip.path, "en", clip.transcript) for clip in bundled_recordings()]


def check_length(seconds: float) -> float:
    """Return the length of a joined recording; raises `OptionError` if it cannot be one."""
    return check.number("join", seconds, "seconds above 0, a day at most", above=0, most=LONGEST)


def join_spoken(spoken: Sequence[Spoken], seconds: float, folder: Path) -> Spoken:
    """Write recordings one after the other as FLAC, over and over, none of them cut.

    Args:
        spoken: those that have a transcript and the first one's language are taken.
        seconds: length that is not exceeded.
        folder: where the file goes.

    Raises:
        OptionError: there is no recording with a transcript that is short enough, or the length
            cannot be one.
    """
    check_length(seconds)
    parts: list[Samples] = []
    texts: list[str] = []
    words: list[TimedWord] = []
    most = left = round(seconds * SAMPLING_RATE)
    usable = [each for each in spoken if each.transcript]
    loaded = [
        (load_audio(each.path), each) for each in usable if each.language == usable[0].language
    ]
    for samples, each in cycle(loaded):
        if samples.size > left:
            break
        offset = (most - left) / SAMPLING_RATE
        parts.append(samples)
        texts.append(each.transcript or "")
        words += [TimedWord(w.text, w.start + offset, w.end + offset) for w in each.words]
        left -= samples.size
    if not parts:
        raise OptionError(f"join {seconds:g}: no recording with a transcript is that short")
    path = folder / f"joined-{seconds:g}s.flac"
    samples = np.concatenate(parts)
    encode(path, samples, *CONTAINERS["flac"])
    length = samples.size / SAMPLING_RATE
    return Spoken(path, usable[0].language, " ".join(texts), length, tuple(words))


# Between two recordings of a sample, as MLPerf has it.
PAUSE_SAMPLES = SAMPLING_RATE // 2
PATH_FIELDS, TEXT_FIELDS = ("audio_filepath", "file"), ("transcript", "text")


@dataclass(frozen=True)
class Sample:
    """Consecutive utterances: mono samples at 16 kHz, at most 30 s, and their transcript."""

    samples: Samples
    transcript: str

    @property
    def seconds(self) -> float:
        return self.samples.size / SAMPLING_RATE


def read_manifest(manifest: Path | None) -> list[Spoken]:
    """Read a manifest of English recordings: a JSON list, or lines of JSON.

    Args:
        manifest: objects with a path, relative to the manifest ("file", "audio_filepath", or
            "files" as in MLPerf's manifests), and a "transcript" or "text". None stands for the
            recordings that come with this package.

    Raises:
        BenchmarkError: it cannot be read, or an object lacks a path or a transcript.
    """
    if manifest is None:
        return bundled_spoken()
    try:
        text = manifest.read_text("utf-8")
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:  # a decoding error is a ValueError, too
        raise BenchmarkError(f"manifest {manifest} cannot be read: {error}") from error
    if not rows:
        raise BenchmarkError(f"manifest {manifest} is empty")
    return [_listed(row, number, manifest) for number, row in enumerate(rows, start=1)]


def _listed(row: Any, number: int, manifest: Path) -> Spoken:
    values: Mapping[str, Any] = row if isinstance(row, dict) else {}
    found = [values.get(name) for name in PATH_FIELDS]
    with suppress(KeyError, IndexError, TypeError):  # which manifests but MLPerf's lack
        found.append(values["files"][0]["fname"])
    path = next((each for each in found if isinstance(each, str) and each), None)
    texts = [values.get(name) for name in TEXT_FIELDS]
    transcript = next((each for each in texts if isinstance(each, str) and each), None)
    if path is None or transcript is None:
        raise BenchmarkError(
            f"entry {number} of manifest {manifest} lacks a path or a transcript: give objects "
            "with 'file' and 'transcript'"
        )
    return Spoken(manifest.parent / path, "en", transcript)


def repack(spoken: Sequence[Spoken], load: Callable[[Path], Samples] = load_audio) -> list[Sample]:
    """Join consecutive utterances of one source to samples of at most 30 s, half a second between.

    Files whose names differ in their last number alone are of one source. What is longer than 30 s
    by itself is left out, as MLPerf does.

    Raises:
        AudioError: a recording cannot be read.
        BenchmarkError: nothing is left.
    """
    samples = [Sample(*each) for each in _joined(spoken, load)]
    if not samples:
        raise BenchmarkError("no recording of the manifest is at most 30 s long")
    return samples


def _joined(
    spoken: Sequence[Spoken], load: Callable[[Path], Samples]
) -> Iterator[tuple[Samples, str]]:
    parts: list[Samples] = []
    texts: list[str] = []
    current = None
    pause = np.zeros(PAUSE_SAMPLES, np.float32)
    for each in spoken:
        samples = load(each.path)
        if samples.size > CLIP_SAMPLES:
            continue
        source = _source(each.path)
        length = sum(part.size for part in parts) + pause.size + samples.size
        if parts and (source != current or length > CLIP_SAMPLES):
            yield np.concatenate(parts), " ".join(texts)
            parts, texts = [], []
        parts += [pause, samples] if parts else [samples]
        texts.append(each.transcript or "")
        current = source
    if parts:
        yield np.concatenate(parts), " ".join(texts)


def _source(path: Path) -> tuple[Path, str]:
    return path.parent, re.sub(r"[-_]?\d+$", "", path.stem)
