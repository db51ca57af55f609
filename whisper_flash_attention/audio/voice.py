"""Probabilities of speech, by the network of Silero's detector.

The detector comes with its own package (`silero-vad`, MIT licence), which is optional.

Frames are 512 samples (32 ms). The package calls the detector's network once per frame; the network
encodes frames independently and then runs over their sequence, so that here many frames are encoded
together and only the short recurrent step is sequential. Probabilities are those of the package's
own calls, up to rounding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.errors import MissingPackage

# Samples per frame, and how many before it the network takes, too.
FRAME, BEFORE = 512, 64
# Frames that are encoded at a time, which bounds memory.
FRAMES_AT_ONCE = 512
_LOADING = Lock()


def detector() -> Any:
    """Silero's model. Raises `MissingPackage` where its package is not installed."""
    with _LOADING:  # once for all threads
        return _detector()[0]


def stretches_of(probabilities: list[float], **options: Any) -> list[dict[str, int]]:
    """First samples and ends of speech, by its probabilities, as the package finds them."""
    found: list[dict[str, int]] = _detector()[1](probabilities, **options)
    return found


@lru_cache(maxsize=1)
def _detector() -> tuple[Any, Any]:
    """Silero's model, and its function that finds speech by probabilities."""
    threads = torch.get_num_threads()
    try:
        from silero_vad import get_speech_timestamps_from_probs, load_silero_vad
    except ImportError as error:
        raise MissingPackage(
            "voice activity detection needs the package silero-vad, which is not installed: "
            "pip install 'whisper-flash-attention[vad]'"
        ) from error
    finally:
        # Importing it sets PyTorch to one thread.
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        # The package loads its model by a function that PyTorch has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return load_silero_vad(), get_speech_timestamps_from_probs


class Voice:
    """Probabilities of speech in one recording, block by block.

    Args:
        detector: what `silero_vad.load_silero_vad` returns.
    """

    def __init__(self, detector: Any) -> None:
        self._before = np.zeros(BEFORE, np.float32)
        try:
            self._network: _Network | _FrameByFrame = _Network(detector)
        except AttributeError:  # a release of the package with another structure
            self._network = _FrameByFrame(detector)

    def probabilities(self, block: Samples) -> Tensor:
        """Probabilities of speech, `[N]` float32, in the next frames.

        Args:
            block: mono `[T]` at 16 kHz, T above 0 and, but in the last block, a multiple of
                `FRAME`; silence is added to fill the last frame.
        """
        return self.follow(self.encode(self.frames(block)))

    def frames(self, block: Samples) -> Tensor:
        """The next frames `[N, BEFORE + FRAME]`, each with what is before it."""
        silence = np.zeros(-block.size % FRAME, np.float32)
        room = np.concatenate([self._before, block, silence])
        self._before = room[-BEFORE:].copy()
        return torch.from_numpy(room).unfold(0, BEFORE + FRAME, FRAME)

    def encode(self, frames: Tensor) -> Tensor:
        """What the network makes of each frame by itself, of any frames, in any thread."""
        with torch.inference_mode():
            parts = torch.split(frames, FRAMES_AT_ONCE)
            return torch.cat([self._network.encode(part) for part in parts])

    def follow(self, encoded: Tensor) -> Tensor:
        """Probabilities of speech, `[N]` float32, in the next frames, which were encoded."""
        with torch.inference_mode():
            return self._network.follow(encoded)

    @classmethod
    def together(cls, pieces: Sequence[tuple[Voice, Samples]]) -> list[Tensor]:
        """Probabilities of several recordings, up to rounding those that each gives by itself.

        Args:
            pieces: recordings, each once, with the next samples of each.
        """
        networks = [voice._network for voice, _ in pieces if isinstance(voice._network, _Network)]
        if len(pieces) == 1 or len(networks) < len(pieces):
            return [voice.probabilities(block) for voice, block in pieces]
        with torch.inference_mode():
            return _Network.together(networks, [voice.frames(block) for voice, block in pieces])


@lru_cache(maxsize=1)
def _recurrent_layer(cell: Any) -> torch.nn.LSTM:
    """A layer that runs the network's recurrent cell over a sequence of frames."""
    inputs, hidden = cell.weight_ih.shape[1], cell.weight_hh.shape[1]
    # What initializes it must not be missing where tokens are sampled.
    with torch.random.fork_rng([]):
        layer = torch.nn.LSTM(inputs, hidden).requires_grad_(False)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{name}_l0").copy_(getattr(cell, name))
    return layer


class _Network:
    """The detector's network for 16 kHz, in parts; it keeps the state of its recurrent layer."""

    def __init__(self, detector: Any) -> None:
        network = detector._model
        with _LOADING:
            self._memory = _recurrent_layer(network.decoder.rnn)
        self._spectrum, self._encoder = network.run_extractors, network.encoder
        self._output = network.decoder.decoder
        self._state: tuple[Tensor, Tensor] | None = None

    def encode(self, frames: Tensor) -> Tensor:
        """Features `[N, D]` of frames `[N, BEFORE + FRAME]`."""
        encoded: Tensor = self._encoder(self._spectrum(frames)).squeeze(-1)
        return encoded

    def follow(self, encoded: Tensor) -> Tensor:
        """Probabilities `[N]` of the next frames."""
        hidden, self._state = self._memory(encoded, self._state)
        found: Tensor = self._output(hidden.unsqueeze(-1)).flatten()
        return found

    @classmethod
    def together(cls, networks: Sequence[_Network], pieces: Sequence[Tensor]) -> list[Tensor]:
        """Probabilities of the next frames of several recordings, `[N, BEFORE + FRAME]` of each."""
        first, counts = networks[0], [len(piece) for piece in pieces]
        encoded = first.encode(torch.cat(list(pieces)))
        packed = pack_sequence(list(torch.split(encoded, counts)), enforce_sorted=False)
        none = encoded.new_zeros(1, first._memory.hidden_size)
        states = zip(*(each._state or (none, none) for each in networks), strict=True)
        hidden, (last, memory) = first._memory(
            packed, tuple(torch.stack(list(each), dim=1) for each in states)
        )
        for index, each in enumerate(networks):
            each._state = last[:, index], memory[:, index]
        found = first._output(torch.cat(unpack_sequence(hidden)).unsqueeze(-1)).flatten()
        return list(found.split(counts))


class _FrameByFrame:
    """The same by the package's own call for each frame."""

    def __init__(self, detector: Any) -> None:
        self._detector = copy.deepcopy(detector)  # it has the state of one recording
        self._detector.reset_states()

    def encode(self, frames: Tensor) -> Tensor:
        """The frames themselves."""
        return frames

    def follow(self, frames: Tensor) -> Tensor:
        """Probabilities `[N]` of the next frames `[N, BEFORE + FRAME]`."""
        found = (self._detector(frame, SAMPLING_RATE) for frame in frames[:, BEFORE:])
        return torch.stack([each.reshape(()) for each in found])
