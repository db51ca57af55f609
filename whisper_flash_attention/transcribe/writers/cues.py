"""What subtitles show and when: segments cut into cues and lines.

A segment's text is a row of fragments between which a line may end. Where its words have times and
spell its text, a fragment is a word. Otherwise fragments are what blanks separate (and characters
of scripts that have none), and share the segment's time in proportion to their characters.

Whatever the times of segments and words, a cue ends after it starts, and cues of segments that do
not overlap do not overlap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import chain, pairwise
from unicodedata import category

from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.results import Segment

# Kana, ideographs and their punctuation; Hangul is written with blanks.
_UNSPACED = re.compile(
    r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9d\U00020000-\U0003ffff]"
)
_SMALL_KANA = frozenset("ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ")
# Kinds of characters: closing and other punctuation, marks, signs that prolong or repeat; opening.
_NOT_FIRST = frozenset({"Pe", "Pf", "Po", "Mn", "Mc", "Lm"})
_NOT_LAST = frozenset({"Ps", "Pi"})


@dataclass(frozen=True, slots=True)
class Cue:
    """What is shown at a time.

    Args:
        start, end: milliseconds from the beginning of the recording, the end after the start.
        lines: of text, at least one and none of them blank.
        spoken: line, first character and end of the word that is spoken; None if it is not shown.
    """

    start: int
    end: int
    lines: tuple[str, ...]
    spoken: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Fragment:
    """Text in front of which a line may begin; times in milliseconds."""

    text: str
    blank: bool  # whether there is one in front of it, where it does not begin a line
    start: int
    end: int


_Lines = list[list[_Fragment]]


@dataclass(slots=True)
class _Run:
    """Pieces that may share cues, of one segment or several; times in seconds."""

    start: float
    end: float
    fragments: list[_Fragment]
    timed: bool  # by words
    label: str  # in front of every cue


def build_cues(segments: Iterable[Segment], options: SubtitleOptions) -> Iterator[Cue]:
    """Yield cues in order of time; a segment without text gives none.

    Words are held within their segment's times. Words that do not spell their segment's text are
    passed over in favour of the text.
    """
    running: list[tuple[float, int]] = []  # a heap of runs: their end, and their last cue's
    free = 0  # the end of all cues whose runs are over
    for run in _runs(segments, options):
        while running and running[0][0] <= run.start:
            free = max(free, heappop(running)[1])
        last = free
        for cue, lines in _timed(list(_laid_out(run, options)), free):
            shown = _highlighted(cue, lines) if run.timed and options.highlight_words else [cue]
            yield from (_labelled(each, run.label) for each in shown)
            last = cue.end
        heappush(running, (run.end, last))


def one_line(text: str) -> str:
    """Text without line breaks, which would end a cue or a row, and with single blanks.

    Other control characters, which a model can produce byte by byte, are shown as escapes.
    """
    return printable(" ".join(text.split()), is_speech=True)


def label_of(segment: Segment) -> str:
    """What stands in front of a segment's text: its channel, if it has one."""
    return "" if segment.channel is None else f"[channel {segment.channel}] "


def _labelled(cue: Cue, label: str) -> Cue:
    if not label:
        return cue
    spoken = cue.spoken
    if spoken is not None and spoken[0] == 0:
        spoken = (0, spoken[1] + len(label), spoken[2] + len(label))
    return replace(cue, lines=(label + cue.lines[0], *cue.lines[1:]), spoken=spoken)


def _runs(segments: Iterable[Segment], options: SubtitleOptions) -> list[_Run]:
    """One run per segment; one of several where cues are filled up to a number of lines."""
    runs: list[_Run] = []
    for segment in sorted(segments, key=lambda segment: segment.start):
        text = one_line(segment.text)
        spoken = _words(segment, text)
        fragments = spoken or _shares(segment, text)
        if not fragments:
            continue
        label = label_of(segment)
        fills = options.max_line_count is not None and bool(spoken) and bool(runs)
        if fills and _may_go_on(runs[-1], segment, label):
            blank = _is_spaced(runs[-1].fragments[-1].text[-1], text[0])
            runs[-1].fragments += [replace(fragments[0], blank=blank), *fragments[1:]]
            runs[-1].end = segment.end
        else:
            runs.append(_Run(segment.start, segment.end, fragments, bool(spoken), label))
    return runs


