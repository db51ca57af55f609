"""Attention as its formula says: the oracle for every other back-end, and what always can."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whisper_flash_attention.flash_attention.base import AttentionInputs, AttentionProblem
from whisper_flash_attention.flash_attention.masking import bias_and_dead_rows, silence


@dataclass(frozen=True, slots=True)
class Reference:
    """softmax(scale · q kᵀ + mask) v in float32 (float64 for float64), all weights in memory."""

    name: str = "reference"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """No reason ever: every device, dtype, mask and dropout will do."""
        return []

    def run(self, inputs: AttentionInputs) -> Tensor:
        """[B, Lq, H, D] in the dtype of q; dropout falls on the weights."""
        return _output(_weights(inputs), inputs)

    def run_with_weights(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """What `run` gives, and the weights before dropout [B, H, Lq, Lk] in the dtype of q."""
        weights = _weights(inputs)
        return _output(weights, inputs), weights.to(inputs.q.dtype)


def attention_weights(inputs: AttentionInputs) -> Tensor:
    """The attention weights [B, H, Lq, Lk] in the dtype of q, before dropout.

    Rows sum to 1, except those of queries that may attend to nothing: they are zero.
    """
    return _weights(inputs).to(inputs.q.dtype)


def _weights(inputs: AttentionInputs) -> Tensor:
    """Weights before dropout [B, H, Lq, Lk], float32 or float64."""
    wide = torch.float64 if inputs.q.dtype is torch.float64 else torch.float32
    q = inputs.q.transpose(1, 2).to(wide)  # [B, H, Lq, D]
    k = inputs.k.transpose(1, 2).to(wide)
    scores = torch.matmul(q * inputs.factor, k.transpose(2, 3))
    bias, dead = bias_and_dead_rows(inputs, wide, causal_as_bias=True)
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    return silence(weights, None if dead is None else dead.transpose(1, 2))


def _output(weights: Tensor, inputs: AttentionInputs) -> Tensor:
    if inputs.dropout:
        weights = torch.dropout(weights, inputs.dropout, train=True)
    v = inputs.v.transpose(1, 2).to(weights.dtype)
    return torch.matmul(weights, v).transpose(1, 2).to(inputs.q.dtype)
