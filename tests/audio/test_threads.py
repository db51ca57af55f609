"""Calls in several threads: in order, with their errors in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from whisper_flash_attention.audio.threads import MOST_THREADS, in_threads, one_core, threads_beside


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


def test_an_error_of_the_items_comes_after_all_results() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise ValueError("no more of it")

    found = in_threads(lambda number: 10 * number, items(), 2)
    assert [next(found) for _ in range(3)] == [10, 20, 30]
    with pytest.raises(ValueError, match="no more of it"):
        next(found)


def test_a_result_does_not_wait_for_the_next_item() -> None:
    handed_on = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        assert handed_on.wait(60)
        yield 2

    found = in_threads(lambda number: number, items(), 4)
    assert next(found) == 1
    handed_on.set()
    assert list(found) == [2]


def test_later_threads_have_all_cores_again() -> None:
    def number_of_cores() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert number_of_cores() == 3
        first = in_threads(lambda number: torch.get_num_threads(), range(8), 2)
        assert next(first) == 1
        with one_core():  # ends while the other has not
            assert torch.get_num_threads() == 1
            assert list(in_threads(lambda number: torch.get_num_threads(), range(4), 2)) == [1] * 4
        assert torch.get_num_threads() == 3
        assert list(first) == [1] * 7
        assert torch.get_num_threads() == number_of_cores() == 3
    finally:
        torch.set_num_threads(before)
