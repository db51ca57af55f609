"""How likely somebody speaks, every 32 ms, by Silero's voice activity detector.

The detector's package calls its network once per frame. The network looks at frames one by one and
then at their sequence, so that many frames can be looked at together, and only the short step that
remembers goes from one to the next. Numbers are those of the package's own calls, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whisper_flash_attention.audio.load import SAMPLING_RATE

# Samples per frame, and how many before it the network sees, too.
FRAME, BEFORE = 512, 64
# Frames at a time: bounds memory.
FRAMES_AT_ONCE = 512


class Voice:
    """Listens to one recording, block by block.

    Args:
        detector: what `silero_vad.load_silero_vad` gives.
    """

    def __init__(self, detector: Any) -> None:
        self._before = np.zeros(BEFORE, np.float32)
        try:
            self._network: _Network | _FrameByFrame = _Network(detector)
        except AttributeError:  # a release of the package that is built in another way
            self._network = _FrameByFrame(detector)

    def hear(self, block: npt.NDArray[np.float32]) -> Tensor:
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
    """Stands in for the detector where its answers are known: gives them one after the other."""

    def __init__(self, probabilities: Iterable[float]) -> None:
        self._answers: Iterator[float] = iter(probabilities)

    def reset_states(self) -> None:
        """Called before the first frame, when there is nothing to forget."""

    def __call__(self, frame: Tensor, sampling_rate: int) -> Tensor:
        return torch.tensor(next(self._answers))


class _Network:
    """The detector's network for 16 kHz, in parts; it remembers what it heard."""

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
