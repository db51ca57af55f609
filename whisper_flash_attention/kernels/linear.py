"""Linear layers of a few rows: layer norm before, GELU and residual after, in one kernel.

A decode step multiplies few rows by large matrices, so its time is that of loading weights. Two
variants compute the same:

    "gemv"  CUDA cores. A program holds `block_n` whole rows of the weight in registers, all loads
            in flight at once and before it waits for its input. For one or two rows.
    "dot"   tensor cores, in chunks of `block_k` columns, pipelined. With `split` > 1 each chunk
            is cut into that many slices, which warps multiply in parallel and add up at the end,
            because with few rows the chain of dependent products dominates the time.

Numbers are as in PyTorch's own layers: layer norm in float32, rounded to the buffers' dtype;
products accumulated in float32; a linear layer's result rounded before its GELU, which is exact
(erf) and in float32. The residual is added in float32, before the one rounding.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels._checks import HEAD_WIDTH, check_linear, check_qkv
from whisper_flash_attention.kernels.launch import (
    interpreted,
    launch,
    pdl,
    release,
    release_late,
    shared_memory,
    wait,
)

_GEMV_ROWS = 2
_PROGRAMS = 128


@dataclass(frozen=True)
class Config:
    """How a linear layer is cut into programs.

    Args:
        variant: "gemv" (CUDA cores) or "dot" (tensor cores).
        block_m, block_n: rows and columns of the result that a program computes; powers of two,
            at least 16 for "dot".
        block_k: columns of the weight per step, a power of two; at least K for "gemv".
        split: slices of `block_k` that "dot" multiplies side by side, each at least 16 wide.
        warps, stages: Triton's num_warps and num_stages.
    """

    variant: Literal["gemv", "dot"]
    block_m: int
    block_n: int
    block_k: int
    split: int = 1
    warps: int = 4
    stages: int = 1


def choose(rows: int, n: int, k: int, dtype: torch.dtype, *, norm: bool = False) -> Config:
    """Choose tiles of x [rows, k] times a weight [n, k]; `norm`: with a layer norm before it.

    Tuned for GPUs of about 132 processors.
    """
    if rows <= _GEMV_ROWS:
        return _choose_gemv(rows, n, k, dtype.itemsize)
    if dtype == torch.float32:
        return Config("dot", 16, 16, 64, split=4, stages=2)
    if rows > 64 and not norm:
        return _choose_many(rows, n)
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    row_blocks = triton.cdiv(rows, block_m)
    block_n = 64
    while block_n > 16 and row_blocks * triton.cdiv(n, block_n) < _PROGRAMS:
        block_n //= 2
    # Large tiles have enough independent products, and too few registers for slices.
    if block_m * block_n > 2048 or (norm and block_m == 64):
        return Config("dot", block_m, block_n, 64, stages=4)
    if block_m == 64:
        return Config("dot", block_m, block_n, 128, split=4, stages=4)
    if k < 1024 or k % 512:
        return Config("dot", block_m, block_n, 256, split=4, stages=3)
    if norm:
        return Config("dot", block_m, block_n, 512, split=8, warps=8, stages=3)
    return Config("dot", block_m, block_n, 512, split=4, stages=4)


def fitting(config: Config, itemsize: int, shared: int) -> Config:
    """`config` with as many stages as `shared` bytes of shared memory hold, at least one."""
    stage = (config.block_m + config.block_n) * config.block_k * itemsize
    return replace(config, stages=max(1, min(config.stages, shared // stage)))


def _choose_many(rows: int, n: int) -> Config:
    """Square tiles if they occupy most processors; long steps for one program per processor."""
    row_blocks = triton.cdiv(rows, 64)
    block_n = 64 if row_blocks * triton.cdiv(n, 64) >= _PROGRAMS * 3 // 4 else 32
    programs = row_blocks * triton.cdiv(n, block_n)
    return Config("dot", 64, block_n, 128 if programs <= _PROGRAMS else 64, stages=5)


def _choose_gemv(rows: int, n: int, k: int, itemsize: int) -> Config:
    """Wide loads, at most 64 values a thread, two programs per processor where N allows."""
    block_k = triton.next_power_of_2(k)
    block_m = triton.next_power_of_2(rows)
    warps = min(8, max(1, block_k * itemsize // (32 * 16)))
    block_n = 8
    while block_n > 1 and (
        triton.cdiv(n, block_n) < 2 * _PROGRAMS or block_n * block_k > 64 * 32 * warps
    ):
        block_n //= 2
    return Config("gemv", block_m, block_n, block_k, warps=warps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """out = residual + gelu?(norm?(x) @ weight.T + bias).

    Args:
        x: [R, K], contiguous like all tensors here, float16, bfloat16 or float32.
        weight, bias: [N, K] and [N], or no bias.
        out: [R, N], written; not `x`.
        norm_weight, norm_bias: [K] each, of a layer norm over K before; both or neither.
        eps: of that layer norm, added to the variance.
        gelu: apply the exact GELU to the linear layer's result.
        residual: [R, N], added at the end; may be `out` itself.
        config: overrides `choose`.

    Raises:
        KernelShapeError: shapes, dtypes, devices or the configuration do not fit together.
    """
    rows, k, n = x.shape[0], x.shape[-1], weight.shape[0]
    check_linear(x, weight, bias, out, norm_weight, norm_bias, residual)
    config = config or choose(rows, n, k, x.dtype, norm=norm_weight is not None)
    config = _fit(config, k, x)
    overlap = pdl(x.device)
    launch(linear_kernel, (triton.cdiv(n, config.block_n), triton.cdiv(rows, config.block_m)))(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        residual,
        out,
        rows,
        eps,
        N=n,
        K=k,
        GELU=gelu,
        GEMV=config.variant == "gemv",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT=config.split,
        PREFETCH=not interpreted() and (norm_weight is not None or overlap["PDL"]),
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap,
    )


def qkv(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    tokens_per_slot: int = 1,
    scale: float,
    config: Config | None = None,
) -> None:
    """Compute queries, keys and values; write the latter two into the caches.

    Row r of slot b = r // tokens_per_slot has position p = positions[b] + r % tokens_per_slot.
    With y = norm?(x):

        q_out[r]           = scale * (y[r] @ q_weight.T + q_bias)    scaled after rounding
        keys[b, :, p, :]   = y[r] @ k_weight.T + k_bias              as [H, 64]
        values[b, :, p, :] = y[r] @ v_weight.T + v_bias              as [H, 64]

    Keys and values of a position outside [0, T) are not written.

    Args:
        x: [R, D] with R = slots * tokens_per_slot and D = 64 * H; contiguous, float16, bfloat16
            or float32, like all tensors but `positions`.
        q_weight, k_weight, v_weight: [D, D]; q_bias, k_bias, v_bias: [D] or None.
        q_out: [R, D], written.
        keys, values: [B, H, T, 64] with B >= slots, written; any strides, equal for both, but
            adjacent values within a head.
        positions: [B] int32.
        norm_weight, norm_bias: [D] each, of a layer norm before; both or neither.
        eps: of that layer norm, added to the variance.
        scale: factor of the queries.
        config: overrides `choose`.

    Raises:
        KernelShapeError: shapes, dtypes, devices or the configuration do not fit together.
    """
    rows, d = x.shape[0], x.shape[-1]
    check_qkv(
        x,
        {
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "q_bias": q_bias,
            "k_bias": k_bias,
            "v_bias": v_bias,
        },
        {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight},
        q_out,
        keys,
        values,
        positions,
        tokens_per_slot,
    )
    config = config or choose(rows, 3 * d, d, x.dtype, norm=norm_weight is not None)
    config = _fit(config, d, x)
    overlap = pdl(x.device)
    launch(qkv_kernel, (3 * triton.cdiv(d, config.block_n), triton.cdiv(rows, config.block_m)))(
        x,
        norm_weight,
        norm_bias,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        q_out,
        keys,
        values,
        positions,
        rows,
        scale,
        eps,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        keys.shape[2],
        D=d,
        TOKENS=tokens_per_slot,
        HEAD=HEAD_WIDTH,
        GEMV=config.variant == "gemv",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT=config.split,
        PREFETCH=not interpreted() and (norm_weight is not None or overlap["PDL"]),
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap,
    )


def _fit(config: Config, k: int, x: Tensor) -> Config:
    """Limit the stages to the device's shared memory."""
    if config.variant == "dot":
        return fitting(config, x.itemsize, shared_memory(x.device))
    if not (config.block_k >= k):
        raise KernelShapeError(f"gemv needs block_k of at least {k}, but it is {config.block_k}")
    return config


