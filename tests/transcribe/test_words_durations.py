"""The rules that shorten words beside pauses, and punctuation that joins its word."""

from __future__ import annotations

import pytest

from whisper_flash_attention.transcribe.words import (
    SegmentTimes,
    Timing,
    deal_out,
    fit_to_segment,
    join_punctuation,
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
