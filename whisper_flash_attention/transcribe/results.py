"""What a transcription is: text in segments, each with its times and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

SHOWN = 60  # characters of a text that a `repr` shows


@dataclass(frozen=True, slots=True)
class Word:
    """One word with its times; its `str` is the text without blanks around it.

    Args:
        start, end: seconds from the beginning of the recording.
        text: the word with its punctuation, and the blank before it, if there is one: the texts of
            all words, joined, are the text of their segment.
        probability: mean of its tokens' probabilities.
    """

    start: float
    end: float
    text: str
    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end < math.inf:
            raise _wrong_times("a word", self.start, self.end)

    def __str__(self) -> str:
        return self.text.strip()


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of speech, delimited by timestamps of the model.

    Args:
        start: seconds from the beginning of the recording.
        end: seconds, not before `start`.
        text: without the blank that the tokens of Whisper begin with.
        tokens: its ids, timestamp tokens included.
        avg_logprob: mean log-probability of the tokens of the window that it comes from.
        no_speech_prob: of that window, the probability that it has no speech.
        compression_ratio: of that window's text, its length to its length when compressed.
        temperature: at which that window was decoded.
        words: with their times, if those were requested.
        channel: number of its channel, from 1, where the channels of a
            recording were transcribed one by one; None otherwise.
        language: code of the language spoken, if it was detected in every window.
        id: its number in the transcription, from 0.
        seek: where its window begins in the recording, in hundredths of a second.
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
    language: str | None = None
    id: int = 0
    seek: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end < math.inf:
            raise _wrong_times("a segment", self.start, self.end)

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes; `channel` and `language` only where they are set."""
        return _row(asdict(self))


@dataclass(frozen=True, slots=True)
class Transcription:
    """The text of one recording.

    Args:
        text: all of it.
        language: code of the language spoken, as given or detected.
        segments: in order of time.
        seconds: length of the recording.
        language_probability: of `language`, from 0 to 1; None if it was given, or if there is no
            sound to detect it in.
        all_language_probs: pairs of codes and probabilities of all languages that the model knows,
            in descending order; empty where `language_probability` is None. They are the first
            window's, or where every window's language was detected, the mean over all windows.
        path: of the recording, if it was transcribed from a file; not in `to_dict`.
    """

    text: str
    language: str
    segments: tuple[Segment, ...]
    seconds: float
    language_probability: float | None = None
    all_language_probs: tuple[tuple[str, float], ...] = ()
    path: str | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        count = len(self.segments)
        segments = "1 segment" if count == 1 else f"{count} segments"
        name = "" if self.path is None else f", path={self.path!r}"
        text = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}…"
        return (
            f"Transcription({text!r}, language={self.language!r}, {segments}, "
            f"{self.seconds:.2f} s{name})"
        )

    def _repr_html_(self) -> str:
        """A table of segments for notebooks, with a player where the recording is a file."""
        from whisper_flash_attention.transcribe.notebook import as_html

        return as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes; `from_dict` makes an equal transcription of it.

        `all_language_probs` becomes an object by code. Segments have the fields `channel` and
        `language` only where they are set.
        """
        fields = asdict(self)
        del fields["path"]
        fields["segments"] = [_row(row) for row in fields["segments"]]
        fields["all_language_probs"] = dict(self.all_language_probs)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild what `to_dict` gave. Raises `ValueError` if a field is missing or unknown."""
        try:
            segments = tuple(_segment(row) for row in fields["segments"])
            chances = tuple(dict(fields.get("all_language_probs", {})).items())
            return cls(**{**fields, "segments": segments, "all_language_probs": chances})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not a transcription: {error}") from error


def _row(segment: dict[str, Any]) -> dict[str, Any]:
    row = {**segment, "tokens": list(segment["tokens"]), "words": list(segment["words"])}
    for name in ("channel", "language"):
        if row[name] is None:
            del row[name]
    return row


def _segment(row: Mapping[str, Any]) -> Segment:
    words = tuple(Word(**word) for word in row.get("words", ()))
    return Segment(**{**row, "tokens": tuple(row["tokens"]), "words": words})


def _wrong_times(what: str, start: float, end: float) -> ValueError:
    return ValueError(f"{what} cannot go from {start} s to {end} s")
