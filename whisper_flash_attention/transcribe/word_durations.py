"""Times of words within segments: punctuation joins its word, and words that are too long shrink.

The rules and their order are those of OpenAI's `whisper/timing.py` (`add_word_timestamps`), so that
the times agree. Alignment alone has a word reach over the pause beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

SENTENCE_ENDS = ".。!！?？"  # noqa: RUF001
BEFORE_A_WORD = "\"'“¿([{-"
AFTER_A_WORD = "\"'.。,，!！?？:：”)]}、"  # noqa: RUF001
# The most that the usual word may last, in seconds; no word should last twice the usual.
LONGEST_USUAL = 0.7
# A segment's own timestamp is believed where a word goes beyond it by so many seconds.
TOLERANCE = 0.5


@dataclass(slots=True)
class Timing:
    """A word on its way to its times.

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
    """A segment on its way to its words: seconds of the recording, and how many text tokens."""

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


def join_punctuation(words: Sequence[Timing]) -> None:
    """Let punctuation join its word's text and tokens; the word's times and probability stay."""
    following = len(words) - 1
    for index in range(len(words) - 2, -1, -1):
        mark, word = words[index], words[following]
        if mark.text.startswith(" ") and mark.text.strip() in BEFORE_A_WORD:
            word.text, word.count = mark.text + word.text, mark.count + word.count
            mark.text, mark.count = "", 0
        else:
            following = index
    previous = 0
    for index in range(1, len(words)):
        word, mark = words[previous], words[index]
        if not word.text.endswith(" ") and mark.text in AFTER_A_WORD:
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
