"""Buffers between the kernels `logits` and `greedy_sample`."""

from __future__ import annotations

import torch
import triton

from whisper_flash_attention.kernels.logits import Config, Partials, choose


def empty_partials(slots: int, embedding: torch.Tensor, config: Config | None = None) -> Partials:
    """Buffers for a number of slots and an embedding [V, D], on its device."""
    vocabulary, width = embedding.shape
    config = config or choose(slots, width, embedding.dtype)
    shape = (slots, triton.cdiv(vocabulary, config.block_n))
    return Partials(
        torch.empty((4, *shape), dtype=torch.float32, device=embedding.device),
        torch.empty((2, *shape), dtype=torch.int32, device=embedding.device),
        config,
    )
