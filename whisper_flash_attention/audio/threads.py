"""Several threads for recordings, beside processes that decode and a thread that feeds a GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Semaphore
from typing import TypeVar

import torch

from whisper_flash_attention.audio.decoder_pool import default_workers

Item = TypeVar("Item")
Result = TypeVar("Result")
# Devices beside which threads work, and how many at most. Each has a recording of up to ten
# minutes (38 MB) in memory.
THREADED_DEVICES = ("cuda",)
MOST_THREADS = 8


def threads_beside(device: torch.device) -> int:
    """Threads for work on recordings: half the cores, since decoders need the others.

    None beside a CPU, which has no core to spare: the caller's thread, with operations that all
    cores share.
    """
    if device.type not in THREADED_DEVICES:
        return 0
    return min(MOST_THREADS, (default_workers() + 1) // 2)


def in_threads(
    call: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result]:
    """As `map`, with calls in threads, each on one core, as many items ahead.

    Results and errors come in order, those of `items` after all results before them. Items are
    taken by one thread, so that a result need not wait for the next item.
    """
    room, coming = Semaphore(threads), SimpleQueue[Future[Result] | None]()
    is_closed = False

    def take() -> None:
        iterator = iter(items)
        try:
            while True:
                room.acquire()
                if is_closed:
                    return
                item = next(iterator)
                coming.put(pool.submit(call, item))
        except StopIteration:
            pass
        except BaseException as error:  # raised where the item's result would be
            failed = Future[Result]()
            failed.set_exception(error)
            coming.put(failed)
        finally:
            coming.put(None)

    executor = ThreadPoolExecutor(
        threads + 1, thread_name_prefix="whisper-flash-detect", initializer=_stay_on_one_core
    )
    with _default_restored(), executor as pool:
        pool.submit(take)
        try:
            while (future := coming.get()) is not None:
                room.release()
                yield future.result()
        finally:
            is_closed = True
            room.release()
            with suppress(Empty):
                while True:
                    if (future := coming.get_nowait()) is not None:
                        future.cancel()


@contextmanager
def one_core() -> Iterator[None]:
    """Have PyTorch compute on the core of this thread.

    Where other processes keep all cores busy, the cores that share an operation wait for one
    another, and it takes longer than on one of them.
    """
    with _default_restored():
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _stay_on_one_core() -> None:
    torch.get_num_threads()  # takes the default, which the first operation would otherwise
    torch.set_num_threads(1)


class _Default:
    """PyTorch's number of threads, for threads that are yet to use it, and who has changed it."""

    lock = Lock()
    changed_by = 0
    number = 1


@contextmanager
def _default_restored() -> Iterator[None]:
    """Restore PyTorch's default once nobody changes it any more.

    `torch.set_num_threads` sets that of its thread and the default. A thread that uses PyTorch for
    the first time meanwhile stays on one core.
    """
    with _Default.lock:
        if _Default.changed_by == 0:
            _Default.number = torch.get_num_threads()
        _Default.changed_by += 1
    try:
        yield
    finally:
        with _Default.lock:
            _Default.changed_by -= 1
            if _Default.changed_by == 0:
                torch.set_num_threads(_Default.number)
