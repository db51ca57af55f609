"""Whether samples hold any sound at all; Whisper makes up words ("you") where there is none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio.load import SAMPLING_RATE

# Nothing shorter is a word.
SHORTEST = SAMPLING_RATE // 10
# Rounding to 16 bits, with dither, moves samples by up to two steps of 2^-15 either way.
NOISE = np.float32(4 / 32768)


def is_silence(samples: npt.NDArray[np.float32]) -> bool:
    """Return whether samples `[T]` at 16 kHz are too few for a word, or nothing but rounding noise.

    A constant level (DC) is no sound either. NaN is not silence, so that it is found later.
    """
    return length_of_silence([samples]) is not None


def length_of_silence(blocks: Iterable[npt.NDArray[np.float32]]) -> int | None:
    """Return the number of samples in all blocks `[T]` if they are silence; None if there is sound.

    Blocks are taken until there is sound, in most recordings a single one.
    """
    size, low, high = 0, np.float32(np.inf), np.float32(-np.inf)
    for block in blocks:
        size += block.size
        # Samples far apart tell nearly always.
        for some in (block[:: 1 + block.size // 64], block):
            if some.size:
                low, high = np.minimum(low, some.min()), np.maximum(high, some.max())
            if size >= SHORTEST and not high - low <= NOISE:
                return None
    return size
