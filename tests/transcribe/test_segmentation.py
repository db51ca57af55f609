"""Decoding results split into token spans at their timestamps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.transcribe.segmentation import TokenSpan, split_at_timestamps
from whisper_flash_attention.transcribe.tokenizer import Vocabulary

WORDS = Vocabulary(
    start=50258,
    end=50257,
    no_timestamps=50363,
    languages={"en": 50259, "de": 50261},
    tasks={"transcribe": 50359, "translate": 50358},
    suppressed=(),
    at_begin=(),
    positions=448,
)
A, B, C = 11, 12, 13


def at(seconds: float) -> int:
    return WORDS.timestamp_begin + round(seconds / 0.02)


def test_pairs_of_timestamps_part_segments_and_the_rest_is_read_again() -> None:
    tokens = [at(0), A, at(2), at(2), B, at(4.5), at(5), C]
    spans, advance = split_at_timestamps(tokens, 3000, WORDS)
    assert spans == [
        TokenSpan(0.0, 2.0, (at(0), A, at(2))),
        TokenSpan(2.0, 4.5, (at(2), B, at(4.5))),
    ]
    assert advance == 450


def test_a_lone_timestamp_at_the_end_ends_the_window() -> None:
    spans, advance = split_at_timestamps([at(0), A, at(2), at(2), B, at(4.5)], 3000, WORDS)
    assert [(span.start, span.end) for span in spans] == [(0.0, 2.0), (2.0, 4.5)]
    assert advance == 3000


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        ([at(0), A, B, at(7.5)], 7.5),  # as its last timestamp says
        ([at(0), A, B], 12.0),  # to the end of the window
        ([A, B], 12.0),
        ([], 12.0),
    ],
)
def test_without_pairs_a_window_is_one_segment(tokens: list[int], end: float) -> None:
    assert split_at_timestamps(tokens, 1200, WORDS) == ([TokenSpan(0.0, end, tuple(tokens))], 1200)


@given(
    st.lists(st.sampled_from([A, B, C]) | st.integers(0, 1500).map(lambda n: at(n * 0.02))),
    st.integers(1, 3000),
)
def test_no_token_is_lost_but_those_that_are_read_again(tokens: list[int], frames: int) -> None:
    spans, advance = split_at_timestamps(tokens, frames, WORDS)
    kept = [token for span in spans for token in span.tokens]
    assert kept == tokens[: len(kept)]
    assert advance == frames or len(kept) < len(tokens) or tokens[-1] >= WORDS.timestamp_begin
    assert 0 <= advance <= max(frames, 3000)


def test_prompts_hold_the_context_as_far_as_there_is_room() -> None:
    assert WORDS.prompt("de", "translate") == [50258, 50261, 50358]
    before = list(range(300))
    prompt = WORDS.prompt("en", "transcribe", before)
    assert prompt == [WORDS.previous, *range(77, 300), 50258, 50259, 50359]
    assert WORDS.previous == 50361 and WORDS.no_speech == 50362
