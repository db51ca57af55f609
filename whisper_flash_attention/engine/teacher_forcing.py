"""One pass of the decoder over given tokens, in PyTorch, that shows its cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from whisper_flash_attention.engine.cuda_graphs import to_device
from whisper_flash_attention.engine.torch_decoder import SCALE, join_heads, split_heads
from whisper_flash_attention.engine.weights import (
    DecoderLayer,
    DecoderWeights,
    embed,
    keys_values,
    linear,
    normalize,
    queries_keys_values,
)

# Takes a layer's index, queries [B, H, L, 64] and keys [B, H, S, 64] of its cross-attention.
Record = Callable[[int, Tensor, Tensor], None]


class TeacherForcing:
    """One pass of the decoder over a few rows, padded on the right to the longest.

    Causal self-attention hides the padding from the tokens before it.

    Args:
        weights: on the device and in the dtype of the states.
        states: the encoder's output [S, D] of each row.
        tokens: ids of each row.
        audio: positions of the encoder's output with audio, of each row.

    Attributes:
        token_ids: [B, L] int64, on the host; tokens: the same, on the device.
        lengths: [B] int64, on the host.
        positions: P, the most positions with audio.
        padding: bool [B, 1, 1, P]: positions without audio; None if there are none.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        states: Sequence[Tensor],
        tokens: Sequence[Sequence[int]],
        audio: Sequence[int],
    ) -> None:
        self._weights = weights
        self._states = torch.stack(list(states))
        self.lengths = np.array([len(each) for each in tokens])
        self.token_ids = np.zeros((len(tokens), self.lengths.max()), np.int64)
        for ids, row in zip(self.token_ids, tokens, strict=True):
            ids[: len(row)] = row
        self.tokens = to_device(self.token_ids, weights.embedding.device)
        self.positions = max(audio)
        self.padding: Tensor | None = None
        if min(audio) < self.positions:
            device = weights.embedding.device
            seen = to_device(np.array(audio), device)[:, None, None, None]
            self.padding = torch.arange(self.positions, device=device) >= seen

    def run(self, record: Record, *, to_the_end: bool = True) -> Tensor:
        """Return the residual stream [B, L, D] after all layers.

        Args:
            record: called for every layer.
            to_the_end: whether to compute the last layer after its queries and keys are recorded,
                and so a result that logits could be computed from.
        """
        weights = self._weights
        x = embed(self.tokens, weights) + weights.positions[: self.tokens.shape[1]]
        for index, layer in enumerate(weights.layers):
            x += _self_attention(layer, x)
            attention = layer.cross_attention
            q = split_heads(linear(normalize(x, layer.cross_norm), attention.q))
            k, v = (split_heads(each) for each in keys_values(self._states, attention))
            record(index, q, k)
            if index == len(weights.layers) - 1 and not to_the_end:
                break
            out = F.scaled_dot_product_attention(q, k, v)
            x += linear(join_heads(out), attention.out)
            hidden = F.gelu(linear(normalize(x, layer.ffn_norm), layer.fc1))
            x += linear(hidden, layer.fc2)
        return x

    def scores(self, q: Tensor, k: Tensor, factor: float = 1.0) -> Tensor:
        """Compute attention scores [B, H, L, P] float32, -inf where there is no audio.

        Args:
            q: [B, H, L, 64].
            k: [B, H, S, 64], S at least P.
            factor: by which the usual scores are multiplied.
        """
        keys = k[:, :, : self.positions].float()
        scores = torch.matmul(q.float() * (SCALE * factor), keys.transpose(2, 3))
        if self.padding is not None:
            scores.masked_fill_(self.padding, -torch.inf)
        return scores


def _self_attention(layer: DecoderLayer, x: Tensor) -> Tensor:
    attention = layer.self_attention
    projected = queries_keys_values(normalize(x, layer.self_norm), attention)
    q, k, v = (split_heads(each) for each in projected)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(join_heads(out), attention.out)
