"""Recordings with transcripts, and word errors against them, for the scripts.

A folder's `index.json`, if it has one, is a list of objects with `file`, `language` and
`transcript`; elsewhere a transcript is in a `.txt` file beside the recording.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
