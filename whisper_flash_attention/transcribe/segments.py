"""What a transcription is: text in segments, each with its times and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Word:
    """One word with its times.

    Args:
        start, end: seconds from the beginning of the recording.
        text: the word with its punctuation, without blanks around it.
        probability: mean of its tokens' probabilities.
    """

    start: float
    end: float
    text: str
    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end < math.inf:
            raise _wrong_times("a word", self.start, self.end)


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of speech, as the model's timestamps cut it.

    Args:
        start: seconds from the beginning of the recording.
        end: seconds, not before `start`.
        text: what was said, without the blank that Whisper's tokens begin with.
        tokens: the ids behind it, timestamp tokens included.
        avg_logprob: mean log-probability of the tokens of the window that it comes from.
        no_speech_prob: of that window, the probability that nobody speaks.
        compression_ratio: of that window's text, its length to its length when compressed.
        temperature: at which that window was decoded.
        words: with their times, if those were asked for.
        channel: number of the channel that it was heard in, from 1, where the channels of a
            recording were transcribed one by one; None otherwise.
    """

    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    avg_logprob: float | None = None
    no_speech_prob: float | None = None
    compression_ratio: float | None = None
    temperature: float | None = None
    words: tuple[Word, ...] = ()
    channel: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end < math.inf:
            raise _wrong_times("a segment", self.start, self.end)


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
        """Return what `json.dumps` takes; `from_dict` makes an equal transcription of it.

        Segments have the field `channel` only where it is set.
        """
        fields = asdict(self)
        fields["segments"] = [
            {
                **{name: value for name, value in row.items() if name != "channel" or value},
                "tokens": list(row["tokens"]),
                "words": list(row["words"]),
            }
            for row in fields["segments"]
        ]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave. Raises `ValueError` if a field is missing or unknown."""
        try:
            segments = tuple(_segment(row) for row in fields["segments"])
            return cls(**{**fields, "segments": segments})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a transcription: {error}") from error


def _segment(row: Mapping[str, Any]) -> Segment:
    words = tuple(Word(**word) for word in row.get("words", ()))
    return Segment(**{**row, "tokens": tuple(row["tokens"]), "words": words})


def _wrong_times(what: str, start: float, end: float) -> ValueError:
    return ValueError(f"{what} cannot go from {start} s to {end} s")
