from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe import Segment, SubtitleOptions, Word
from whisper_flash_attention.transcribe.writers.cues import Cue, build_cues

# "One two three." from 0 to 2 s and "Four." from 2.5 to 3 s, in the words' own times.
FIRST = Segment(
    0.0,
    2.0,
    "One two three.",
    words=(
        Word(0.1, 0.4, "One", 0.9),
        Word(0.5, 0.8, "two", 0.9),
        Word(1.0, 1.9, "three.", 0.9),
    ),
)
SECOND = Segment(2.5, 3.0, "Four.", words=(Word(2.6, 2.9, "Four.", 0.9),))


def cues(*segments: Segment, **options: object) -> list[tuple[int, int, tuple[str, ...]]]:
    built = build_cues(segments, SubtitleOptions(**options))  # type: ignore[arg-type]
    return [(cue.start, cue.end, cue.lines) for cue in built]


def test_a_segment_is_a_cue_with_the_words_times() -> None:
    assert cues(FIRST, SECOND) == [
        (100, 1900, ("One two three.",)),
        (2600, 2900, ("Four.",)),
    ]


def test_lines_end_between_words() -> None:
    assert cues(FIRST, SECOND, max_line_width=7) == [
        (100, 1900, ("One two", "three.")),
        (2600, 2900, ("Four.",)),
    ]


def test_with_both_limits_cues_are_filled_across_segments() -> None:
    limits = {"max_line_width": 12, "max_line_count": 1}
    assert cues(FIRST, SECOND, **limits) == [
        (100, 800, ("One two",)),
        (1000, 2900, ("three. Four.",)),
    ]
    assert cues(FIRST, SECOND, max_line_width=12, max_line_count=2) == [
        (100, 2900, ("One two", "three. Four.")),
    ]


def test_a_long_silence_begins_a_cue() -> None:
    limits = {"max_line_width": 100, "max_line_count": 2}
    assert cues(FIRST, SECOND, **limits, max_gap=0.7) == [(100, 2900, ("One two three. Four.",))]
    assert cues(FIRST, SECOND, **limits, max_gap=0.69) == cues(FIRST, SECOND)
    assert cues(FIRST, max_gap=0.15) == [(100, 800, ("One two",)), (1000, 1900, ("three.",))]
    later = Segment(20.0, 21.0, "Four.", words=(Word(20.0, 21.0, "Four.", 0.9),))
    assert len(cues(FIRST, later, **limits)) == 2
    assert len(cues(FIRST, later, **limits, max_gap=None)) == 1


def test_without_words_a_cue_is_split_in_proportion_to_characters() -> None:
    segment = Segment(10.0, 12.0, "aaaa bbbb cccc ddddd")  # 20 characters, 100 ms each
    assert cues(segment, max_line_width=9) == [(10_000, 12_000, ("aaaa bbbb", "cccc", "ddddd"))]
    assert cues(segment, max_line_width=9, max_line_count=2) == [
        (10_000, 11_500, ("aaaa bbbb", "cccc")),
        (11_500, 12_000, ("ddddd",)),
    ]


def test_segments_without_words_keep_to_themselves() -> None:
    limits = {"max_line_width": 40, "max_line_count": 2}
    assert cues(Segment(0, 1, "One."), Segment(1, 2, "Two."), **limits) == [
        (0, 1000, ("One.",)),
        (1000, 2000, ("Two.",)),
    ]


def test_scripts_without_blanks_end_lines_between_characters() -> None:
    assert cues(Segment(0, 1, "今日は、良い天気。"), max_line_width=3) == [
        (0, 1000, ("今日", "は、良", "い天", "気。")),
    ]
    [(_, _, [line])] = cues(Segment(0, 1, "모든 인간은"), max_line_width=6)
    assert line == "모든 인간은"


def test_words_of_scripts_without_blanks_are_joined_without() -> None:
    first = Segment(0, 1, "今日", words=(Word(0, 0.5, "今", 1), Word(0.5, 1, "日", 1)))
    second = Segment(1, 2, "は。", words=(Word(1, 2, "は。", 1),))
    assert cues(first, second, max_line_width=10, max_line_count=1) == [(0, 2000, ("今日は。",))]


def test_a_longer_word_has_a_line_of_its_own() -> None:
    assert cues(Segment(0, 1, "a incomprehensible b"), max_line_width=5) == [
        (0, 1000, ("a", "incomprehensible", "b")),
    ]


def test_words_that_do_not_spell_the_text_give_way_to_it() -> None:
    for words in ((Word(0.5, 1, "else", 1),), (Word(0.5, 1, "some", 1),)):
        assert cues(Segment(0, 1, "something", words=words)) == [(0, 1000, ("something",))]


