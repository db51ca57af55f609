"""What masks mean, once for all back-ends, and the tensors in the form that kernels want.

Kernels disagree about a query that may attend to nothing: some give zeros, some NaN, and PyTorch's
cuDNN path has given attention without the mask. So no kernel ever sees such a row: it is opened to
all keys, and its output set to zero afterwards, which also stops its gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whisper_flash_attention.flash_attention.problem import AttentionInputs

NEGATIVE_INFINITY = float("-inf")


def lower_right(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """The causal mask aligned bottom-right, bool [1, 1, Lq, Lk]: query i sees j <= i + Lk - Lq."""
    ones = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    return ones.tril(kv_len - q_len)[None, None]


def bias_and_dead_rows(
    inputs: AttentionInputs, dtype: torch.dtype, *, causal_as_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as numbers to add to the scores, and the queries that it leaves without a key.

    A bias holds everything that closes a key: the mask, and `inputs.causal` with it. Kernels get
    either a bias or their own causal flag, never both.

    Args:
        inputs: the call.
        dtype: of the bias.
        causal_as_bias: write `inputs.causal` into a bias even where there is no mask, for kernels
            whose own causal flag is missing or aligned top-left.

    Returns:
        bias: four axes that broadcast to [B, H, Lq, Lk]; None if there is nothing to add.
        dead: bool, broadcasts to [B, Lq, H, 1], for `silence`. None if there is no mask.
    """
    mask = inputs.mask
    causal = None
    if inputs.causal and (causal_as_bias or mask is not None):
        causal = lower_right(inputs.q.shape[1], inputs.k.shape[1], inputs.q.device)
    if mask is None:
        return (None if causal is None else _additive(causal, dtype)), None
    allowed = may_attend(mask) if causal is None else may_attend(mask) & causal
    dead = ~allowed.any(-1, keepdim=True)
    bias = _additive(allowed | dead, dtype)
    if mask.dtype is not torch.bool:
        # Closed keys have their infinity already, and no number may become another one.
        most = min(torch.finfo(dtype).max, torch.finfo(mask.dtype).max)
        finite = mask.masked_fill(~may_attend(mask), 0.0).clamp(-most, most)
        bias = bias + finite.to(dtype)
    return bias, dead.transpose(1, 2)


def may_attend(mask: Tensor) -> Tensor:
    """The mask as bool. A number at or below its dtype's lowest finite one closes a key."""
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min


def silence(out: Tensor, dead: Tensor | None) -> Tensor:
    """`out` [B, Lq, H, D] with zeros for the dead queries, and no gradient through them."""
    return out if dead is None else out.masked_fill(dead, 0.0)


def padded_bias(bias: Tensor, inputs: AttentionInputs) -> Tensor:
    """`bias` expanded to [B, H, Lq, Lk], its rows a multiple of 16 numbers apart.

    The memory-efficient kernels of PyTorch and xFormers read whole vectors and want this layout.
    """
    kv_len = inputs.k.shape[1]
    spare = -kv_len % 16
    bias = bias.expand(*bias.shape[:3], kv_len)
    aligned = torch.nn.functional.pad(bias, (0, spare)).contiguous()[..., :kv_len]
    return aligned.expand(inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1], kv_len)


def kernel_ready(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if kernels would misread it.

    They take any strides but want the last axis dense and every row to begin on 16 bytes; PyTorch's
    CPU flash kernel does not even check the former.
    """
    numbers = 16 // tensor.element_size()
    *outer, last = tensor.stride()
    aligned = tensor.storage_offset() % numbers == 0 and all(s % numbers == 0 for s in outer)
    if last == 1 and aligned:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where `allowed`, minus infinity elsewhere."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, NEGATIVE_INFINITY)
