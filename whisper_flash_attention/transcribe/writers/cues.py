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
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import accumulate, chain, pairwise
from unicodedata import category

from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.results import Segment

# Kana, ideographs and their punctuation; Hangul is written with blanks.
_UNSPACED = re.compile(
    r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9d\U00020000-\U0003ffff]"
)
# Thai, Lao, Burmese and Khmer, whose words have no blanks between them. A line ends between
# syllables there at best; where words begin, only a dictionary knows.
_SYLLABIC = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\uaa60-\uaa7f\u1780-\u17ff\ua9e0-\ua9ff]")
# Vowels that are written after their consonant and belong to it, signs that repeat or shorten.
_AFTER_A_CONSONANT = frozenset(
    "\u0e2f\u0e30\u0e32\u0e33\u0e45\u0e46\u0eaf\u0eb0\u0eb2\u0eb3\u0ebd\u0ec6"
)
# Vowels that are written before their consonant; and what stacks the next consonant.
_BEFORE_A_CONSONANT = frozenset(
    "\u0e40\u0e41\u0e42\u0e43\u0e44\u0ec0\u0ec1\u0ec2\u0ec3\u0ec4\u1039\u17d2"
)
_BURMESE_KILLER = "\u103a"  # above a consonant that ends a syllable
_SMALL_KANA = frozenset("ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ")
# Kinds of characters: closing and other punctuation, marks, signs that prolong or repeat; opening.
_NOT_FIRST = frozenset({"Pe", "Pf", "Po", "Mn", "Mc", "Lm"})
_NOT_LAST = frozenset({"Ps", "Pi"})

# Where cues are cut at best, and second best: after what ends a sentence, or a clause.
_SENTENCE_END = re.compile(
    r"[.!?\u2026\u3002\uff01\uff1f\u061f\u06d4\u0964\u104b\u17d4]['\"\u2019\u201d)\]\u300d]*$"
)
_CLAUSE_END = re.compile(
    r"[,;:\u3001\uff0c\uff1b\uff1a\u060c\u061b\u104a\u2013\u2014]['\"\u2019\u201d)\]\u300d]*$"
)
# Shares of what fits into a cue that must be before such a cut; an orphan is a last cue that has
# less than the third.
_SENTENCE_SHARE, _CLAUSE_SHARE, _ORPHAN_SHARE = 0.4, 0.6, 0.2


@dataclass(frozen=True, slots=True)
class Cue:
    """What is shown at a time.

    Args:
        start, end: milliseconds from the beginning of the recording, the end after the start.
        lines: of text, at least one and none of them blank.
        spoken: line, first character and end of the word that is spoken; None if it is not shown.
        words: of a cue whose words have times: for each its line, first character and end there,
            its start and end in milliseconds.
    """

    start: int
    end: int
    lines: tuple[str, ...]
    spoken: tuple[int, int, int] | None = None
    words: tuple[tuple[int, int, int, int, int], ...] = field(default=(), compare=False)


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
            if run.timed:
                cue = replace(cue, words=tuple(_places(lines)))
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
    by = len(label)
    words = tuple(
        (line, first + by * (line == 0), end + by * (line == 0), begin, over)
        for line, first, end, begin, over in cue.words
    )
    return replace(cue, lines=(label + cue.lines[0], *cue.lines[1:]), spoken=spoken, words=words)


def _runs(segments: Iterable[Segment], options: SubtitleOptions) -> list[_Run]:
    """One run per segment; one of several where cues are filled up to a number of lines."""
    runs: list[_Run] = []
    for segment in sorted(segments, key=lambda segment: segment.start):
        text = one_line(segment.text)
        spoken = _words(segment, text)
        if options.max_line_width is not None:
            width = options.max_line_width
            spoken = [part for each in spoken for part in _parts(each, width)]
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


