"""The engine `local`: one model in this process, and processes that decode. It needs no Ray."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.rows import Row
from whisper_flash_attention.batch.stages import (
    DeviceLost,
    TranscribeStage,
    Work,
    alike_together,
    decode,
)
from whisper_flash_attention.errors import DeviceError


def run_local(items: Sequence[Item], work: Work) -> Generator[list[Row]]:
    """Transcribe recordings side by side, and give the row of each as soon as it is done.

    Memory holds what is transcribed (`Work.most_seconds`), and what `AudioOpener.open_each` decodes
    ahead.

    Raises:
        DecoderError: the processes that decode cannot be started.
        WhisperFlashError: what would be the same for every recording.
    """
    stage = TranscribeStage(work.opener, work.run_options)
    items = alike_together(items, lambda item: item, work.run_options)
    pool = DecoderPool(work.workers, timeout=work.decode_timeout, decode=work.decode, reuse=True)
    with (
        AudioOpener(pool) as opener,
        closing(decode(items, opener)) as decoded,
        closing(stage.stream(decoded, work)) as rows,
    ):
        try:
            for row in rows:
                yield [row]
        except DeviceLost as error:
            raise DeviceError(f"the GPU failed ({error}); the same command goes on") from error
