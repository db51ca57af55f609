"""How likely somebody speaks, every 32 ms, by Silero's voice activity detector.

The detector's package calls its network once per frame. The network looks at frames one by one and
then at their sequence, so that many frames can be looked at together, and only the short step that
remembers goes from one to the next. Numbers are those of the package's own calls, up to rounding.
"""

from __future__ import annotations

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


def speech_probabilities(detector: Any, samples: npt.NDArray[np.float32]) -> Tensor:
    """Probabilities of speech, `[N]` float32, in the frames of a recording.

    Args:
        detector: what `silero_vad.load_silero_vad` gives.
        samples: mono `[T]` at 16 kHz, not empty; silence is added to fill the last frame.
    """
    room = np.zeros(BEFORE + -(-samples.size // FRAME) * FRAME, np.float32)
    room[BEFORE : BEFORE + samples.size] = samples
    frames = torch.from_numpy(room).unfold(0, BEFORE + FRAME, FRAME)
    with torch.inference_mode():
        try:
            network = _Network(detector)
        except AttributeError:  # a release of the package that is built in another way
            return _one_by_one(detector, frames[:, BEFORE:])
        return torch.cat([network.probabilities(part) for part in frames.split(FRAMES_AT_ONCE)])


class _Network:
    """The detector's network for 16 kHz, in parts; it remembers what it heard."""

    def __init__(self, detector: Any) -> None:
        network = detector._model
        self._spectrum, self._encoder = network.run_extractors, network.encoder
        self._output = network.decoder.decoder
        cell = network.decoder.rnn
        inputs, hidden = cell.weight_ih.shape[1], cell.weight_hh.shape[1]
        self._memory = torch.nn.LSTM(inputs, hidden)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(self._memory, f"{name}_l0").copy_(getattr(cell, name))
        self._state: tuple[Tensor, Tensor] | None = None

    def probabilities(self, frames: Tensor) -> Tensor:
        """Probabilities `[N]` of the next frames `[N, BEFORE + FRAME]`."""
        seen = self._encoder(self._spectrum(frames)).squeeze(-1)
        remembered, self._state = self._memory(seen, self._state)
        found: Tensor = self._output(remembered.unsqueeze(-1)).flatten()
        return found


def _one_by_one(detector: Any, frames: Tensor) -> Tensor:
    """By the package's own call for each of `frames` `[N, FRAME]`."""
    detector.reset_states()
    return torch.stack([detector(frame, SAMPLING_RATE).reshape(()) for frame in frames])
