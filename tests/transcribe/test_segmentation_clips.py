"""Parts of a recording."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.transcribe.segmentation import chunks_within, frames_of, spans_of


def test_the_last_end_may_be_left_out() -> None:
    assert spans_of(()) == ((0.0, math.inf),)
    assert spans_of((1.5,)) == ((1.5, math.inf),)
    assert spans_of((1, 2, 3)) == ((1, 2), (3, math.inf))


@given(st.integers(1, 10_000), st.lists(st.integers(0, 12_000), unique=True).map(sorted))
def test_frames_stay_within_the_recording(total: int, hundredths: list[int]) -> None:
    found = frames_of(spans_of([each / 100 for each in hundredths]), total)
    assert all(0 <= begin < end <= total for begin, end in found)
    wanted = set()
    for begin, end in zip(hundredths[::2], hundredths[1::2], strict=False):
        wanted |= set(range(begin, min(end, total)))
    if len(hundredths) % 2:
        wanted |= set(range(hundredths[-1], total))
    covered = {frame for begin, end in found for frame in range(begin, end)}
    assert covered == (wanted if hundredths else set(range(total)))


def test_chunks_are_cut_at_the_bounds_of_parts() -> None:
    chunks = [
        Chunk(1.0, np.arange(32_000, dtype=np.float32)),
        Chunk(4.0, np.arange(16_000, dtype=np.float32)),
    ]
    spans = ((0.0, 1.5), (2.0, 2.25), (2.5, 4.5), (6.0, math.inf))
    found = list(chunks_within(chunks, spans))
    assert [(each.start, each.seconds) for each in found] == [
        (1.0, 0.5),
        (2.0, 0.25),
        (2.5, 0.5),
        (4.0, 0.5),
    ]
    assert [each.samples[0] for each in found] == [0, 16_000, 24_000, 0]
    whole = list(chunks_within(chunks, spans_of(())))
    assert [each.samples.size for each in whole] == [32_000, 16_000]
