"""Linear layers of a few rows: layer norm before, GELU and residual after, in one kernel.

A decode step multiplies few rows by large matrices, so its time is how fast weights arrive. Two
variants compute the same:

    "gemv"  CUDA cores. A program holds `block_n` whole rows of the weight in registers, all loads
            in flight at once and before it waits for its input. For one or two rows.
    "dot"   tensor cores, in chunks of `block_k` columns, pipelined. With `split` > 1 each chunk
            is cut into that many slices, which warps multiply at the same time and add up at the
            end: with few rows the chain of dependent products would otherwise be what takes time.

Numbers are as in PyTorch's own layers: layer norm in float32, rounded to the buffers' dtype;
products accumulated in float32; a linear layer's result rounded before its GELU, which is exact
(erf) and in float32. The residual is added in float32, before the one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.kernels.launch import interpreted, launch, pdl, shared_memory
from whisper_flash_attention.kernels.linear_kernels import linear_kernel, qkv_kernel

HEAD_WIDTH = 64

_GEMV_ROWS = 2
_PROGRAMS = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    """How to cut x [rows, k] times a weight [n, k], with a layer norm before it or without.

    Meant for GPUs of about 132 processors; any other runs it too.
    """
    if rows <= _GEMV_ROWS:
        return _choose_gemv(rows, n, k, dtype.itemsize)
    if dtype == torch.float32:
        return Config("dot", 16, 16, 64, split=4, stages=2)
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    row_blocks = triton.cdiv(rows, block_m)
    block_n = 64
    while block_n > 16 and row_blocks * triton.cdiv(n, block_n) < _PROGRAMS:
        block_n //= 2
    # Large tiles have independent products enough, and too few registers for slices.
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
        config: how to cut the work; `choose` decides if None.

    Raises:
        OptionError: shapes, dtypes, devices or the configuration do not fit together.
    """
    rows, k, n = x.shape[0], x.shape[-1], weight.shape[0]
    _check_tensor("x", x, (rows, k), x)
    _check_tensor("weight", weight, (n, k), x)
    _check_tensor("out", out, (rows, n), x)
    for name, tensor, shape in (("bias", bias, (n,)), ("residual", residual, (rows, n))):
        if tensor is not None:
            _check_tensor(name, tensor, shape, x)
    if (norm_weight is None) != (norm_bias is None):
        raise OptionError("norm_weight and norm_bias go together, but only one was given")
    if norm_weight is not None and norm_bias is not None:
        _check_tensor("norm_weight", norm_weight, (k,), x)
        _check_tensor("norm_bias", norm_bias, (k,), x)
    config = config or choose(rows, n, k, x.dtype, norm=norm_weight is not None)
    config = _checked(config, k, x)
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
    norm_weight: Tensor,
    norm_bias: Tensor,
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
    tokens_per_slot: int = 1,
    scale: float,
    eps: float = 1e-5,
    config: Config | None = None,
) -> None:
    """Layer norm, then queries, keys and values; the latter two go straight into the caches.

    Row r of slot b = r // tokens_per_slot stands at position p = positions[b] + r %
    tokens_per_slot. With y = norm(x):

        q_out[r]           = scale * (y[r] @ q_weight.T + q_bias)    scaled after rounding
        keys[b, :, p, :]   = y[r] @ k_weight.T + k_bias              as [H, 64]
        values[b, :, p, :] = y[r] @ v_weight.T + v_bias              as [H, 64]

    Keys and values of a position outside [0, T) are not written.

    Args:
        x: [R, D] with R = slots * tokens_per_slot and D = 64 * H; contiguous, float16, bfloat16
            or float32, like all tensors but `positions`.
        norm_weight, norm_bias: [D] each.
        q_weight, k_weight, v_weight: [D, D]; q_bias, k_bias, v_bias: [D] or None.
        q_out: [R, D], written.
        keys, values: [B, H, T, 64] with B >= slots, written; any strides, equal for both, but
            adjacent values within a head.
        positions: [B] int32.
        scale: factor of the queries.
        eps: of the layer norm, added to the variance.
        config: how to cut the work; `choose` decides if None.

    Raises:
        OptionError: shapes, dtypes, devices or the configuration do not fit together.
    """
    rows, d = x.shape[0], x.shape[-1]
    _check_tensor("x", x, (rows, d), x)
    _check_tensor("q_out", q_out, (rows, d), x)
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    vectors |= {
        name: bias
        for name, bias in (("q_bias", q_bias), ("k_bias", k_bias), ("v_bias", v_bias))
        if bias is not None
    }
    for name, vector in vectors.items():
        _check_tensor(name, vector, (d,), x)
    for name, matrix in (("q_weight", q_weight), ("k_weight", k_weight), ("v_weight", v_weight)):
        _check_tensor(name, matrix, (d, d), x)
    _check_caches(x, keys, values, positions, tokens_per_slot)
    config = _checked(config or choose(rows, 3 * d, d, x.dtype, norm=True), d, x)
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
        PREFETCH=not interpreted(),
        num_warps=config.warps,
        num_stages=config.stages,
        **pdl(x.device),
    )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        kind = "" if tensor.is_contiguous() else " and is not contiguous"
        raise OptionError(
            f"{name} must be contiguous {list(shape)}, but has shape {list(tensor.shape)}{kind}"
        )
    if tensor.dtype not in _DTYPES or (tensor.dtype, tensor.device) != (x.dtype, x.device):
        raise OptionError(
            f"{name} must be float16, bfloat16 or float32 like x ({x.dtype} on {x.device}), "
            f"but is {tensor.dtype} on {tensor.device}"
        )


def _check_caches(
    x: Tensor, keys: Tensor, values: Tensor, positions: Tensor, tokens_per_slot: int
) -> None:
    rows, d = x.shape
    if tokens_per_slot < 1 or rows % tokens_per_slot or d % HEAD_WIDTH:
        raise OptionError(
            f"x must be [slots * tokens_per_slot, {HEAD_WIDTH} * heads], but is {list(x.shape)} "
            f"with tokens_per_slot {tokens_per_slot}"
        )
    slots = rows // tokens_per_slot
    for name, cache in (("keys", keys), ("values", values)):
        if (
            cache.ndim != 4
            or cache.shape[0] < slots
            or cache.shape[2] < 1
            or (cache.shape[1], cache.shape[3]) != (d // HEAD_WIDTH, HEAD_WIDTH)
            or cache.stride() != keys.stride()
            or cache.shape[2] != keys.shape[2]
            or cache.stride(3) != 1
            or (cache.dtype, cache.device) != (x.dtype, x.device)
        ):
            raise OptionError(
                f"{name} must be [{slots} or more, {d // HEAD_WIDTH}, T, {HEAD_WIDTH}] in "
                f"{x.dtype} on {x.device} with the same strides as keys and the last 1, but is "
                f"{list(cache.shape)} in {cache.dtype} on {cache.device}, strides {cache.stride()}"
            )
    if positions.dtype != torch.int32 or positions.ndim != 1 or positions.shape[0] < slots:
        raise OptionError(
            f"positions must be int32 [{slots}], but is {positions.dtype} {list(positions.shape)}"
        )


def _checked(config: Config, k: int, x: Tensor) -> Config:
    if config.variant == "dot":
        return fitting(config, x.itemsize, shared_memory(x.device))
    if config.block_k < k:
        raise OptionError(f"gemv needs block_k of at least {k}, but it is {config.block_k}")
    return config
