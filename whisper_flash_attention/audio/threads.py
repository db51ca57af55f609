"""Several threads for recordings, beside processes that decode and a thread that feeds a GPU."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# Devices beside which threads work, and how many at most.
THREADED_DEVICES = ("cuda",)
MOST_THREADS = 8


def threads_beside(device: torch.device) -> int:
    """Threads for work on recordings: half the cores, since decoders need the others.

    None beside a CPU, which has no core to spare: the caller's thread, with operations that all
    cores share.
    """
    if device.type not in THREADED_DEVICES:
        return 0
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))


def in_threads(
    call: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result]:
    """As `map`, with calls in threads, as many items ahead; results and errors come in order.

    Each thread computes on one core.
    """

    def on_one_core(item: Item) -> Result:
        with one_core():
            return call(item)

    coming: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="whisper-flash-detect") as pool:
        try:
            for item in items:
                coming.append(pool.submit(on_one_core, item))
                while coming and (len(coming) > threads or coming[0].done()):
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for each in coming:
                each.cancel()


@contextmanager
def one_core() -> Iterator[None]:
    """Have PyTorch compute on the core of this thread.

    Where other processes keep all cores busy, the cores that share an operation wait for one
    another, and it takes longer than on one of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
