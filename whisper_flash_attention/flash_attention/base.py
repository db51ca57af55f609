"""What an attention call is, in tensors (`AttentionInputs`) and without them (`AttentionProblem`).

A back-end says from the problem alone whether it can run a call, so that the choice can be cached,
explained and tested without a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class MaskKind(Enum):
    """How a mask speaks: not at all, True = may attend, or a number added to the score."""

    NONE = "none"
    BOOL = "bool"
    ADDITIVE = "additive"


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One attention call without its tensors; hashable, so that a choice can be cached on it.

    `causal` is False for a one-token query, which sees every key. `mask_shape` has four axes that
    broadcast to [batch, heads, q_len, kv_len]; it is () where there is no mask.
    """

    device_type: str
    device_index: int
    dtype: torch.dtype
    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    causal: bool = False
    mask: MaskKind = MaskKind.NONE
    mask_shape: tuple[int, ...] = ()
    dropout: float = 0.0
    needs_grad: bool = False

    def __str__(self) -> str:
        width = f"{self.heads}, {self.head_dim}"
        parts = [
            f"q [{self.batch}, {self.q_len}, {width}]",
            f"k and v [{self.batch}, {self.kv_len}, {width}]",
            f"{dtype_name(self.dtype)} on {self.device}",
        ]
        if self.causal:
            parts.append("causal")
        if self.mask is not MaskKind.NONE:
            parts.append(f"{self.mask.value} mask {list(self.mask_shape)}")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        if self.needs_grad:
            parts.append("with gradients")
        return ", ".join(parts)

    @property
    def device(self) -> str:
        """The device as people write it: "cpu", "cuda:0"."""
        return "cpu" if self.device_type == "cpu" else f"{self.device_type}:{self.device_index}"


@dataclass(slots=True)
class AttentionInputs:
    """The tensors and options of one attention call, checked and normalised when made.

    Args:
        q: queries [B, Lq, H, D], floating point.
        k, v: keys and values [B, Lk, H, D], same dtype and device as `q`.
        causal: query i sees the keys j <= i + Lk - Lq: both sequences end at the same position
            (aligned bottom-right), so a one-token query against a cache sees every key.
        mask: broadcastable to [B, H, Lq, Lk]; bool (True = may attend) or floating point, added
            to the scores, where minus infinity or the dtype's lowest number means "may not
            attend". A mask and `causal` both apply. Gradients with respect to it are not computed.
        scale: factor of the scores; 1 / sqrt(D) if None.
        dropout: share of the attention weights dropped, in [0, 1).

    After checking, `mask` has four axes and `causal` is False where Lq is 1.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    mask: Tensor | None = None
    scale: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_tensors(self.q, self.k, self.v)
        # While a compiler traces, sizes are symbols; the choice of a kernel fixes them.
        q_len, kv_len = int(self.q.shape[1]), int(self.k.shape[1])
        if self.causal and kv_len < q_len:
            raise ValueError(
                f"causal attention needs at least as many keys as queries, "
                f"but k has {kv_len} and q has {q_len}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), but is {self.dropout}")
        self.causal = self.causal and q_len > 1
        if self.mask is not None:
            self.mask = _checked_mask(self.mask, self.q, kv_len)

    @property
    def factor(self) -> float:
        """The factor of the scores as a number."""
        return 1.0 / math.sqrt(self.q.shape[3]) if self.scale is None else self.scale

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        wanted = self.q.requires_grad or self.k.requires_grad or self.v.requires_grad
        return wanted and torch.is_grad_enabled()

    @property
    def is_square(self) -> bool:
        """As many queries as keys: aligning causality top-left and bottom-right is the same."""
        return self.q.shape[1] == self.k.shape[1]

    @property
    def problem(self) -> AttentionProblem:
        """This call without its tensors."""
        q, mask = self.q, self.mask
        batch, q_len, heads, head_dim = map(int, q.shape)
        kind = MaskKind.NONE
        if mask is not None:
            kind = MaskKind.BOOL if mask.dtype is torch.bool else MaskKind.ADDITIVE
        return AttentionProblem(
            device_type=q.device.type,
            device_index=q.device.index or 0,
            dtype=q.dtype,
            batch=batch,
            heads=heads,
            q_len=q_len,
            kv_len=int(self.k.shape[1]),
            head_dim=head_dim,
            causal=self.causal,
            mask=kind,
            mask_shape=() if mask is None else tuple(map(int, mask.shape)),
            dropout=self.dropout,
            needs_grad=self.needs_grad,
        )


class Backend(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """The name under which people ask for it."""

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """Every reason why this back-end cannot run `problem`; empty if it can."""

    def run(self, inputs: AttentionInputs) -> Tensor:
        """softmax(scale · q kᵀ + mask) v, as [B, Lq, H, D] in the dtype of q.

        Only called for inputs without a reason against them. A query that may attend to nothing
        gets zeros, and passes zero gradients on.
        """


def dtype_name(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [B, L, H, D], but has shape {list(tensor.shape)}")
        if tensor.device != q.device or tensor.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must share one dtype and device, but q is {dtype_name(q.dtype)} on "
                f"{q.device} and {name} is {dtype_name(tensor.dtype)} on {tensor.device}"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating point, but are {dtype_name(q.dtype)}")
    batch, q_len, heads, head_dim = q.shape
    kv_len = k.shape[1]
    if k.shape != v.shape or k.shape != (batch, kv_len, heads, head_dim):
        raise ValueError(
            f"q [B, Lq, H, D], k and v [B, Lk, H, D] must agree on B, H and D, but q is "
            f"{list(q.shape)}, k is {list(k.shape)} and v is {list(v.shape)}"
        )
    if 0 in (batch, q_len, heads, head_dim, kv_len):
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must not have an empty axis")


def _checked_mask(mask: Tensor, q: Tensor, kv_len: int) -> Tensor:
    batch, q_len, heads, _ = q.shape
    full = (batch, heads, q_len, kv_len)
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    fits = len(shape) == 4 and all(
        have in (1, want) for have, want in zip(shape, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"the mask must broadcast to [B, H, Lq, Lk] = {list(full)}, "
            f"but has shape {list(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"the mask is on {mask.device}, but q is on {q.device}")
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(
            f"the mask must be bool (True = may attend) or floating point (added to the scores), "
            f"but is {dtype_name(mask.dtype)}"
        )
    if mask.requires_grad:
        raise ValueError("gradients of the mask are not computed: pass mask.detach()")
    return mask.reshape(shape)
