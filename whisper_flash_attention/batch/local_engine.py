"""The engine `local`: one model in this process, and processes that decode. It needs no Ray."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
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


def run_local(items: Sequence[Item], work: Work) -> Generator[list[Row]]:
    """Transcribe recordings group by group, and give the rows of each.

    At any time one group is in work, one is complete or being made, and beyond these is what
    `AudioOpener.open_each` decodes ahead.

    Raises:
        DecoderError: the processes that decode cannot be started.
        WhisperFlashError: what would be the same for every recording.
    """
    stage = TranscribeStage(work.opener, work.run_options)
    pool = DecoderPool(work.workers, timeout=work.decode_timeout, decode=work.decode)
    with (
        AudioOpener(pool) as opener,
        closing(_groups(items, work, opener)) as groups,
        closing(_one_ahead(groups, opener)) as ready,
    ):
        for group in ready:
            try:
                rows = stage.rows(group)
            except DeviceLost as error:
                raise DeviceError(f"the GPU failed ({error}); the same command goes on") from error
            del group  # before the next one but one is decoded
            yield rows


def _groups(items: Sequence[Item], work: Work, opener: AudioOpener) -> Generator[list[Decoded]]:
    counts = [len(some) for some in planned(items, work)]
    with closing(decode(items, opener)) as decoded:
        for count in counts:
            yield from grouped(islice(decoded, count), work)


def _one_ahead(groups: Generator[list[Decoded]], opener: AudioOpener) -> Generator[list[Decoded]]:
    """The groups, of which the next is made while the caller works on the last."""
    with ThreadPoolExecutor(1, thread_name_prefix="groups") as thread:
        try:
            upcoming = thread.submit(next, groups, None)
            while (group := upcoming.result()) is not None:
                upcoming = thread.submit(next, groups, None)
                yield group
                del group
        finally:
            opener.close()  # so that the thread does not wait for recordings that nobody wants