# Loads are issued in the order in which they should leave: weights and biases first, then `wait`,
# then activations. No atomics and no second pass.


@triton.jit
def linear_kernel(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    residual,
    out,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[r, n] of BLOCK_M rows and BLOCK_N columns, as `linear` says."""
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = r[:, None] * N + n[None, :]
    inside = (r < rows)[:, None] & (n < N)[None, :]
    if GEMV:
        tile, gain, shift = _gemv_weights(weight, n, N, norm_weight, norm_bias, K, BLOCK_K)
    elif PREFETCH:
        _prefetch(weight, n, N, K)
    if bias is not None:
        added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    release(PDL)
    wait(PDL)
    if residual is not None:
        skipped = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if GEMV:
        acc = _gemv(x, r, rows, tile, norm_weight is not None, gain, shift, eps, K, BLOCK_K)
    else:
        acc = _dot(
            x,
            r,
            rows,
            weight,
            n,
            N,
            norm_weight,
            norm_bias,
            eps,
            K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLIT,
        )
    release_late(PDL)
    if bias is not None:
        acc += added[None, :]
    if GELU:
        acc = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if residual is not None:
        acc += skipped
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def qkv_kernel(
    x,
    norm_weight,
    norm_bias,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    v_weight,
    v_bias,
    q_out,
    keys,
    values,
    positions,
    rows,
    scale,
    eps,
    slot_stride,
    head_stride,
    position_stride,
    capacity,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD: tl.constexpr,
    GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M rows and BLOCK_N columns of queries, keys or values, as `qkv` says."""
    blocks: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    which = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight = _one_of(which, q_weight, k_weight, v_weight)
    if GEMV:
        tile, gain, shift = _gemv_weights(weight, n, D, norm_weight, norm_bias, D, BLOCK_K)
    elif PREFETCH:
        _prefetch(weight, n, D, D)
    added = tl.zeros([BLOCK_N], dtype=tl.float32)
    if q_bias is not None:
        added += _bias_if(which == 0, q_bias, n, D)
    if k_bias is not None:
        added += _bias_if(which == 1, k_bias, n, D)
    if v_bias is not None:
        added += _bias_if(which == 2, v_bias, n, D)
    release(PDL)
    wait(PDL)
    slot = r // TOKENS
    position = tl.load(positions + slot, mask=r < rows, other=0) + r % TOKENS
    if GEMV:
        acc = _gemv(x, r, rows, tile, norm_weight is not None, gain, shift, eps, D, BLOCK_K)
    else:
        acc = _dot(
            x,
            r,
            rows,
            weight,
            n,
            D,
            norm_weight,
            norm_bias,
            eps,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLIT,
        )
    release_late(PDL)
    result = (acc + added[None, :]).to(x.dtype.element_ty)
    scaled = (result.to(tl.float32) * scale).to(x.dtype.element_ty)

    in_cache = slot.to(tl.int64) * slot_stride + position.to(tl.int64) * position_stride
    row_start = tl.where(which == 0, r.to(tl.int64) * D, in_cache)
    column = tl.where(which == 0, n, (n // HEAD) * head_stride + n % HEAD)
    checked = tl.where(which == 0, 0, position)
    kept = (r < rows) & (checked >= 0) & (checked < capacity)
    tl.store(
        _one_of(which, q_out, keys, values) + row_start[:, None] + column[None, :],
        tl.where(which == 0, scaled, result),
        mask=kept[:, None] & (n < D)[None, :],
    )


@triton.jit
def _one_of(which, first, second, third):
    return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit
def _bias_if(wanted, bias, n, N: tl.constexpr):
    return tl.load(bias + n, mask=n < tl.where(wanted, N, 0), other=0.0).to(tl.float32)


@triton.jit
def _gemv_weights(
    weight, n, N: tl.constexpr, norm_weight, norm_bias, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows n of the weight [1, BLOCK_N, BLOCK_K], and the layer norm's [1, 1, BLOCK_K], if any."""
    k = tl.arange(0, BLOCK_K)[None, None, :]
    row = n[None, :, None]
    tile = tl.load(weight + row * K + k, mask=(row < N) & (k < K), other=0.0)
    gain = 0.0
    shift = 0.0
    if norm_weight is not None:
        gain = tl.load(norm_weight + k, mask=k < K, other=0.0)
        shift = tl.load(norm_bias + k, mask=k < K, other=0.0)
    return tile, gain, shift


@triton.jit
def _gemv(
    x, r, rows, tile, NORM: tl.constexpr, gain, shift, eps, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """norm?(x)[r] @ tile.T in float32, as [BLOCK_M, BLOCK_N]."""
    k = tl.arange(0, BLOCK_K)[None, None, :]
    row = r[:, None, None]
    value = tl.load(x + row * K + k, mask=(row < rows) & (k < K), other=0.0)
    if NORM:
        number = value.to(tl.float32)
        mean = tl.sum(number, axis=2, keep_dims=True) / K
        apart = tl.where(k < K, number - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(apart * apart, axis=2, keep_dims=True) / K + eps)
        value = _normalised(value, mean, deviation, gain, shift)
    return tl.sum(value.to(tl.float32) * tile.to(tl.float32), axis=2)


@triton.jit
def _dot(
    x,
    r,
    rows,
    weight,
    n,
    N: tl.constexpr,
    norm_weight,
    norm_bias,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """norm?(x)[r] @ weight[n].T in float32, in chunks of columns, as [BLOCK_M, BLOCK_N].

    Rows and columns beyond the end repeat the last one; the caller discards them.
    """
    x_row = x + tl.minimum(r, rows - 1) * K
    weight_row = weight + tl.minimum(n, N - 1) * K
    if norm_weight is not None:
        mean, deviation = _statistics(x_row, eps, K, BLOCK_M, BLOCK_K)

    if SPLIT == 1:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            tile = _load(weight_row[None, :] + k[:, None], k[:, None], K, BLOCK_K)
            chunk = _load(x_row[:, None] + k[None, :], k[None, :], K, BLOCK_K)
            if norm_weight is not None:
                gain = _load(norm_weight + k, k, K, BLOCK_K)[None, :]
                shift = _load(norm_bias + k, k, K, BLOCK_K)[None, :]
                chunk = _normalised(chunk, mean[:, None], deviation[:, None], gain, shift)
            acc = tl.dot(chunk, tile, acc, input_precision="ieee")
        return acc
    else:
        WIDTH: tl.constexpr = BLOCK_K // SPLIT
        piece = tl.arange(0, SPLIT) * WIDTH
        inner = tl.arange(0, WIDTH)
        slices = tl.zeros([SPLIT, BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            down = start + piece[:, None, None] + inner[None, :, None]
            tile = _load(weight_row[None, None, :] + down, down, K, BLOCK_K)
            along = start + piece[:, None, None] + inner[None, None, :]
            chunk = _load(x_row[None, :, None] + along, along, K, BLOCK_K)
            if norm_weight is not None:
                gain = _load(norm_weight + along, along, K, BLOCK_K)
                shift = _load(norm_bias + along, along, K, BLOCK_K)
                chunk = _normalised(
                    chunk, mean[None, :, None], deviation[None, :, None], gain, shift
                )
            slices = tl.dot(chunk, tile, slices, input_precision="ieee")
        return _sum_slices(slices, SPLIT, BLOCK_M, BLOCK_N)


@triton.jit
def _sum_slices(slices, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum over the first axis, by halves: one exchange between warps, then registers only."""
    if SPLIT == 1:
        return tl.reshape(slices, [BLOCK_M, BLOCK_N])
    else:
        HALF: tl.constexpr = SPLIT // 2
        pairs = tl.reshape(slices, [2, HALF, BLOCK_M, BLOCK_N])
        first, second = tl.split(tl.permute(pairs, (1, 2, 3, 0)))
        return _sum_slices(first + second, HALF, BLOCK_M, BLOCK_N)


@triton.jit
def _load(pointers, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Values at columns k, zero beyond K; without a mask where chunks fill K."""
    if K % BLOCK_K == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=k < K, other=0.0)


@triton.jit
def _normalised(chunk, mean, deviation, gain, shift):
    value = (chunk.to(tl.float32) - mean) * deviation * gain.to(tl.float32) + shift.to(tl.float32)
    return value.to(chunk.dtype)


@triton.jit
def _statistics(x_row, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each row, in one pass over it.

    Welford's update in every one of WIDTH columns, then Chan's formula for their union (Chan,
    Golub and LeVeque, 1979): no difference of large sums.
    """
    WIDTH: tl.constexpr = BLOCK_K if BLOCK_M * BLOCK_K <= 4096 else 4096 // BLOCK_M
    column = tl.arange(0, WIDTH)
    means = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    for i in tl.static_range((K + WIDTH - 1) // WIDTH):
        k = (i * WIDTH + column)[None, :]
        value = _load(x_row[:, None] + k, k, K, WIDTH).to(tl.float32)
        delta = tl.where(k < K, value - means, 0.0)
        means += delta * (1.0 / (i + 1))
        squares += delta * (value - means)
    count = ((K - column + WIDTH - 1) // WIDTH).to(tl.float32)[None, :]
    mean = tl.sum(means * count, axis=1) / K
    apart = means - mean[:, None]
    variance = tl.sum(squares + count * apart * apart, axis=1) / K
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def _prefetch(weight, n, N: tl.constexpr, K: tl.constexpr):
    """Prefetch rows n of the weight into the L2 cache, one request per line of 128 bytes."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((K + LINE - 1) // LINE)
    column = tl.minimum(tl.arange(0, LINES) * LINE, K - 1)
    pointers = weight + tl.minimum(n, N - 1)[:, None] * K + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
