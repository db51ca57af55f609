"""A recording that can be read from its beginning as often as needed: held, or left in its file.

What is short is decoded once and held. A long recording is decoded anew each time it is read, so
that memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from whisper_flash_attention.audio.decode import Samples
from whisper_flash_attention.audio.load import SAMPLING_RATE, join_blocks, stream_audio
from whisper_flash_attention.audio.source import Source, name_of

# Up to here a recording is held: 38 MB of samples.
HELD_SECONDS = 600.0
BLOCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Sound:
    """Mono float32 samples within [-1, 1] at 16 kHz, or where they come from.

    Args:
        samples: `[T]`, of a recording that is held.
        source: of one that is not, as `load_audio` takes it; it can be read again.
    """

    samples: Samples | None = None
    source: Source | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "<samples>" if self.source is None else name_of(self.source)

    @property
    def seconds(self) -> float | None:
        """Its length; None of one that is not held, which is known when it was read."""
        return None if self.samples is None else self.samples.size / SAMPLING_RATE

    def blocks(self, seconds: float = BLOCK_SECONDS) -> Iterator[Samples]:
        """All of it from the beginning: blocks `[T]` of so many seconds, the last what is left.

        Raises:
            AudioError: as `stream_audio`.
        """
        if self.samples is None:
            assert self.source is not None
            yield from stream_audio(self.source, block_seconds=seconds)
            return
        size = round(seconds * SAMPLING_RATE)
        for start in range(0, self.samples.size, size):
            yield self.samples[start : start + size]


def open_sound(
    source: Source, *, held_seconds: float = HELD_SECONDS, stop: Event | None = None
) -> Sound:
    """Decode a recording of up to `held_seconds`, at least 30; leave a longer one where it is.

    What cannot be read twice (a pipe) is held, however long it is.

    Args:
        source: as for `load_audio`.
        stop: once it is set, the result does not matter any more.

    Raises:
        AudioError: as `load_audio`; of a recording that is not held, damage behind `held_seconds`
            shows when it is read.
    """
    shortest = max(held_seconds, BLOCK_SECONDS) * SAMPLING_RATE
    most = shortest if _can_be_read_again(source) else float("inf")
    blocks: list[Samples] = []
    held = 0
    for block in stream_audio(source):
        blocks.append(block)
        held += block.size
        if held > most:
            return Sound(source=source)
        if stop is not None and stop.is_set():
            break
    return Sound(join_blocks(blocks))


def _can_be_read_again(source: Source) -> bool:
    if isinstance(source, bytes):
        return True
    if isinstance(source, str | Path):
        return Path(source).is_file()  # not a pipe, nor a device
    return source.seekable()