def _parts(word: _Fragment, width: int) -> list[_Fragment]:
    """A word of Thai and the like, cut between syllables if it is longer than a line.

    Whisper takes what is between two blanks for a word of some of these scripts.
    """
    if len(word.text) <= width or not _SYLLABIC.search(word.text):
        return [word]
    begins = [at for at in range(len(word.text)) if _may_begin(word.text, at)]
    took, count = word.end - word.start, len(word.text)
    return [
        _Fragment(
            word.text[at:following],
            blank=word.blank and at == 0,
            start=word.start + took * at // count,
            end=word.start + took * following // count,
        )
        for at, following in pairwise([*begins, count])
    ]


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
    if _SYLLABIC.match(text[at - 1]) and _SYLLABIC.match(text[at]):
        return _begins_a_syllable(text, at)
    if _is_spaced(text[at - 1], text[at]) or text[at] in _SMALL_KANA:
        return False
    return category(text[at]) not in _NOT_FIRST and category(text[at - 1]) not in _NOT_LAST


def _begins_a_syllable(text: str, at: int) -> bool:
    """Whether a character of Thai, Lao, Burmese or Khmer may stand at the beginning of a line."""
    if text[at] in _AFTER_A_CONSONANT or category(text[at]) in _NOT_FIRST:
        return False
    if text[at - 1] in _BEFORE_A_CONSONANT:
        return False
    return _BURMESE_KILLER not in text[at + 1 : at + 3]


def _is_spaced(before: str, after: str) -> bool:
    """Whether a blank belongs between the words that these two characters end and begin."""
    return not (_UNSPACED.match(before) and _UNSPACED.match(after))


def _laid_out(run: _Run, options: SubtitleOptions) -> Iterator[_Lines]:
    """Fill lines with fragments, and cues with lines."""
    for stretch in _stretches(run, options):
        first = 0
        while first < len(stretch):
            rest = stretch[first:]
            full = _filled(rest, run, options)
            count = sum(map(len, full))
            cut = _best_cut(rest, count) if count < len(rest) else count
            yield full if cut == count else _filled(rest[:cut], run, options)
            first += cut


def _stretches(run: _Run, options: SubtitleOptions) -> Iterator[list[_Fragment]]:
    """Fragments that may share a cue: without a pause, and of a limited number."""
    stretch: list[_Fragment] = []
    for fragment in run.fragments:
        is_full = run.timed and len(stretch) == options.max_words_per_line
        if stretch and run.timed:
            is_full = is_full or _is_pause(stretch[-1], fragment, options.max_gap)
        if is_full:
            yield stretch
            stretch = []
        stretch.append(fragment)
    yield stretch


def _filled(fragments: Sequence[_Fragment], run: _Run, options: SubtitleOptions) -> _Lines:
    """The lines of one cue, with as many of the fragments as it has room for."""
    cue: _Lines = []
    width = 0
    for fragment in fragments:
        width += fragment.blank + len(fragment.text)
        if cue and (options.max_line_width is None or width <= options.max_line_width):
            cue[-1].append(fragment)
            continue
        if len(cue) == options.max_line_count:
            break
        width = len(fragment.text) + (0 if cue else len(run.label))
        cue.append([fragment])
    return cue


def _best_cut(fragments: Sequence[_Fragment], count: int) -> int:
    """How many of the `count` fragments that fit into a cue it takes, where more follow.

    As many as end a sentence, or a clause, if that leaves the cue well filled; all of them
    otherwise, or half of the rest if next to nothing would follow.
    """
    ends = list(accumulate(each.blank + len(each.text) for each in fragments))
    full, whole = ends[count - 1], ends[-1]
    for pattern, share in ((_SENTENCE_END, _SENTENCE_SHARE), (_CLAUSE_END, _CLAUSE_SHARE)):
        for taken in range(count, 0, -1):
            if ends[taken - 1] < share * full:
                break
            is_orphan = whole - ends[taken - 1] < _ORPHAN_SHARE * full
            if pattern.search(fragments[taken - 1].text) and not is_orphan:
                return taken
    if whole - full < _ORPHAN_SHARE * full:
        return min(range(1, count + 1), key=lambda taken: abs(2 * ends[taken - 1] - whole))
    return count


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


def _places(lines: _Lines) -> Iterator[tuple[int, int, int, int, int]]:
    """Where each fragment is in its line, and when."""
    for number, line in enumerate(lines):
        for place, fragment in enumerate(line):
            last = len(_joined(line[: place + 1]))
            yield number, last - len(fragment.text), last, fragment.start, fragment.end


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
