"""Which parts of a chunk are read once more."""

from __future__ import annotations

import numpy as np
import pytest

from tests.transcribe.test_segmentation import WORDS, A, B, at
from whisper_flash_attention.audio.vad import Chunk, Speech
from whisper_flash_attention.transcribe.segmentation import (
    Leftovers,
    TokenSpan,
    leftovers,
    split_at_timestamps,
)

TEXT = [A] * 30


def chunk(*speech: tuple[float, float], seconds: float = 20.0) -> Chunk:
    return Chunk(100.0, np.zeros(round(seconds * 16_000), np.float32), Speech(lambda: speech))


def left(whole: Chunk, tokens: list[int], *, uses_vad: bool = True) -> Leftovers:
    spans, _ = split_at_timestamps(tokens, round(whole.seconds * 100), WORDS)
    rest = tokens[sum(len(span.tokens) for span in spans) :]
    if rest:
        spans.append(TokenSpan(WORDS.seconds(rest[0]), whole.seconds, tuple(rest)))
    return leftovers(whole, tokens, spans, WORDS, uses_vad=uses_vad)


def test_a_result_that_ends_where_a_segment_begins_leaves_the_rest() -> None:
    tokens = [at(0), *TEXT, at(17.6), at(17.6)]
    [rest] = left(chunk((100, 120)), tokens).chunks
    assert (rest.start, rest.end) == (pytest.approx(117.6), 120)
    assert rest.speech == ((rest.start, 120),) and not rest.is_doubtful


def test_where_the_detector_finds_no_speech_nothing_is_left() -> None:
    tokens = [at(0), *TEXT, at(17.6), at(17.6)]
    assert left(chunk((100, 117.7)), tokens) == Leftovers()
    assert left(chunk((100, 117.7)), tokens, uses_vad=False).chunks
    assert left(chunk(seconds=17.8), tokens, uses_vad=False) == Leftovers()


def test_speech_after_a_result_that_ends_in_silence_is_doubtful() -> None:
    tokens = [at(0), *TEXT, at(18.9)]
    [rest] = left(chunk((100, 120)), tokens).chunks
    assert rest.start == pytest.approx(118.9) and rest.is_doubtful
    assert left(chunk((100, 119.3)), tokens) == Leftovers()


def test_speech_between_segments_is_doubtful() -> None:
    tokens = [at(0), *TEXT, at(8), at(12), *TEXT, at(20)]
    [gap] = left(chunk((100, 120)), tokens).chunks
    assert (gap.start, gap.end, gap.is_doubtful) == (108, 112, True)
    assert left(chunk((100, 108.8), (111.6, 120)), tokens) == Leftovers()


def test_text_to_the_end_leaves_nothing() -> None:
    assert left(chunk((100, 120)), [at(0), *TEXT, at(9), at(9), *TEXT]) == Leftovers()
    assert left(chunk((100, 120)), TEXT) == Leftovers()


def test_far_too_little_text_is_read_again_in_halves() -> None:
    found = left(chunk((100, 111), (112, 120)), [at(0), A, B, at(20)])
    assert found.is_split
    first, second = found.chunks
    assert (first.start, first.end, second.start, second.end) == (100, 111.5, 111.5, 120)
    assert left(chunk((100, 120)), []).is_split
    assert not left(chunk((100, 105)), [at(0), A, B, at(20)]).is_split
