"""A row of results: what one recording came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.storage import utf8_text

Row = dict[str, Any]

# The columns, in order, with their types in the words of Arrow; a list is [type], a struct a dict.
WORD: dict[str, Any] = {
    "start": "float64",
    "end": "float64",
    "text": "string",
    "probability": "float64",
}
SEGMENT: dict[str, Any] = {
    "start": "float64",
    "end": "float64",
    "text": "string",
    "tokens": ["int32"],
    "avg_logprob": "float64",
    "no_speech_prob": "float64",
    "compression_ratio": "float64",
    "temperature": "float64",
    "words": [WORD],
    "channel": "int32",
    "language": "string",
    "id": "int32",
    "seek": "int32",
}
# Left out of a segment where they are not set. Shards of earlier releases have only the first.
UNSET = ("channel", "language", "id", "seek")
COLUMNS: dict[str, Any] = {
    "id": "string",
    "path": "string",
    "text": "string",
    "language": "string",
    "segments": [SEGMENT],
    "seconds": "float64",
    "seconds_taken": "float64",
    "error": "string",
    "error_kind": "string",
}


def finished_row(item: Item, transcription: Mapping[str, Any], seconds_taken: float) -> Row:
    """The row of a recording that was transcribed.

    Args:
        item: the recording.
        transcription: text, language, segments and seconds, as `Transcription.to_dict` gives them.
        seconds_taken: its share of the work on the recordings that were transcribed beside it.
    """
    found = {name: transcription[name] for name in ("text", "language", "segments", "seconds")}
    row = {"id": item.id, "path": utf8_text(item.path), **found, "seconds_taken": seconds_taken}
    return {**row, "error": None, "error_kind": None}


def without_unset(row: Row) -> Row:
    """A row from a table, whose segments have all columns, as it was written."""
    for segment in row.get("segments") or ():
        for name in UNSET:
            if segment.get(name, 0) is None:
                del segment[name]
    return row


def failed_row(item: Item, kind: str, message: str) -> Row:
    """The row of a recording that was not: `kind` is the error's class, `message` what it says."""
    found = {"id": item.id, "path": utf8_text(item.path), "text": None, "language": None}
    nothing: Row = {"segments": [], "seconds": None, "seconds_taken": None}
    return {**found, **nothing, "error": utf8_text(message), "error_kind": kind}


# Of one recording; a sum of such lengths stays finite.
_MOST_SECONDS = 1e12


def misfit(row: object, columns: Sequence[str]) -> str | None:
    """Say what keeps something that was read from being a row with these columns, if anything.

    A row has an id, and either an error or a length in seconds.
    """
    if not isinstance(row, dict):
        return "is no object"
    for name in columns:
        if name not in row:
            return f"has no {name}"
        if not _is(COLUMNS[name], row[name]):
            return f"{name} is not {COLUMNS[name] if isinstance(COLUMNS[name], str) else 'a list'}"
    if not row.get("id", "id"):
        return "has no id"
    if {"error_kind", "seconds"} <= set(columns) and row["error_kind"] is None:
        seconds = row["seconds"]
        if seconds is None or not 0 <= seconds <= _MOST_SECONDS:
            return "has no error, and no length"
    return None


def _is(kind: Any, value: Any) -> bool:
    """Whether a value is of a type that `COLUMNS` names, or None."""
    if value is None:
        return True
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(kind[0], each) for each in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_is(kind[name], value.get(name)) for name in kind)
    if kind == "string":
        return isinstance(value, str)
    whole = kind == "int32"
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


@dataclass(slots=True)
class Tally:
    """What rows add up to.

    Attributes:
        done, failed: numbers of rows without and with an error.
        audio_seconds: length of what was transcribed.
        kinds: numbers of errors by kind.
    """

    done: int = 0
    failed: int = 0
    audio_seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row, of which `seconds` and `error_kind` are looked at."""
        if row["error_kind"] is None:
            self.done += 1
            self.audio_seconds += row["seconds"]
        else:
            self.failed += 1
            self.kinds[row["error_kind"]] += 1
