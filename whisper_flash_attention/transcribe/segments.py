"""What a transcription is: text in segments, each with its times and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of speech, as the model's timestamps cut it.

    Args:
        start: seconds from the beginning of the recording.
        end: seconds, not before `start`.
        text: what was said, without the blank that Whisper's tokens begin with.
        tokens: the ids behind it, timestamp tokens included.
    """

    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.start <= self.end and math.isfinite(self.end)):
            raise ValueError(f"a segment cannot go from {self.start} s to {self.end} s")


@dataclass(frozen=True, slots=True)
class Transcription:
    """The text of one recording.

    Args:
        text: all of it.
        language: code of the language spoken, as given or detected.
        segments: in order of time.
        seconds: length of the recording.
    """

    text: str
    language: str
    segments: tuple[Segment, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes; `from_dict` makes an equal transcription of it."""
        fields = asdict(self)
        fields["segments"] = [
            {**asdict(segment), "tokens": list(segment.tokens)} for segment in self.segments
        ]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave. Raises `ValueError` if a field is missing or unknown."""
        try:
            segments = tuple(
                Segment(**{**row, "tokens": tuple(row["tokens"])}) for row in fields["segments"]
            )
            return cls(**{**fields, "segments": segments})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a transcription: {error}") from error
