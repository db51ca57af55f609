"""Recordings with what is said in them, for the scripts that compare texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whisper_flash_attention.transcribe.inputs import find_inputs

# Written without blanks: a character counts as a word.
CHARACTER_LANGUAGES = frozenset({"ja", "zh", "yue", "th", "lo", "my", "km"})


@dataclass(frozen=True)
class Spoken:
    """A recording; the code of the language spoken, and what is said, if that is known."""

    path: Path
    language: str
    transcript: str | None


def find_spoken(audio: Sequence[str], language: str) -> list[Spoken]:
    """Recordings of files and folders.

    A folder's `index.json`, if it has one, is a list of objects with `file`, `language` and
    `transcript`; elsewhere a transcript is in a `.txt` file beside the recording.

    Args:
        audio: files and folders.
        language: code, where no index tells.
    """
    found: list[Spoken] = []
    for place in audio:
        index = Path(place) / "index.json"
        if index.is_file():
            rows = json.loads(index.read_text("utf-8"))
            found += [
                Spoken(index.parent / row["file"], row["language"], row["transcript"] or None)
                for row in rows
            ]
        else:
            found += [_with_text(Path(entry.name), language) for entry in find_inputs([place])]
    return found


def _with_text(path: Path, language: str) -> Spoken:
    beside = path.with_suffix(".txt")
    return Spoken(path, language, beside.read_text("utf-8") if beside.is_file() else None)


def normalised(text: str, language: str = "en") -> str:
    """Lower case, without punctuation; single characters of languages written without blanks."""
    kept = (letter if letter.isalnum() or letter in " '" else " " for letter in text.lower())
    plain = "".join(kept)
    return " ".join("".join(plain.split())) if language in CHARACTER_LANGUAGES else plain
