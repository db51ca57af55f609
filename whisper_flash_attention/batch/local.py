"""The engine `local`: one model in this process, threads that decode ahead. It needs no Ray."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from threading import Event
from typing import cast

from whisper_flash_attention.audio.ahead import work_ahead
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.rows import Row
from whisper_flash_attention.batch.stages import (
    Decoded,
    DeviceLost,
    TranscribeStage,
    decode,
    grouped,
    planned,
)
from whisper_flash_attention.batch.work import Work
from whisper_flash_attention.errors import DeviceError


def run_local(items: Sequence[Item], work: Work) -> Iterator[list[Row]]:
    """Transcribe recordings group by group, and give the rows of each.

    At any time one group is in work, one is being decoded, and beyond it a recording per thread.

    Raises:
        WhisperFlashError: what would be the same for every recording.
    """
    stage = TranscribeStage(work.opener, work.asked)
    stop = Event()
    with closing(_groups(items, work, stop)) as groups:
        for group in _one_ahead(groups, stop):
            try:
                rows = stage.rows(group)
            except DeviceLost as error:
                raise DeviceError(f"the GPU failed ({error}); the same command goes on") from error
            del group  # before the next one but one is decoded
            yield rows


def _groups(items: Sequence[Item], work: Work, stop: Event) -> Generator[list[Decoded]]:
    counts = [len(some) for some in planned(items, work)]

    def decode_one(item: Item, nobody_waits: Event) -> Decoded:
        return decode(item, lambda: stop.is_set() or nobody_waits.is_set())

    decoded = cast("Generator[Decoded]", work_ahead(items, decode_one, workers=work.workers))
    with closing(decoded):
        for count in counts:
            yield from grouped(_until(stop, islice(decoded, count)), work)


def _until(stop: Event, decoded: Iterable[Decoded]) -> Iterator[Decoded]:
    for each in decoded:
        if stop.is_set():
            return
        yield each


def _one_ahead(groups: Iterator[list[Decoded]], stop: Event) -> Iterator[list[Decoded]]:
    """The groups, of which the next is made while the caller works on the last."""
    with ThreadPoolExecutor(1, thread_name_prefix="groups") as thread:
        try:
            upcoming = thread.submit(next, groups, None)
            while (group := upcoming.result()) is not None:
                upcoming = thread.submit(next, groups, None)
                yield group
                del group
        finally:
            stop.set()
