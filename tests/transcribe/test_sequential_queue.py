"""Recordings side by side, each window after the one before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.transcribe.sequential import ReadyQueue


def test_those_that_have_begun_come_first() -> None:
    ready = ReadyQueue("abc", 2)
    assert ready.take(1) == ["a"]
    ready.put_back("a", is_done=False)
    assert ready.take(5) == ["a", "b"]
    assert ready.take(5) == []
    ready.put_back("b", is_done=True)
    assert ready.take(5) == ["c"]


def test_recordings_are_begun_when_there_is_room() -> None:
    begun = []

    def recordings() -> Iterator[int]:
        for number in range(5):
            begun.append(number)
            yield number

    ready = ReadyQueue(recordings(), 2)
    assert begun == []
    ready.take(9)
    assert begun == [0, 1]


@given(
    windows=st.lists(st.integers(1, 4), max_size=6),
    most=st.integers(1, 4),
    data=st.data(),
)
def test_every_window_is_read_once_and_no_two_of_a_recording_at_a_time(
    windows: list[int], most: int, data: Any
) -> None:
    ready, left = ReadyQueue(enumerate(windows), most), dict(enumerate(windows))
    reading: dict[int, int] = {}
    while True:
        for index, recording in ready.take(data.draw(st.integers(1, 4))):
            assert index not in reading and left[index] > 0
            reading[index] = recording
        assert len(reading) <= most
        if not reading:
            break
        index = data.draw(st.sampled_from(sorted(reading)))
        left[index] -= 1
        ready.put_back((index, reading.pop(index)), is_done=left[index] == 0)
    assert set(left.values()) <= {0}
