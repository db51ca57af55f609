"""An attention call with its tensors (`AttentionInputs`) and without them (`AttentionProblem`).

A back-end decides from the problem alone whether it can run a call, so that the choice can be
cached, explained and tested without a GPU.

Masks have one meaning for all back-ends. Kernels disagree about a query that may attend to nothing:
some give zeros, some NaN, and PyTorch's cuDNN path has given attention without the mask. No kernel
gets such a row: it is opened to all keys, and its output and gradients are set to zero afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class MaskKind(Enum):
    """The kind of a mask: none, True = may attend, or a number added to the score."""

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
        """The device's name: "cpu", "cuda:0"."""
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
    problem: AttentionProblem = field(init=False)
    """This call without its tensors."""

    def __post_init__(self) -> None:
        q, k, v, mask = self.q, self.k, self.v, self.mask
        shapes = (q.shape, k.shape, v.shape)
        masked = None if mask is None else (mask.shape, mask.dtype, mask.device, mask.requires_grad)
        others = (
            (q.dtype, k.dtype, v.dtype),
            (q.device, k.device, v.device),
            self.causal,
            self.dropout,
            (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled(),
        )
        try:
            self.problem = _checked_problem(shapes, masked, *others)
        except TypeError:
            # While a compiler traces, sizes are symbols, which have no hash; choosing a back-end
            # fixes them.
            if masked is not None:
                masked = (_numbers(masked[0]), *masked[1:])
            self.problem = _checked_problem(tuple(map(_numbers, shapes)), masked, *others)
        self.causal = self.problem.causal
        if mask is not None and mask.ndim < 4:
            self.mask = mask.reshape(self.problem.mask_shape)

    @property
    def factor(self) -> float:
        """The factor of the scores as a number."""
        return 1.0 / math.sqrt(self.q.shape[3]) if self.scale is None else self.scale

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        return self.problem.needs_grad

    @property
    def is_square(self) -> bool:
        """As many queries as keys: aligning causality top-left and bottom-right is the same."""
        return self.problem.q_len == self.problem.kv_len


class Backend(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """Its name as a value of `backend`."""

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """Every reason why this back-end cannot run `problem`; empty if it can."""

    def run(self, inputs: AttentionInputs) -> Tensor:
        """softmax(scale · q kᵀ + mask) v, as [B, Lq, H, D] in the dtype of q.

        Only called for inputs that it supports. A query that may attend to nothing gets zeros and
        zero gradients.
        """


def dtype_name(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")


_MaskSignature = tuple[torch.Size, torch.dtype, torch.device, bool]


def _numbers(shape: torch.Size) -> torch.Size:
    return torch.Size(map(int, shape))


@lru_cache(maxsize=8192)
def _checked_problem(
    shapes: tuple[torch.Size, ...],
    mask: _MaskSignature | None,
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    causal: bool,
    dropout: float,
    needs_grad: bool,
) -> AttentionProblem:
    """The problem of a call whose q, k, v and mask fit together; cached for decode loops."""
    _check_kinds(shapes, dtypes, devices)
    _check_shapes(*shapes)
    batch, q_len, heads, head_dim = shapes[0]
    kv_len = shapes[1][1]
    if causal and kv_len < q_len:
        raise ValueError(
            f"causal attention needs at least as many keys as queries, "
            f"but k has {kv_len} and q has {q_len}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), but is {dropout}")
    kind = MaskKind.NONE
    mask_shape: tuple[int, ...] = ()
    if mask is not None:
        kind = MaskKind.BOOL if mask[1] is torch.bool else MaskKind.ADDITIVE
        mask_shape = _checked_mask_shape(mask, (batch, heads, q_len, kv_len), devices[0])
    return AttentionProblem(
        device_type=devices[0].type,
        device_index=devices[0].index or 0,
        dtype=dtypes[0],
        batch=batch,
        heads=heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        causal=causal and q_len > 1,
        mask=kind,
        mask_shape=mask_shape,
        dropout=dropout,
        needs_grad=needs_grad,
    )


def _check_kinds(
    shapes: Sequence[torch.Size],
    dtypes: Sequence[torch.dtype],
    devices: Sequence[torch.device],
) -> None:
    for name, shape, dtype, device in zip("qkv", shapes, dtypes, devices, strict=True):
        if len(shape) != 4:
            raise ValueError(f"{name} must be [B, L, H, D], but has shape {list(shape)}")
        if device != devices[0] or dtype != dtypes[0]:
            raise ValueError(
                f"q, k and v must share one dtype and device, but q is {dtype_name(dtypes[0])} on "
                f"{devices[0]} and {name} is {dtype_name(dtype)} on {device}"
            )
    if not dtypes[0].is_floating_point:
        raise ValueError(f"q, k and v must be floating point, but are {dtype_name(dtypes[0])}")


def _check_shapes(q: torch.Size, k: torch.Size, v: torch.Size) -> None:
    if k != v or k != (q[0], k[1], *q[2:]):
        raise ValueError(
            f"q [B, Lq, H, D], k and v [B, Lk, H, D] must agree on B, H and D, but q is "
            f"{list(q)}, k is {list(k)} and v is {list(v)}"
        )
    if 0 in (*q, k[1]):
        raise ValueError(f"q {list(q)} and k {list(k)} must not have an empty axis")


def _checked_mask_shape(
    mask: _MaskSignature, full: tuple[int, int, int, int], device: torch.device
) -> tuple[int, ...]:
    shape = (1,) * (4 - len(mask[0])) + tuple(mask[0])
    _, dtype, mask_device, requires_grad = mask
    if len(shape) != 4 or any(
        have not in (1, want) for have, want in zip(shape, full, strict=True)
    ):
        raise ValueError(
            f"the mask must broadcast to [B, H, Lq, Lk] = {list(full)}, "
            f"but has shape {list(mask[0])}"
        )
    if mask_device != device:
        raise ValueError(f"the mask is on {mask_device}, but q is on {device}")
    if dtype is not torch.bool and not dtype.is_floating_point:
        raise ValueError(
            f"the mask must be bool (True = may attend) or floating point (added to the scores), "
            f"but is {dtype_name(dtype)}"
        )
    if requires_grad:
        raise ValueError("gradients of the mask are not computed: pass mask.detach()")
    return shape


NEGATIVE_INFINITY = float("-inf")


def lower_right(q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """The causal mask aligned bottom-right, bool [1, 1, Lq, Lk]: query i sees j <= i + Lk - Lq."""
    ones = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    return ones.tril(kv_len - q_len)[None, None]


def bias_and_dead_rows(
    inputs: AttentionInputs, dtype: torch.dtype, *, causal_as_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as numbers to add to the scores, and the queries that it leaves without a key.

    A bias includes the mask and `inputs.causal`. Kernels get either a bias or their own causal
    flag, never both.

    Args:
        inputs: the call.
        dtype: of the bias.
        causal_as_bias: turn `inputs.causal` into a bias even without a mask, for kernels whose own
            causal flag is missing or aligned top-left.

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
        # Closed keys have minus infinity already; no other number may overflow to infinity.
        most = min(torch.finfo(dtype).max, torch.finfo(mask.dtype).max)
        finite = mask.masked_fill(~may_attend(mask), 0.0).clamp(-most, most)
        bias = bias + finite.to(dtype)
    return bias, dead.transpose(1, 2)


def may_attend(mask: Tensor) -> Tensor:
    """The mask as bool; numbers at or below the dtype's lowest finite one mean "may not attend"."""
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min


def silence(out: Tensor, dead: Tensor | None) -> Tensor:
    """`out` [B, Lq, H, D] with zeros for the dead queries, and no gradient through them."""
    return out if dead is None else out.masked_fill(dead, 0.0)


def padded_bias(bias: Tensor, inputs: AttentionInputs) -> Tensor:
    """`bias` expanded to [B, H, Lq, Lk], its rows a multiple of 16 numbers apart.

    The memory-efficient kernels of PyTorch and xFormers read whole vectors and require this layout.
    """
    kv_len = inputs.k.shape[1]
    spare = -kv_len % 16
    bias = bias.expand(*bias.shape[:3], kv_len)
    aligned = torch.nn.functional.pad(bias, (0, spare)).contiguous()[..., :kv_len]
    return aligned.expand(inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1], kv_len)


def kernel_ready(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless its last axis is dense and its rows are aligned to 16 bytes.

    Kernels support any other strides; PyTorch's CPU flash kernel does not check the last axis.
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
