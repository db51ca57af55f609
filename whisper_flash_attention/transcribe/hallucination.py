"""Skip silence beside words that look invented, so that it is not read again as speech.

Invented words are improbable, very short or very long. The rules are openai-whisper's
(`hallucination_silence_threshold` in whisper/transcribe.py): what looks invented and stands between
silences is dropped, and the next window begins after the silence before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whisper_flash_attention.options import APPENDED, PREPENDED
from whisper_flash_attention.transcribe.results import Segment, Word
from whisper_flash_attention.transcribe.segmentation import FRAMES_PER_SECOND

# A word is less credible if it is less probable, or of another length (seconds).
LEAST_PROBABILITY, SHORTEST, LONGEST = 0.15, 0.133, 2.0
# What each second below the shortest counts; one above the longest counts 1, as improbability does.
TOO_SHORT = 15.0
# Number of words of a segment that are judged, and the doubt from which it counts as invented.
FIRST_WORDS, MUCH_DOUBT = 8, 3.0
# Seconds beside the edges of a window that count as silence.
EDGE = 2.0
PUNCTUATION = PREPENDED + APPENDED


@dataclass(frozen=True, slots=True)
class AlignedWindow:
    """A decoded window whose segments have words.

    Args:
        segments: in order of time.
        start: its first frame in the recording.
        frames: of the recording that it covers; `length` with the padding.
        total: frames of the recording.
        seek: where the next window would begin.
        last_speech: where speech ended before this window, in seconds.
        ends_in_silence: whether its result ends with a single timestamp.
    """

    segments: tuple[Segment, ...]
    start: int
    frames: int
    length: int
    total: int
    seek: int
    last_speech: float
    ends_in_silence: bool

    @property
    def offset(self) -> float:
        """Where the window begins, in seconds."""
        return self.start / FRAMES_PER_SECOND

    @property
    def end(self) -> float:
        """Where it ends, its padding included, in seconds."""
        return (self.start + self.length) / FRAMES_PER_SECOND


def skip_silence(window: AlignedWindow, threshold: float) -> tuple[tuple[Segment, ...], int]:
    """The segments that are kept, and the frame at which the next window begins.

    Args:
        threshold: silence that is longer is skipped, in seconds.
    """
    seek = _after_words(window, threshold)
    first = _next_with_words(window.segments)
    if first is not None and looks_invented(first):
        gap = first.start - window.offset
        if gap > threshold:
            return (), window.start + max(1, round(gap * FRAMES_PER_SECOND))
    last_end = window.last_speech
    for index, segment in enumerate(window.segments):
        if not segment.words:
            continue
        following = _next_with_words(window.segments[index + 1 :])
        if looks_invented(segment) and _stands_alone(
            window, segment, last_end, following, threshold
        ):
            after = max(window.offset + 1, segment.start)
            is_last = window.total / FRAMES_PER_SECOND - segment.end < threshold
            seek = window.total if is_last else round(after * FRAMES_PER_SECOND)
            return window.segments[:index], seek
        last_end = segment.end
    return window.segments, seek


def looks_invented(segment: Segment | None) -> bool:
    """Whether the first words of a segment look invented."""
    if segment is None or not segment.words:
        return False
    words = [word for word in segment.words if word.text.strip() not in PUNCTUATION][:FIRST_WORDS]
    doubt = sum(_doubt(word) for word in words)
    return doubt >= MUCH_DOUBT or doubt + 0.01 >= len(words)


def _doubt(word: Word) -> float:
    seconds = word.end - word.start
    doubt = 1.0 if word.probability < LEAST_PROBABILITY else 0.0
    return doubt + max(0.0, SHORTEST - seconds) * TOO_SHORT + max(0.0, seconds - LONGEST)


def _after_words(window: AlignedWindow, threshold: float) -> int:
    """Where the next window begins if nothing is dropped: after long silence at the end."""
    if window.ends_in_silence or not window.segments:
        return window.seek
    end = last_end(window.segments)
    if end <= window.offset:
        return window.seek
    is_silent = window.end - end > threshold
    return round(end * FRAMES_PER_SECOND) if is_silent else window.start + window.frames


def _stands_alone(
    window: AlignedWindow,
    segment: Segment,
    last_end: float,
    following: Segment | None,
    threshold: float,
) -> bool:
    """Whether there is silence, or more that is invented, on both sides of a segment."""
    if following is None:
        next_start = window.offset + window.frames / FRAMES_PER_SECOND
    else:
        next_start = following.words[0].start
    is_silent_before = (
        segment.start - last_end > threshold
        or segment.start < threshold
        or segment.start - window.offset < EDGE
    )
    is_silent_after = (
        next_start - segment.end > threshold
        or looks_invented(following)
        or window.end - segment.end < EDGE
    )
    return is_silent_before and is_silent_after


def last_end(segments: Sequence[Segment]) -> float:
    """Where the last word ends, or without any the last segment, in seconds."""
    for segment in reversed(segments):
        if segment.words:
            return segment.words[-1].end
    return segments[-1].end


def _next_with_words(segments: Sequence[Segment]) -> Segment | None:
    return next((segment for segment in segments if segment.words), None)
