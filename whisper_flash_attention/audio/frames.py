"""Per frame of 512 samples (32 ms): the probability of speech, and the sound level.

Probabilities are those of Silero's voice activity detector. Its package calls the network once per
frame; the network encodes frames independently and then runs over their sequence, so that here many
frames are encoded together and only the short recurrent step is sequential. Numbers are those of
the package's own calls, up to rounding.

Levels are mean powers in decibels of full scale; parts of a recording stand out from its noise by
them. They take 128 bytes per second, so that those of a whole recording can be held.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples

# Samples per frame, and how many before it the network sees, too.
FRAME, BEFORE = 512, 64
# Frames at a time: bounds memory.
FRAMES_AT_ONCE = 512


class Voice:
    """Probabilities of speech in one recording, block by block.

    Args:
        detector: what `silero_vad.load_silero_vad` gives.
    """

    def __init__(self, detector: Any) -> None:
        self._before = np.zeros(BEFORE, np.float32)
        try:
            self._network: _Network | _FrameByFrame = _Network(detector)
        except AttributeError:  # a release of the package that is built in another way
            self._network = _FrameByFrame(detector)

    def probabilities(self, block: Samples) -> Tensor:
        """Probabilities of speech, `[N]` float32, in the next frames.

        Args:
            block: mono `[T]` at 16 kHz, T above 0 and, but in the last block, a multiple of
                `FRAME`; silence is added to fill the last frame.
        """
        silence = np.zeros(-block.size % FRAME, np.float32)
        room = np.concatenate([self._before, block, silence])
        self._before = room[-BEFORE:].copy()
        frames = torch.from_numpy(room).unfold(0, BEFORE + FRAME, FRAME)
        with torch.inference_mode():
            parts = range(0, len(frames), FRAMES_AT_ONCE)
            return torch.cat(
                [self._network.probabilities(frames[i : i + FRAMES_AT_ONCE]) for i in parts]
            )


class KnownProbabilities:
    """Stands in for the detector where its probabilities are known: returns them one by one."""

    def __init__(self, probabilities: Iterable[float]) -> None:
        self._probabilities: Iterator[float] = iter(probabilities)

    def reset_states(self) -> None:
        """Called before the first frame, when there is nothing to forget."""

    def __call__(self, frame: Tensor, sampling_rate: int) -> Tensor:
        return torch.tensor(next(self._probabilities))


class _Network:
    """The detector's network for 16 kHz, in parts; it keeps the state of its recurrent layer."""

    def __init__(self, detector: Any) -> None:
        network = detector._model
        self._spectrum, self._encoder = network.run_extractors, network.encoder
        self._output = network.decoder.decoder
        cell = network.decoder.rnn
        inputs, hidden = cell.weight_ih.shape[1], cell.weight_hh.shape[1]
        self._memory = torch.nn.LSTM(inputs, hidden).requires_grad_(False)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(self._memory, f"{name}_l0").copy_(getattr(cell, name))
        self._state: tuple[Tensor, Tensor] | None = None

    def probabilities(self, frames: Tensor) -> Tensor:
        """Probabilities `[N]` of the next frames `[N, BEFORE + FRAME]`."""
        seen = self._encoder(self._spectrum(frames)).squeeze(-1)
        remembered, self._state = self._memory(seen, self._state)
        found: Tensor = self._output(remembered.unsqueeze(-1)).flatten()
        return found


class _FrameByFrame:
    """The same by the package's own call for each frame."""

    def __init__(self, detector: Any) -> None:
        self._detector = detector
        detector.reset_states()

    def probabilities(self, frames: Tensor) -> Tensor:
        """Probabilities `[N]` of the next frames `[N, BEFORE + FRAME]`."""
        found = (self._detector(frame, SAMPLING_RATE) for frame in frames[:, BEFORE:])
        return torch.stack([each.reshape(()) for each in found])


Decibels = Samples

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

    def add(self, block: Samples) -> None:
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


def levels_of(samples: Samples) -> Decibels:
    """Levels of a whole recording, mono `[T]`."""
    levels = Levels()
    levels.add(samples)
    return levels.decibels


def standing_out(levels: Decibels, speech: npt.NDArray[np.bool_] | None = None) -> list[bool]:
    """Whether each frame is well above the noise, and about as loud as the speech.

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
