"""Recordings with transcripts, and word errors against them.

A folder's `index.json`, if it has one, is a list of objects with `file`, `language` and
`transcript`; elsewhere a transcript is in a `.txt` file beside the recording.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.benchmark.from_files import CONTAINERS, encode
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.parity.report import WordErrors
from whisper_flash_attention.transcribe.inputs import find_inputs

# Written without blanks: a character counts as a word.
CHARACTER_LANGUAGES = frozenset({"ja", "zh", "yue", "th", "lo", "my", "km"})


@dataclass(frozen=True)
class Spoken:
    """A recording; the code of its language, and its transcript, if that is known."""

    path: Path
    language: str
    transcript: str | None

    @property
    def is_silent(self) -> bool:
        """Whether it is known to have no words."""
        return self.language == "none"


def find_spoken(audio: Sequence[str], language: str) -> list[Spoken]:
    """Recordings of files and folders; `language` is that of those without one in an index."""
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
    return [
        Spoken(folder / row["file"], row["language"], row["transcript"] or None)
        for row in json.loads(index.read_text("utf-8"))
    ]


def with_transcript(path: Path, language: str) -> Spoken:
    """A recording, with the `.txt` file beside it as its transcript."""
    beside = path.with_suffix(".txt")
    return Spoken(path, language, beside.read_text("utf-8") if beside.is_file() else None)


def normalised(text: str, language: str = "en") -> str:
    """Lower case, without punctuation; single characters of languages written without blanks."""
    kept = (letter if letter.isalnum() or letter in " '" else " " for letter in text.lower())
    plain = "".join(kept)
    return " ".join("".join(plain.split())) if language in CHARACTER_LANGUAGES else plain


def word_errors(spoken: Spoken, text: str) -> WordErrors:
    """Errors against the transcript; of no words where there is none."""
    errors = WordErrors()
    if spoken.transcript is not None:
        errors.add(*(normalised(each, spoken.language) for each in (spoken.transcript, text)))
    return errors


def bundled_spoken() -> list[Spoken]:
    """The recordings that come with this package."""
    return [Spoken(clip.path, "en", clip.transcript) for clip in bundled_recordings()]


def join_spoken(spoken: Sequence[Spoken], seconds: float, folder: Path) -> Spoken:
    """Write recordings one after the other as FLAC, over and over, none of them cut.

    Args:
        spoken: those that have a transcript and the first one's language are taken.
        seconds: length that is not exceeded.
        folder: where the file goes.

    Raises:
        OptionError: there is no recording with a transcript that is short enough.
    """
    parts: list[Samples] = []
    texts: list[str] = []
    left = round(seconds * SAMPLING_RATE)
    usable = [each for each in spoken if each.transcript]
    loaded = [
        (load_audio(each.path), each.transcript or "")
        for each in usable
        if each.language == usable[0].language
    ]
    for samples, text in cycle(loaded):
        if samples.size > left:
            break
        parts.append(samples)
        texts.append(text)
        left -= samples.size
    if not parts:
        raise OptionError(f"join {seconds:g}: no recording with a transcript is that short")
    path = folder / f"joined-{seconds:g}s.flac"
    encode(path, np.concatenate(parts), *CONTAINERS["flac"])
    return Spoken(path, usable[0].language, " ".join(texts))
