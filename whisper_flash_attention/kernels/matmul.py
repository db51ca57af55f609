"""Linear layers of many rows on tensor cores, fused with GELU and residual.

    out = residual + gelu?(x @ weight.T + bias)

Rows may overlap in memory: with a row stride of one time step's channels, a convolution over time
is such a product, without a copy of its windows.

Operands come through tensor descriptors (the tensor memory accelerator of CUDA capability 9.0).
The exact GELU is that of Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: there
erfc is a product, so that its relative error stays small where it is small.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from whisper_flash_attention.kernels._checks import check_matmul
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait

MOST_PARTS = 3
_FEW_TILES = 100


@dataclass(frozen=True)
class Config:
    """How a product is cut into programs.

    Args:
        block_m, block_n: rows and columns of the result that a program computes at a time.
        block_k: columns of `x` per step.
        warps, stages: Triton's num_warps and num_stages.
        programs: maximum number launched, n programs with every n-th tile each; 0: one per tile.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    programs: int = 0


def choose(rows: int, n: int, *, parts: int = 1, gelu: bool = False) -> Config:
    """Choose tiles of a product of `rows` rows with `parts` weights of `n` rows each.

    Tuned for GPUs of about 132 processors. With 8 warps two programs share a processor, so that
    the GELU of one overlaps with the products of the other.
    """
    tiles = triton.cdiv(rows, 128) * triton.cdiv(n, 128) * parts
    if tiles < _FEW_TILES:
        return Config(64, 128, 64, warps=4, stages=4)
    if gelu:
        return Config(128, 128, 64, warps=8, stages=3)
    persistent = parts > 1 and tiles > 4 * _FEW_TILES
    return Config(128, 128, 64, warps=4, stages=3, programs=264 if persistent else 0)


def matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out: Tensor,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """out = residual + gelu?(x @ weights.T + biases), the weights' results side by side.

    All in float32, with one rounding at the end.

    Args:
        x: [B, R, K], any multiples of 16 bytes from row to row, the last axis dense; rows may
            overlap.
        weights: one to three [N, K], contiguous; float16, bfloat16 or float32, like all tensors.
        biases: as many, [N] or None.
        out: [B, R, N * len(weights)], written; the last axis dense. Or, of a single weight and
            without a residual, [B, H, R, N / H]: columns apart by heads.
        gelu: apply the exact GELU.
        residual: [B, R, N * len(weights)], the last axis dense; may be `out` itself. Clips may
            share it (an expanded first axis).
        config: overrides `choose`.

    Raises:
        KernelShapeError: shapes, dtypes, devices or strides do not fit together.
    """
    check_matmul(x, weights, biases, out, residual, MOST_PARTS)
    clips, rows, k = x.shape
    n, parts = weights[0].shape[0], len(weights)
    config = config or choose(clips * rows, n, parts=parts, gelu=gelu)
    head = out.shape[-1] if out.ndim == 4 else 0
    tiles = clips * triton.cdiv(rows, config.block_m) * parts * triton.cdiv(n, config.block_n)
    launch(matmul_kernel, (min(tiles, config.programs or tiles),))(
        _box(x, config.block_m, config.block_k),
        *_operands(weights, config),
        *biases,
        *[None] * (MOST_PARTS - parts),
        residual,
        out,
        rows,
        out.stride(0),
        out.stride(-2),
        out.stride(1) if head else 0,
        0 if residual is None else residual.stride(0),
        0 if residual is None else residual.stride(1),
        tiles,
        N=n,
        K=k,
        PARTS=parts,
        HEAD=head,
        GELU=gelu,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PERSISTENT=config.programs > 0,
        num_warps=config.warps,
        num_stages=config.stages,
        **pdl(x.device),
    )


def _operands(weights: Sequence[Tensor], config: Config) -> list[Any]:
    """A descriptor of a single weight; pointers of several, among which the kernel chooses."""
    if len(weights) == 1:
        return [_box(weights[0][None], config.block_n, config.block_k), None, None]
    return [*weights, *[weights[-1]] * (MOST_PARTS - len(weights))]


def _box(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of [1, rows, columns]; zeros beyond the tensor, where nothing is written either."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    # The hardware requires a valid stride even of an axis of length 1.
    if shape[0] == 1:
        strides[0] = shape[1] * strides[1]
    return TensorDescriptor(tensor, shape, strides, [1, rows, columns])


@triton.jit(do_not_specialize=["rows", "tiles"])
def matmul_kernel(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    residual,
    out,
    rows,
    out_clip,
    out_row,
    out_head,
    residual_clip,
    residual_row,
    tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """A single weight is the descriptor `w0`; several weights are pointers. `HEAD` columns of `out`
    are adjacent, all if 0.

    Tiles of one block of rows are adjacent in the grid, so that its rows are read once.
    """
    release(PDL)
    wait(PDL)
    WIDE: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    high = tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        place = tile % (WIDE * PARTS)
        part, column = place // WIDE, (place % WIDE) * BLOCK_N
        block = tile // (WIDE * PARTS)
        clip, row = block // high, (block % high) * BLOCK_M
        n = column + tl.arange(0, BLOCK_N)
        weight = w0
        if PARTS > 1:
            weight = tl.where(part == 0, w0, tl.where(part == 1, w1, w2))
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = tl.reshape(x.load([clip, row, k]), (BLOCK_M, BLOCK_K))
            if PARTS == 1:
                b = tl.reshape(w0.load([0, column, k]), (BLOCK_N, BLOCK_K))
            else:
                b = _weight_tile(weight, n, k + tl.arange(0, BLOCK_K), N, K, BLOCK_K)
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        if not PERSISTENT:
            release_late(PDL)
        added = _bias(b0, n, part == 0, N) + _bias(b1, n, part == 1, N)
        sums += (added + _bias(b2, n, part == 2, N))[None, :]
        if GELU:
            sums = _gelu(sums)
        r = (row + tl.arange(0, BLOCK_M))[:, None]
        inside = (r < rows) & (n < N)[None, :]
        r = r.to(tl.int64)
        at = (part * N + n)[None, :]
        if residual is not None:
            before = residual + clip.to(tl.int64) * residual_clip + r * residual_row + at
            sums += tl.load(before, mask=inside, other=0.0)
        if HEAD:
            at = (n // HEAD * out_head + n % HEAD)[None, :]
        after = out + clip.to(tl.int64) * out_clip + r * out_row + at
        tl.store(after, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_tile(weight, n, k, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows n and columns k of a weight [N, K], zero beyond it; rows beyond repeat the last."""
    at = weight + tl.minimum(n, N - 1)[:, None] * K + k[None, :]
    return tl.load(at) if K % BLOCK_K == 0 else tl.load(at, mask=(k < K)[None, :], other=0.0)


@triton.jit
def _bias(bias, n, wanted, N: tl.constexpr):
    """float32 bias of the columns n; zeros if there is none or `wanted` is false."""
    if bias is None:
        added = tl.zeros(n.shape, tl.float32)
    else:
        added = tl.load(bias + n, mask=n < tl.where(wanted, N, 0), other=0.0).to(tl.float32)
    return added


@triton.jit
def _gelu(x):
    """x Phi(x), where Phi(-|x|) = erfc(z) / 2 = poly(1 / (1 + p z)) exp(-z^2) / 2, z^2 = x^2/2."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    poly = t * (0.254829592 + t * (-0.284496736 + t * poly))
    tail = 0.5 * poly * tl.exp2(z * z * -1.4426950408889634)
    return x * tl.where(x >= 0, 1.0 - tail, tail)
