"""The rules that shorten and shift words, and punctuation that joins its word."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.transcribe.word_rules import (
    LEAST_WORDS,
    MOST_SHIFT,
    SegmentTimes,
    Timing,
    best_shift,
    deal_out,
    fit_to_levels,
    fit_to_segment,
    join_punctuation,
    shift_words,
    shorten_beside_sentence_ends,
    trim_pauses,
    usual_duration,
)


def words(*rows: tuple[str, float, float]) -> list[Timing]:
    return [Timing(text, 1, start, end, 0.5) for text, start, end in rows]


def times(some: list[Timing]) -> list[tuple[float, float]]:
    return [(word.start, word.end) for word in some]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([], 0.0), ([0.0, 0.0], 0.0), ([0.0, 0.2, 0.4], 0.3), ([0.1, 0.2, 9.0], 0.2), ([3.0], 0.7)],
)
def test_the_usual_duration_is_a_bounded_median(seconds: list[float], expected: float) -> None:
    found = usual_duration(words(*((" a", 0.0, each) for each in seconds)))
    assert found == pytest.approx(expected)


def test_sentence_ends_and_words_after_them_are_shortened() -> None:
    some = words((" so", 0, 3), (".", 3, 5), (" Then", 5, 8), (" long", 8, 11), ("?", 11, 11.2))
    shorten_beside_sentence_ends(some, 0.5)
    # Neither the first word nor one amid a sentence changes.
    assert times(some) == [(0, 3), (3, 4), (7, 8), (8, 11), (11, 11.2)]


def test_words_begin_and_end_where_there_is_sound() -> None:
    levels = [-80.0] * 50 + [-10.0] * 20 + [-60.0] * 9 + [-12.0] * 21 + [-41.0] * 100
    some = words((" a", 10.0, 10.75), (" pause", 10.75, 11.5), (" soft", 11.5, 12.0))
    trim_pauses(some, levels, 10.0)
    # The pauses around 10.75 s are shorter than 0.1 s; the last word has no louder frame.
    assert times(some) == [(10.5, 10.75), (10.75, 11.0), (11.5, 12.0)]
    trim_pauses(some, [], 10.0)
    assert times(some)[0] == (10.5, 10.75)


def read_aloud(count: int, offset: float = 10.0) -> tuple[list[Timing], npt.NDArray[np.float32]]:
    """Words without pauses, 0.25 s and 0.35 s in turn, and levels that dip by 12 dB between them.

    The window begins at `offset`, in seconds; the first word half a second later.
    """
    times = [offset + 0.5]
    for index in range(count):
        times.append(times[-1] + (0.25, 0.35)[index % 2])
    levels = np.full(round((times[-1] - offset + 0.5) * 100), -10.0, np.float32)
    for time in times:
        middle = round((time - offset) * 100)
        levels[middle - 3 : middle + 3] = -22.0
    return words(*((" a", start, end) for start, end in pairwise(times))), levels


@pytest.mark.parametrize("seconds", [-0.06, -0.03, 0.0, 0.02, 0.06])
def test_words_are_shifted_to_where_it_is_soft(seconds: float) -> None:
    some, levels = read_aloud(LEAST_WORDS)
    expected = [pytest.approx(pair, abs=0.011) for pair in times(some)]
    for word in some:
        word.start, word.end = word.start + seconds, word.end + seconds
    assert best_shift(some, levels, 10.0) == pytest.approx(-seconds, abs=0.011)
    shift_words(some, best_shift(some, levels, 10.0), 10.0, 16.0)
    assert times(some) == expected


def test_no_word_is_shifted_further_than_alignment_errs() -> None:
    some, levels = read_aloud(20)
    for word in some:
        word.start, word.end = word.start + 0.09, word.end + 0.09
    assert best_shift(some, levels, 10.0) == -MOST_SHIFT / 100


def test_few_words_and_words_in_even_sound_stay() -> None:
    some, levels = read_aloud(LEAST_WORDS)
    for word in some:
        word.start, word.end = word.start + 0.05, word.end + 0.05
    assert best_shift(some[1:], levels, 10.0) == 0
    assert best_shift(some, np.full(500, -20.0, np.float32), 10.0) == 0
    assert best_shift(some, levels[:0], 10.0) == 0
    # What is so little softer is so by chance.
    assert best_shift(some, levels / 12, 10.0) == 0


def test_shifted_words_stay_within_their_bounds() -> None:
    some = words((" a", 10.0, 10.04), (" b", 10.04, 10.5), (" c", 10.5, 11.0))
    shift_words(some, -0.08, 10.0, 11.0)
    assert times(some) == [
        (10.0, pytest.approx(10.02)),
        (pytest.approx(10.02), pytest.approx(10.42)),
        (pytest.approx(10.42), pytest.approx(10.92)),
    ]
    some = words((" a", 10.0, 10.5), (" b", 10.5, 10.96), (" c", 10.96, 11.0), (" d", 11.0, 11.1))
    shift_words(some, 0.08, 10.0, 11.0)
    assert times(some) == [
        (pytest.approx(10.08), pytest.approx(10.58)),
        (pytest.approx(10.58), pytest.approx(10.98)),
        (pytest.approx(10.98), 11.0),
        (11.0, 11.1),  # where it already was beyond them
    ]


def test_segments_follow_their_words_that_are_shifted_and_trimmed() -> None:
    some, levels = read_aloud(LEAST_WORDS, offset=0.0)
    for word in some:
        word.start, word.end = word.start + 0.05, word.end + 0.05
    # The second segment has no words, and the third ends in a pause.
    some[-1].end += 0.3
    levels = np.concatenate([levels[:-50], np.full(80, -70.0, np.float32)])
    spans = [SegmentTimes(0.5, 1.5, 3), SegmentTimes(1.5, 1.6, 0), SegmentTimes(1.6, 4.0, 7)]
    fit_to_levels(deal_out(some, spans), spans, levels, 0.0, some[-1].end)
    assert some[0].start == pytest.approx(0.5, abs=0.011)
    assert some[-1].end == pytest.approx(3.5, abs=0.031)
    assert [(span.start, span.end) for span in spans] == [
        (some[0].start, some[2].end),
        (1.5, 1.6),
        (some[3].start, some[-1].end),
    ]


@given(
    st.lists(st.integers(0, 120), min_size=2, max_size=60).map(sorted),
    st.lists(st.floats(-80, 0, width=32), min_size=1, max_size=130),
)
def test_order_is_kept_whatever_the_words_and_levels(
    frames: list[int], levels: list[float]
) -> None:
    some = words(*((" a", 5 + a / 100, 5 + b / 100) for a, b in pairwise(frames)))
    before, last = times(some), some[-1].end
    fit_to_levels([some], [SegmentTimes(5.0, last, 60)], np.array(levels, np.float32), 5.0, last)
    found = [time for word in some for time in (round(word.start, 2), round(word.end, 2))]
    assert found == sorted(found)
    assert found[0] >= 5.0
    assert found[-1] <= round(last, 2)
    shift = best_shift(words(*((" a", *pair) for pair in before)), np.array(levels), 5.0)
    assert abs(shift) <= MOST_SHIFT / 100
    assert len(some) >= LEAST_WORDS or shift == 0


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([" Hello", ",", " world", "!"], [" Hello,", "", " world!", ""]),
        ([" said", ' "', "No", ".", '"'], [" said", "", ' "No."', "", ""]),
        ([" (", " [", "x", "]", ")"], ["", "", " ( [x])", "", ""]),
        ([" ill", "-disposed", '."'], [" ill", "-disposed", '."']),
        (["日", "本", "。"], ["日", "本。", ""]),
        (["."], ["."]),
        ([], []),
    ],
)
def test_punctuation_joins_its_word(texts: list[str], expected: list[str]) -> None:
    some = words(*((text, 0.0, 1.0) for text in texts))
    join_punctuation(some)
    assert [word.text for word in some] == expected
    assert sum(word.count for word in some) == len(texts)


def test_a_word_belongs_where_its_first_token_is() -> None:
    some = words((" a", 0, 1), (" b", 1, 2), (" c", 2, 3))
    some[1].count = 2
    dealt = deal_out(
        some,
        [
            SegmentTimes(0, 1, 0),
            SegmentTimes(0, 1, 2),
            SegmentTimes(1, 2, 2),
            SegmentTimes(2, 3, 1),
        ],
    )
    assert [[word.text for word in each] for each in dealt] == [[], [" a", " b"], [" c"], []]


def test_the_first_word_after_a_pause_is_shortened_at_its_start() -> None:
    some, span = words((" so", 1, 5), (" it", 5, 5.3)), SegmentTimes(1, 5.3, 2)
    fit_to_segment(some, span, usual=0.3, last_speech=0.0)
    assert times(some) == [(pytest.approx(4.4), 5), (5, 5.3)]
    assert (span.start, span.end) == (pytest.approx(4.4), 5.3)


def test_the_second_word_after_a_pause_is_shortened_too() -> None:
    some, span = words((" so", 4, 4.1), (" it", 4.1, 6)), SegmentTimes(4, 6, 2)
    fit_to_segment(some, span, usual=0.3, last_speech=0.0)
    assert times(some) == [(pytest.approx(4.8), pytest.approx(5.4)), (pytest.approx(5.4), 6)]


def test_without_a_pause_the_first_word_stays() -> None:
    some, span = words((" so", 1, 2)), SegmentTimes(1, 2, 1)
    fit_to_segment(some, span, usual=0.3, last_speech=0.9)
    assert times(some) == [(1, 2)]


def test_segments_take_the_times_of_their_words() -> None:
    some, span = words((" so", 1.2, 1.5), (" it", 1.5, 1.9)), SegmentTimes(1, 2, 2)
    fit_to_segment(some, span, usual=0.3, last_speech=1.0)
    assert (span.start, span.end) == (1.2, 1.9)


def test_words_far_beyond_their_segment_take_its_times() -> None:
    some, span = words((" so", 1.0, 2.0), (" it", 2.0, 4.0)), SegmentTimes(1.8, 2.6, 2)
    fit_to_segment(some, span, usual=0.4, last_speech=0.9)
    assert times(some) == [(pytest.approx(1.6), 2.0), (2.0, 2.6)]
    assert (span.start, span.end) == (1.8, 2.6)
