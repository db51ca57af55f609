"""Decode many recordings in threads, ahead of what is done with them.

Decoding is FFmpeg's work, during most of which other Python threads go on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Event
from typing import TypeVar

from whisper_flash_attention.audio.audio_source import AudioSource, ChannelSources, open_audio
from whisper_flash_attention.audio.load import Source
from whisper_flash_attention.errors import AudioError, OptionError

# More threads than this wait for one another: between two calls of FFmpeg there is Python.
MOST_WORKERS = 4

Entry = TypeVar("Entry")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Opened:
    """One recording that can be read, or the error that came instead."""

    source: Source
    audio: AudioSource | ChannelSources | None = None
    error: AudioError | None = None


def open_ahead(
    sources: Iterable[Source],
    *,
    channel: int | str = "mix",
    track: int | str | None = None,
    workers: int | None = None,
    ahead: int | None = None,
) -> Iterator[Opened]:
    """Open recordings as `open_audio` does, in threads, and give them in their order.

    A recording that cannot be read gives its error, and the others go on. Closing the iterator
    stops the threads, each after the block that it is decoding.

    Args:
        sources: as for `load_audio`; taken as they are needed, in the caller's thread.
        channel, track: as for `open_audio`, of every recording.
        workers: threads; if left out one per core, but at most 4.
        ahead: the most recordings in memory at a time, decoded or being decoded, the one given last
            included; if left out, one more than `workers`. With 1 nothing is decoded ahead.

    Raises:
        OptionError: at once, if a number is below 1.
    """

    def open_one(source: Source, stop: Event) -> Opened:
        try:
            return Opened(source, open_audio(source, channel=channel, track=track, stop=stop))
        except AudioError as error:
            return Opened(source, error=error)

    return work_ahead(sources, open_one, workers=workers, ahead=ahead)


def work_ahead(
    entries: Iterable[Entry],
    work: Callable[[Entry, Event], Result],
    *,
    workers: int | None = None,
    ahead: int | None = None,
) -> Iterator[Result]:
    """Do the same with many entries in threads, and give the results in the entries' order.

    Args:
        entries: taken as they are needed, in the caller's thread.
        work: called in a thread with an entry and an event; when that is set, nobody will see the
            result, and the work may be left. What it raises is raised in the caller's thread.
        workers, ahead: as for `open_ahead`.

    Raises:
        OptionError: at once, if a number is below 1.
    """
    workers = min(MOST_WORKERS, os.cpu_count() or 1) if workers is None else workers
    ahead = workers + 1 if ahead is None else ahead
    for name, number in (("workers", workers), ("ahead", ahead)):
        if number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}")
    return _in_order(iter(entries), work, workers, ahead)


def _in_order(
    entries: Iterator[Entry], work: Callable[[Entry, Event], Result], workers: int, ahead: int
) -> Iterator[Result]:
    stop = Event()
    pending: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(min(workers, ahead), thread_name_prefix="work_ahead")
    try:
        while True:
            for entry in islice(entries, ahead - len(pending)):
                pending.append(executor.submit(work, entry, stop))
            if not pending:
                return
            # Kept under no name here, so that the caller alone decides how long it lives.
            yield pending.popleft().result()
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