def test_blank_text_gives_no_cue() -> None:
    assert cues(Segment(0, 1, " \n "), Segment(1, 2, "", words=(Word(1, 2, " ", 1),))) == []


def test_each_word_is_shown_as_it_is_spoken() -> None:
    built = list(build_cues([FIRST], SubtitleOptions(max_line_width=7, highlight_words=True)))
    lines = ("One two", "three.")
    assert built == [
        Cue(100, 400, lines, (0, 0, 3)),
        Cue(400, 500, lines),
        Cue(500, 800, lines, (0, 4, 7)),
        Cue(800, 1000, lines),
        Cue(1000, 1900, lines, (1, 0, 6)),
    ]


def test_nothing_is_highlighted_without_words() -> None:
    assert cues(Segment(0, 1, "One two"), highlight_words=True) == [(0, 1000, ("One two",))]


def test_cues_of_segments_that_do_overlap_keep_their_times() -> None:
    assert cues(Segment(0, 10, "one"), Segment(2, 3, "two"), Segment(10, 10, "three")) == [
        (0, 10_000, ("one",)),
        (2000, 3000, ("two",)),
        (10_000, 10_001, ("three",)),
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_line_width": "42"}, "max_line_width is '42': give a whole number"),
        ({"max_gap": [3.0]}, "max_gap is .*: give seconds"),
        ({"highlight_words": 1}, "highlight_words is 1: give True or False"),
        ({"max_line_width": 0}, "max_line_width is 0: give a whole number"),
        ({"max_line_width": 9, "max_line_count": 0}, "max_line_count is 0: give a whole number"),
        ({"max_line_count": 2}, "max_line_count has no effect without max_line_width"),
        ({"max_gap": -1.0}, "max_gap is -1.0: give seconds, 0 or more"),
        ({"max_gap": float("nan")}, "max_gap is nan"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        SubtitleOptions(**options)  # type: ignore[arg-type]


@st.composite
def spoken(draw: st.DrawFn) -> list[Segment]:
    """Segments that do not overlap, some of them with words, whose times may be anything."""
    segments, start = [], 0.0
    for _ in range(draw(st.integers(0, 5))):
        start += draw(st.sampled_from([0.0, 0.0004, 0.3, 5.0]))
        end = start + draw(st.sampled_from([0.0, 0.0004, 0.01, 2.0, 9.0]))
        texts = draw(st.lists(st.text("ab-.日、é", min_size=1, max_size=8), max_size=8))
        times = draw(st.lists(st.floats(0, 30), min_size=2 * len(texts), max_size=2 * len(texts)))
        if draw(st.booleans()):
            times = sorted(start + (end - start) * time / 30 for time in times)
        words = tuple(
            Word(min(pair), max(pair), text, 0.5)
            for text, pair in zip(texts, zip(times[::2], times[1::2], strict=True), strict=True)
        )
        text = draw(st.sampled_from(["", " "])).join(texts)
        segments.append(Segment(start, end, text, words=words if draw(st.booleans()) else ()))
        start = end
    return segments


options = st.builds(
    lambda width, count, gap, highlight: SubtitleOptions(
        width, count if width else None, gap, highlight
    ),
    st.none() | st.integers(1, 20),
    st.none() | st.integers(1, 3),
    st.none() | st.floats(0, 5),
    st.booleans(),
)


@given(spoken(), options)
def test_cues_are_in_order_and_never_overlap(
    segments: list[Segment], options: SubtitleOptions
) -> None:
    built = list(build_cues(segments, options))
    assert all(cue.start < cue.end for cue in built)
    assert all(before.end <= after.start for before, after in pairwise(built))


@given(spoken(), options)
def test_all_text_is_shown_and_no_more(segments: list[Segment], options: SubtitleOptions) -> None:
    plain = SubtitleOptions(options.max_line_width, options.max_line_count, options.max_gap)
    shown = "".join("".join(cue.lines) for cue in build_cues(segments, plain))
    assert shown.replace(" ", "") == "".join(segment.text for segment in segments).replace(" ", "")
    highlighted = SubtitleOptions(
        options.max_line_width, options.max_line_count, options.max_gap, highlight_words=True
    )
    texts = [cue.lines for cue in build_cues(segments, highlighted)]
    kept = [lines for lines, after in pairwise([*texts, None]) if lines != after]
    wanted = [cue.lines for cue in build_cues(segments, plain)]
    assert kept == [lines for lines, after in pairwise([*wanted, None]) if lines != after]


@given(spoken(), options)
def test_lines_and_cues_hold_their_limits(
    segments: list[Segment], options: SubtitleOptions
) -> None:
    for cue in build_cues(segments, options):
        assert cue.lines
        assert options.max_line_count is None or len(cue.lines) <= options.max_line_count
        for line in cue.lines:
            assert line.strip() == line != ""
            fits = options.max_line_width is None or len(line) <= options.max_line_width
            assert fits or " " not in line


@given(spoken(), options)
def test_what_is_highlighted_is_a_word(segments: list[Segment], options: SubtitleOptions) -> None:
    words = {word.text for segment in segments for word in segment.words}
    for cue in build_cues(segments, options):
        if cue.spoken is not None:
            assert options.highlight_words
            line, first, end = cue.spoken
            assert cue.lines[line][first:end] in words


@pytest.mark.parametrize(
    "text",
    [
        "สวัสดีครับวันนี้อากาศดีมากและเราจะไปเที่ยวที่ทะเลด้วยกัน",
        "ສະບາຍດີມື້ນີ້ອາກາດດີຫຼາຍແລະພວກເຮົາຈະໄປທ່ຽວນຳກັນ",
        "မင်္ဂလာပါဒီနေ့ရာသီဥတုအရမ်းကောင်းပါတယ်ခင်ဗျာ",
        "សួស្តីថ្ងៃនេះអាកាសធាតុល្អណាស់ហើយយើងនឹងទៅលេងជាមួយគ្នា",
    ],
)
@pytest.mark.parametrize("spoken", [False, True])
def test_scripts_without_blanks_between_words_keep_the_line_width(text: str, spoken: bool) -> None:
    words = (Word(0, 4, text, 1.0),) if spoken else ()
    [(start, end, lines)] = cues(Segment(0, 4, text, words=words), max_line_width=12)
    assert (start, end) == (0, 4000)
    assert "".join(lines) == text
    assert all(len(line) <= 12 for line in lines)
    for line in lines[1:]:
        assert unicodedata.category(line[0]) not in ("Mn", "Mc")
        assert line[0] not in "\u0e32\u0e33\u0e30\u0eb2\u0eb3\u0eb0"
    for line in lines[:-1]:
        # Neither a vowel that is written before its consonant, nor what stacks the next one.
        assert (
            line[-1]
            not in "\u0e40\u0e41\u0e42\u0e43\u0e44\u0ec0\u0ec1\u0ec2\u0ec3\u0ec4\u17d2\u1039"
        )


def japanese(text: str) -> Segment:
    words = tuple(Word(0.2 * at, 0.2 * at + 0.2, each, 1) for at, each in enumerate(text))
    return Segment(0, 0.2 * len(text), text, words=words)


@pytest.mark.parametrize("spoken", [False, True])
def test_no_cue_is_an_orphan(spoken: bool) -> None:
    segment = japanese("昨日は友達と公園へ行きました。")
    if not spoken:
        segment = Segment(segment.start, segment.end, segment.text)
    found = cues(segment, max_line_width=13, max_line_count=1)
    assert "".join(line for _, _, lines in found for line in lines) == segment.text
    assert len(found) == 2
    assert all(len(lines[0]) >= 6 and end - start >= 1000 for start, end, lines in found)


def spoken_segment(text: str) -> Segment:
    each = [f" {word}" for word in text.split(" ")]
    words = tuple(Word(at, at + 1, word, 1) for at, word in enumerate(each))
    return Segment(0, len(each), text, words=words)


def test_cues_end_with_sentences_and_clauses_where_there_is_a_choice() -> None:
    limits = {"max_line_width": 30, "max_line_count": 1}
    text = "We had a long day. Nobody slept well that night, but all were glad."
    for segment in (spoken_segment(text), Segment(0, 10, text)):
        assert [lines for _, _, lines in cues(segment, **limits)] == [
            ("We had a long day.",),
            ("Nobody slept well that night,",),
            ("but all were glad.",),
        ]


def test_a_cue_ends_with_its_last_word() -> None:
    words = (Word(0.0, 0.5, " One", 1), Word(0.6, 1.0, " two.", 1))
    assert cues(Segment(0, 9, "One two.", words=words)) == [(0, 1000, ("One two.",))]


def test_cues_have_a_limited_number_of_words() -> None:
    found = cues(spoken_segment("one two three four five"), max_words_per_line=2)
    assert found == [
        (0, 2000, ("one two",)),
        (2000, 4000, ("three four",)),
        (4000, 5000, ("five",)),
    ]
    with pytest.raises(OptionError, match="max_words_per_line or max_line_width, not both"):
        SubtitleOptions(max_words_per_line=2, max_line_width=20)
