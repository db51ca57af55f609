"""Rules that shorten, shift and trim words, and join punctuation to its word.

Those that fit words to their segments are `add_word_timestamps`'s in whisper/timing.py of OpenAI.
`fit_to_levels` corrects times by the levels of the sound, which OpenAI's does not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.options import APPENDED, PREPENDED
from whisper_flash_attention.transcribe.segmentation import FRAMES_PER_SECOND

SENTENCE_ENDS = ".。!！?？"  # noqa: RUF001
# The most that the usual word may last, in seconds; no word should last twice the usual.
LONGEST_USUAL = 0.7
# A word begins and ends where there is sound: what is this much softer than its window's loudest
# frame, in dB, is a pause if it lasts this long, in frames of 0.01 s.
QUIET, SHORTEST_PAUSE = 30.0, 10
# A window of at least this many words has them shifted together, by this many frames at most.
LEAST_WORDS, MOST_SHIFT = 10, 8
# Levels where words start and end, in dB. What is softer than the loudest frame by more than the
# first counts as that soft, or a few pauses would outweigh everything else. Each frame of a shift
# must lower the sum over all words by the second: few words may be as soft where others start.
SOFTEST, LEAST_GAIN = 20.0, 4.0
# Weights of neighbouring frames by which levels are smoothed.
SMOOTHING = np.hanning(9)[1:-1] / np.hanning(9).sum()
# A timestamp of a segment is kept where a word extends beyond it by more than this, in seconds.
TOLERANCE = 0.5


@dataclass(slots=True)
class Timing:
    """A word whose times are being fitted.

    Args:
        text: with the blank before it; empty once it has joined a neighbour.
        count: of its tokens.
        start, end: seconds from the beginning of the window, later of the recording.
        probability: mean of its tokens' probabilities.
    """

    text: str
    count: int
    start: float
    end: float
    probability: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class SegmentTimes:
    """Seconds of a segment whose words are being fitted, and its number of text tokens."""

    start: float
    end: float
    count: int


def usual_duration(words: Sequence[Timing]) -> float:
    """The median of durations above zero, at most `LONGEST_USUAL`; 0 without any. In seconds."""
    durations = [seconds for word in words if (seconds := word.end - word.start)]
    return min(LONGEST_USUAL, median(durations)) if durations else 0.0


def shorten_beside_sentence_ends(words: Sequence[Timing], usual: float) -> None:
    """Cut sentence ends, and words after them, to twice the usual duration."""
    longest = 2 * usual
    for previous, word in pairwise(words):
        if word.end - word.start > longest:
            if word.text in SENTENCE_ENDS:
                word.end = word.start + longest
            elif previous.text in SENTENCE_ENDS:
                word.start = word.end - longest


def join_punctuation(
    words: Sequence[Timing], prepended: str = PREPENDED, appended: str = APPENDED
) -> None:
    """Let punctuation join its word's text and tokens; the word's times and probability stay.

    Args:
        prepended, appended: marks that join the word after them, and the word before them.
    """
    following = len(words) - 1
    for index in range(len(words) - 2, -1, -1):
        mark, word = words[index], words[following]
        if mark.text.startswith(" ") and mark.text.strip() in prepended:
            word.text, word.count = mark.text + word.text, mark.count + word.count
            mark.text, mark.count = "", 0
        else:
            following = index
    previous = 0
    for index in range(1, len(words)):
        word, mark = words[previous], words[index]
        if not word.text.endswith(" ") and mark.text in appended:
            word.text, word.count = word.text + mark.text, word.count + mark.count
            mark.text, mark.count = "", 0
        else:
            previous = index


def deal_out(words: Sequence[Timing], spans: Sequence[SegmentTimes]) -> list[list[Timing]]:
    """The words of each span: a word is where its first token is."""
    rest = list(words)[::-1]
    dealt: list[list[Timing]] = []
    for span in spans:
        mine: list[Timing] = []
        taken = 0
        while rest and taken < span.count:
            word = rest.pop()
            taken += word.count
            if word.text:
                mine.append(word)
        dealt.append(mine)
    return dealt


def fit_to_segment(
    words: Sequence[Timing], span: SegmentTimes, usual: float, last_speech: float
) -> None:
    """Shorten words beside pauses, and let the span begin and end with its words, or they with it.

    Args:
        words: of this span, in seconds of the recording, one at least.
        span: changed, too.
        usual: the usual duration of a word, in seconds.
        last_speech: where speech ended before this span, in seconds.
    """
    _shorten_after_pause(words, usual, last_speech)
    first, last = words[0], words[-1]
    if first.start < span.start - TOLERANCE and span.start < first.end:
        first.start = max(0.0, min(first.end - usual, span.start))
    else:
        span.start = first.start
    if last.start < span.end and span.end + TOLERANCE < last.end:
        last.end = max(last.start + usual, span.end)
    else:
        span.end = last.end


def fit_to_levels(
    dealt: Sequence[Sequence[Timing]],
    spans: Sequence[SegmentTimes],
    levels: npt.NDArray[np.float32],
    offset: float,
    latest: float,
) -> None:
    """Shift and trim the words of a window by the sound; spans begin and end with their words.

    Args:
        dealt: the words of each span, in seconds of the recording.
        levels: of the window's frames, in dB.
        offset: where the window begins, in seconds.
        latest: where the last word ends; no word is shifted beyond it, in seconds.
    """
    words = [word for mine in dealt for word in mine]
    shift_words(words, best_shift(words, levels, offset), offset, latest)
    known = levels.tolist()
    for span, mine in zip(spans, dealt, strict=True):
        if mine:
            trim_pauses(mine, known, offset)
            span.start, span.end = mine[0].start, mine[-1].end


def best_shift(words: Sequence[Timing], levels: npt.NDArray[np.float32], offset: float) -> float:
    """Return the shift in seconds after which words begin and end where it is softest.

    It is 0 for fewer than `LEAST_WORDS` words.

    Args:
        levels: of the window's frames, in dB.
        offset: where the window begins, in seconds.
    """
    if len(words) < LEAST_WORDS or not levels.size:
        return 0.0
    times = np.array([(word.start, word.end) for word in words]) - offset
    frames = np.rint(times.ravel() * FRAMES_PER_SECOND).astype(np.int64)
    audible = np.maximum(levels, levels.max() - SOFTEST)
    smooth = np.convolve(np.pad(audible, len(SMOOTHING) // 2, mode="edge"), SMOOTHING, "valid")
    shifts = np.arange(-MOST_SHIFT, MOST_SHIFT + 1)
    shifted = np.clip(frames + shifts[:, None], 0, smooth.size - 1)  # [shifts, starts and ends]
    means = smooth[shifted].mean(axis=1) + LEAST_GAIN / len(words) * np.abs(shifts)
    return float(shifts[means.argmin()]) / FRAMES_PER_SECOND


def shift_words(words: Sequence[Timing], shift: float, earliest: float, latest: float) -> None:
    """Shift words, but no start or end by more than half of its distance from the bound before it.

    So words stay in order and within the bounds, and keep a length at them. All in seconds.
    """
    if shift == 0:
        return
    for word in words:
        word.start += _within_bounds(shift, word.start, earliest, latest)
        word.end += _within_bounds(shift, word.end, earliest, latest)


def _within_bounds(shift: float, time: float, earliest: float, latest: float) -> float:
    if shift < 0:
        return max(shift, min(0.0, earliest - time) / 2)
    return min(shift, max(0.0, latest - time) / 2)


def trim_pauses(words: Sequence[Timing], levels: Sequence[float], offset: float) -> None:
    """Let words begin after a pause and end before one, unless they are soft throughout.

    Args:
        levels: of the window's frames, in dB.
        offset: where the window begins, in seconds.
    """
    bound = max(levels, default=0.0) - QUIET
    for word in words:
        first = round((word.start - offset) * FRAMES_PER_SECOND)
        after = min(round((word.end - offset) * FRAMES_PER_SECOND), len(levels))
        loud = [frame for frame in range(max(first, 0), after) if levels[frame] > bound]
        if not loud:
            continue
        if loud[0] - first >= SHORTEST_PAUSE:
            word.start = offset + loud[0] / FRAMES_PER_SECOND
        if after - 1 - loud[-1] >= SHORTEST_PAUSE:
            word.end = offset + (loud[-1] + 1) / FRAMES_PER_SECOND


def _shorten_after_pause(words: Sequence[Timing], usual: float, last_speech: float) -> None:
    """Cut the first and the second word after a pause to twice the usual duration."""
    longest, first = 2 * usual, words[0]
    if first.end - last_speech <= 4 * usual:
        return
    second = words[1] if len(words) > 1 else None
    both_too_long = second is not None and second.end - first.start > 2 * longest
    if first.seconds <= longest and not both_too_long:
        return
    if second is not None and second.seconds > longest:
        boundary = max(second.end / 2, second.end - longest)
        first.end = second.start = boundary
    first.start = max(0.0, first.end - longest)
