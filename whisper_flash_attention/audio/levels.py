"""How loud a recording is over time, and which parts of it stand out from its noise.

Levels are mean powers of frames of 512 samples, the voice activity detector's frames, in decibels
of full scale. They take 128 bytes per second, so that those of a whole recording can be held.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio.voice import FRAME

Decibels = npt.NDArray[np.float32]

# Digital silence, and dither around it: below one step of 16 bits.
SILENT_DB = -90.0
# The level that a tenth of the frames with sound do not reach counts as the recording's noise.
NOISE_PERCENTILE = 10
# Sound stands out if it is this much above the noise, and not this much below the speech.
ABOVE_NOISE_DB, BELOW_SPEECH_DB = 10.0, 22.0
# Recordings are cut in the middle of the quietest stretch of this many frames (0.29 s).
PAUSE_FRAMES = 9


class Levels:
    """Levels of one recording, block by block."""

    def __init__(self) -> None:
        self._power = array("f")

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Measure the next block, mono `[T]`; T is a multiple of `FRAME` in all but the last."""
        whole = block.size // FRAME * FRAME
        # Without a copy of the block; a frame's sum needs no more than single precision.
        frames = block[:whole].reshape(-1, FRAME)
        power = np.einsum("nt,nt->n", frames, frames) / np.float32(FRAME)
        self._power.frombytes(power.astype(np.float32, copy=False).tobytes())
        if block.size > whole:
            self._power.append(float(np.mean(np.square(block[whole:], dtype=np.float64))))

    @property
    def decibels(self) -> Decibels:
        """Levels so far, `[N]`."""
        power = np.frombuffer(self._power, dtype=np.float32) if self._power else np.zeros(0)
        return (10 * np.log10(np.maximum(power, 1e-12))).astype(np.float32)


def levels_of(samples: npt.NDArray[np.float32]) -> Decibels:
    """Levels of a whole recording, mono `[T]`."""
    levels = Levels()
    levels.add(samples)
    return levels.decibels


def standing_out(levels: Decibels, speech: npt.NDArray[np.bool_] | None = None) -> list[bool]:
    """Say of each frame whether it is well above the noise, and about as loud as the speech.

    Args:
        levels: of a whole recording, `[N]`.
        speech: which frames are known to be speech, `[N]`; None takes the loudest tenth for it.
    """
    sounding = levels[levels > SILENT_DB]
    if not sounding.size:
        return [False] * levels.size
    noise = float(np.percentile(sounding, NOISE_PERCENTILE))
    if speech is None:
        loud = float(np.percentile(sounding, 100 - NOISE_PERCENTILE))
    else:
        spoken = levels[speech]
        loud = float(np.median(spoken)) if spoken.size else float("inf")
    # In steady sound the first bound is above all levels.
    bound = max(noise + ABOVE_NOISE_DB, loud - BELOW_SPEECH_DB, SILENT_DB)
    found: list[bool] = (levels >= bound).tolist()
    return found


def runs(flags: Iterable[bool], pause: int) -> list[tuple[int, int]]:
    """First frames and ends of stretches of True, joined across fewer than `pause` False."""
    found: list[tuple[int, int]] = []
    for index, flag in enumerate(flags):
        if not flag:
            continue
        if found and index - found[-1][1] < pause:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def quietest(levels: Decibels, first: int, end: int) -> int:
    """The frame in the middle of the quietest pause between two frames, the latest of equals."""
    part = 10 ** (levels[first:end].astype(np.float64) / 10)
    if part.size <= PAUSE_FRAMES:
        return (first + end) // 2
    total = np.concatenate([[0.0], np.cumsum(part)])
    power = total[PAUSE_FRAMES:] - total[:-PAUSE_FRAMES]
    # Differences of sums are not exactly 0 in silence.
    latest = int(np.flatnonzero(power <= power.min() + 1e-12)[-1])
    return first + latest + PAUSE_FRAMES // 2
