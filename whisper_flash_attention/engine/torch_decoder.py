"""The decoder as plain PyTorch: what the CPU, and devices without Triton, run."""

from __future__ import annotations

import torch

from whisper_flash_attention.engine import torch_layers
from whisper_flash_attention.engine.kv_cache import DecodeState
from whisper_flash_attention.engine.weights import DecoderWeights


class PlainDecoder:
    """Turns tokens into logits, one pass at a time, on the state's buffers."""

    def __init__(self, weights: DecoderWeights, state: DecodeState) -> None:
        self._weights = weights
        self._state = state
        self._length = 0
        # What was last watched, [B] float32.
        self.watched: torch.Tensor | None = None

    @property
    def state(self) -> DecodeState:
        """The buffers that the decoder works on."""
        return self._state

    def start(
        self, states: torch.Tensor, prompt: torch.Tensor, watch: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Take the encoder's states [clips, S, D] and the prompt [B, P]; give logits [B, V]."""
        self._length = 0
        torch_layers.fill_cross(self._weights, states, self._state)
        logits = self.extend(prompt)
        if watch is not None:
            token, place = watch
            self.watched = torch_layers.probability(self._weights, self._last[:, place], token)
        return logits

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token per row [B] and give the next logits [B, V] in float32."""
        return self.extend(tokens[:, None])

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [B, P] and give the logits [B, V] after the last."""
        self._last = torch_layers.forward(self._weights, self._state, tokens, self._length)
        self._length += tokens.shape[1]
        return torch_layers.logits(self._weights, self._last[:, -1])