def _may_go_on(run: _Run, segment: Segment, label: str) -> bool:
    """Whether a segment with words may share cues with those before it."""
    return run.timed and run.end <= segment.start and run.label == label


def _words(segment: Segment, text: str) -> list[_Fragment]:
    """A segment's words as fragments; none if they do not spell its text."""
    fragments: list[_Fragment] = []
    at, reached, last = 0, _milliseconds(segment.start), _milliseconds(segment.end)
    for word in segment.words:
        spelled = one_line(word.text)
        blank = text.startswith(" ", at)
        at += blank
        if not text.startswith(spelled, at):
            return []
        at += len(spelled)
        start = min(max(_milliseconds(word.start), reached), last)
        reached = min(max(_milliseconds(word.end), start), last)
        if spelled:
            fragments.append(_Fragment(spelled, blank, start, reached))
    return fragments if at == len(text) else []


def _shares(segment: Segment, text: str) -> list[_Fragment]:
    """A text's fragments, each with its share of the segment's time."""
    start, end = _milliseconds(segment.start), _milliseconds(segment.end)
    begins = [at for at in range(len(text)) if _may_begin(text, at)]
    return [
        _Fragment(
            text[at:following].rstrip(),
            blank=text[at - 1 : at] == " ",
            start=start + (end - start) * at // len(text),
            end=start + (end - start) * following // len(text),
        )
        for at, following in pairwise([*begins, len(text)])
    ]


def _may_begin(text: str, at: int) -> bool:
    """Whether a line may begin at this character."""
    if at == 0 or text[at] == " " or text[at - 1] == " ":
        return text[at] != " "
    if _is_spaced(text[at - 1], text[at]) or text[at] in _SMALL_KANA:
        return False
    return category(text[at]) not in _NOT_FIRST and category(text[at - 1]) not in _NOT_LAST


def _is_spaced(before: str, after: str) -> bool:
    """Whether a blank belongs between the words that these two characters end and begin."""
    return not (_UNSPACED.match(before) and _UNSPACED.match(after))


def _laid_out(run: _Run, options: SubtitleOptions) -> Iterator[_Lines]:
    """Fill lines with fragments, and cues with lines."""
    cue: _Lines = []
    width = 0
    for fragment in run.fragments:
        if cue and run.timed and _is_pause(cue[-1][-1], fragment, options.max_gap):
            yield cue
            cue = []
        width += fragment.blank + len(fragment.text)
        if cue and (options.max_line_width is None or width <= options.max_line_width):
            cue[-1].append(fragment)
            continue
        if len(cue) == options.max_line_count:
            yield cue
            cue = []
        width = len(fragment.text) + (0 if cue else len(run.label))
        cue.append([fragment])
    yield cue


def _is_pause(before: _Fragment, after: _Fragment, max_gap: float | None) -> bool:
    return max_gap is not None and after.start - before.end > max_gap * 1000


def _timed(cues: Sequence[_Lines], free: int) -> Iterator[tuple[Cue, _Lines]]:
    """Give cues their times, from `free` on."""
    for lines, following in pairwise(chain(cues, [None])):
        assert lines is not None
        start, end = max(lines[0][0].start, free), lines[-1][-1].end
        if following is not None:
            end = min(end, following[0][0].start)
        free = max(end, start + 1)
        yield Cue(start, free, tuple(map(_joined, lines))), lines


def _joined(line: Sequence[_Fragment]) -> str:
    return line[0].text + "".join(" " * fragment.blank + fragment.text for fragment in line[1:])


def _highlighted(cue: Cue, lines: _Lines) -> Iterator[Cue]:
    """A cue for each word, and for each pause between them, as openai-whisper writes them.

    A word for which no millisecond is left has none.
    """
    reached = cue.start
    for number, line in enumerate(lines):
        for place, fragment in enumerate(line):
            start = max(fragment.start, reached)
            end = min(max(fragment.end, start + 1), cue.end)
            if start >= end:
                continue
            if start > reached:
                yield replace(cue, start=reached, end=start)
            last = len(_joined(line[: place + 1]))
            spoken = (number, last - len(fragment.text), last)
            yield replace(cue, start=start, end=end, spoken=spoken)
            reached = end
    if reached < cue.end:
        yield replace(cue, start=reached)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
