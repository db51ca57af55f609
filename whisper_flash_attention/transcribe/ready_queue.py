"""Recordings that are read side by side, each window after the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Generic, TypeVar

Recording = TypeVar("Recording")


class ReadyQueue(Generic[Recording]):
    """Which recordings' next windows can be read now.

    Args:
        recordings: begun as there is room for them, and known by their numbers from 0 on.
        most: of them that are being read at a time.
    """

    def __init__(self, recordings: Iterable[Recording], most: int) -> None:
        self._waiting = iter(enumerate(recordings))
        self._room = most
        self._ready: deque[tuple[int, Recording]] = deque()

    def take(self, count: int) -> list[tuple[int, Recording]]:
        """Recordings whose turn it is, at most so many; those that have begun come first."""
        known = min(count, len(self._ready))
        taken = [self._ready.popleft() for _ in range(known)]
        new = list(islice(self._waiting, min(count - known, self._room)))
        self._room -= len(new)
        return taken + new

    def put_back(self, index: int, recording: Recording, *, is_done: bool) -> None:
        """A recording that was taken has been read one window further, or to its end."""
        if is_done:
            self._room += 1
        else:
            self._ready.append((index, recording))
