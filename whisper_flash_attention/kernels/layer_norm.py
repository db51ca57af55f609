"""Layer norm of many rows, with the encoder's operations on its residual stream at that point.

Bound by memory bandwidth, hence one pass: a program holds whole rows in registers and reads each
value once. It also clamps float16 as Transformers does after each layer, and adds the biases of
linear layers whose products were added to the stream without them.

Numbers are as in `torch.nn.functional.layer_norm`: mean, then variance around it, in float32; one
rounding at the end. Layer normalisation: Ba, Kiros and Hinton, 2016 (arXiv:1607.06450).
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.kernels._checks import check_layer_norm
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait

# 16-byte loads that a thread has in flight: enough of them, and few enough registers.
_LOADS = 4
# From this number of rows on bandwidth counts, and before that the time of one row.
_MANY_ROWS = 8192


@dataclass(frozen=True)
class Config:
    """How rows are cut into programs.

    Args:
        rows: whole rows that a program takes, a power of two.
        warps: Triton's num_warps. With one, no sum needs an exchange between warps.
    """

    rows: int
    warps: int


def choose(rows: int, d: int, dtype: torch.dtype) -> Config:
    """Choose tiles of [rows, d]: one warp if a row fits, several short rows if there are many.

    Tuned for GPUs of about 132 processors.
    """
    # Threads' worth of 16-byte loads in one row.
    vectors = triton.next_power_of_2(d) * dtype.itemsize // 16
    loads = _LOADS if rows >= _MANY_ROWS else 1
    warps = min(8, max(1, vectors // (32 * loads)))
    several = 2 if vectors * 2 <= 32 * _LOADS and rows >= _MANY_ROWS else 1
    return Config(several, warps)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    eps: float,
    limit: float | None = None,
    shift: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """out = norm(v) * weight + bias, where v is x + shift, clamped.

    Args:
        x: [R, D] with adjacent values within a row, rows at any distance; float16, bfloat16 or
            float32.
        weight, bias: [D] each, contiguous, like x in dtype and device.
        out: [R, D] like x, with a distance of rows of its own; written. May be `x` itself.
        eps: added to the variance.
        limit: clamp x + shift to [-limit, limit], the limit rounded to x's dtype as by
            `torch.clamp`. NaN stays NaN.
        shift: [D] in float32, added to x.
        config: overrides `choose`.

    Raises:
        KernelShapeError: shapes, strides, dtypes or devices do not fit together.
    """
    check_layer_norm(x, weight, bias, out, limit, shift)
    rows, d = x.shape
    if rows == 0:
        return
    config = config or choose(rows, d, x.dtype)
    launch(layer_norm_kernel, (triton.cdiv(rows, config.rows),))(
        x,
        weight,
        bias,
        shift,
        out,
        rows,
        x.stride(0),
        out.stride(0),
        eps,
        limit,
        D=d,
        ROWS=config.rows,
        BLOCK=triton.next_power_of_2(d),
        num_warps=config.warps,
        **pdl(x.device),
    )


@triton.jit
def layer_norm_kernel(
    x,
    weight,
    bias,
    shift,
    out,
    rows,
    x_stride,
    out_stride,
    eps,
    limit,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of D values, padded to BLOCK in registers."""
    dtype: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, BLOCK)
    real = column < D
    gain = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    release(PDL)
    wait(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & real[None, :]
    at = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    release_late(PDL)
    if shift is not None:
        v += tl.load(shift + column, mask=real, other=0.0)[None, :]
    if limit is not None:
        bound = tl.cast(limit, dtype).to(tl.float32)
        v = tl.clamp(v, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    mean = tl.sum(v, 1) / D
    centred = tl.where(real[None, :], v - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    scaled = centred * tl.rsqrt(variance + eps)[:, None]
    normed = scaled * gain[None, :] + offset[None, :]
    to = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(to, normed.to(dtype), mask=inside)
