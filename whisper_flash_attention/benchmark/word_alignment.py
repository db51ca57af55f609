"""Words with their times: reference alignments of recordings.

An alignment is in a folder's `index.json`, in a file of TIMIT's format beside the recording
(`.wrd`, of lines with start, end and word), or in a file as the aligner Gentle writes it (`.json`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.samples import SAMPLING_RATE
from whisper_flash_attention.errors import BenchmarkError


class TimedWord(NamedTuple):
    """A word; its start and end in seconds from the beginning of the recording."""

    text: str
    start: float
    end: float


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        BenchmarkError: it cannot be read, or is none.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not text in UTF-8 ({error.reason})") from error


def read_alignment(recording: Path) -> tuple[TimedWord, ...]:
    """The words of the `.wrd` or `.json` file beside a recording; none without such a file.

    Times of a `.wrd` file are seconds if any has a decimal point, otherwise samples at 16 kHz, as
    in TIMIT. A `.json` file counts if it has the fields of Gentle's; words that Gentle did not find
    in the sound have no times, and are left out.

    Raises:
        BenchmarkError: a `.wrd` file cannot be read, or has a line of something else; or a word of
            Gentle's that was found lacks its times.
    """
    lines = recording.with_suffix(".wrd")
    if lines.is_file():
        return _of_lines(lines)
    gentle = recording.with_suffix(".json")
    return _of_gentle(gentle) if gentle.is_file() else ()


def _of_lines(path: Path) -> tuple[TimedWord, ...]:
    rows = [line.split(None, 2) for line in read_text(path).splitlines()]
    in_seconds = any("." in field for row in rows for field in row[:2])
    unit = 1 if in_seconds else SAMPLING_RATE
    found = []
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        try:
            start, end, text = float(row[0]) / unit, float(row[1]) / unit, row[2].strip()
            found.append(checked_word(text, start, end))
        except (ValueError, IndexError) as error:
            raise BenchmarkError(
                f"line {number} of {path} is {check.shown(' '.join(row))}: give a start, an end "
                "and a word"
            ) from error
    return tuple(found)


def checked_word(text: Any, start: Any, end: Any) -> TimedWord:
    """Return a word of these values; raises `ValueError` where they cannot be one's."""
    numbers = all(isinstance(each, int | float) for each in (start, end))
    if not isinstance(text, str) or not numbers or not 0 <= start <= end < math.inf:
        raise ValueError("not a word with a start and an end")
    return TimedWord(text, float(start), float(end))


def _of_gentle(path: Path) -> tuple[TimedWord, ...]:
    """The aligned words of a file; none of one that is not Gentle's."""
    try:
        found = json.loads(path.read_text("utf-8"))
        aligned = [word for word in found["words"] if word["case"] == "success"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return ()
    try:
        return tuple(checked_word(each["word"], each["start"], each["end"]) for each in aligned)
    except (ValueError, LookupError) as error:
        raise BenchmarkError(
            f"{path} has a word that was found and has no start and end: align it again"
        ) from error


def words_of_entry(entry: Mapping[str, Any]) -> tuple[TimedWord, ...]:
    """The words of an index's entry: objects with "word", "start" and "end" under "words".

    Raises:
        ValueError: they are something else.
    """
    words = entry.get("words", ())
    try:
        return tuple(checked_word(each["word"], each["start"], each["end"]) for each in words)
    except (LookupError, TypeError) as error:
        raise ValueError("no words with their times") from error
