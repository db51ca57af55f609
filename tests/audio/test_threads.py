"""Calls in several threads: in order, with their errors in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from whisper_flash_attention.audio.threads import MOST_THREADS, in_threads, threads_beside


def test_threads_work_side_by_side_and_give_results_in_order() -> None:
    meeting = threading.Barrier(2, timeout=60)

    def call(number: int) -> int:
        if number < 4:
            meeting.wait()  # two at a time
        return 10 * number

    assert list(in_threads(call, range(9), 2)) == [10 * number for number in range(9)]


def test_threads_are_a_few_items_ahead_and_take_no_more_once_left() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    released = threading.Event()

    def call(number: int) -> int:
        assert released.wait(60)
        return number

    found = in_threads(call, items(), 3)
    threading.Timer(0.2, released.set).start()
    assert next(found) == 0
    found.close()
    assert len(taken) == 4


def test_an_error_of_a_thread_comes_where_its_result_would() -> None:
    found = in_threads(lambda number: 1 // number, [1, 0, 1], 2)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_cpu_is_left_to_itself() -> None:
    assert threads_beside(torch.device("cpu")) == 0
    assert 1 <= threads_beside(torch.device("cuda", 0)) <= MOST_THREADS
