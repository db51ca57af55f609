"""The projections before and after absorbed cross-attention; `absorbed_attention` has the theory.

`absorb_query`: layer norm, query projection and absorption of the key projection, in one kernel,

    out[r, h] = W_k[h]^T . (scale * (W_q[h] . LN(x_r) + b_q[h]))

where W_q[h] and W_k[h] are the 64 rows of head h. A program computes the 64 query values of a few
rows and one head, and multiplies them with a block of W_k[h]'s columns; the programs of the other
blocks compute the same queries again, which costs a read of W_q[h] from the L2 cache and saves a
dependent kernel.

`project_values`: combination of the parts of the keys, and the value projection, in one kernel,

    out[r, 64 h + c] = W_v[64 h + c] . (sum_s w_s partial_s[r, h]) + b_v[64 h + c]

where w_s are the shares of the parts: sum_s 2^(max_s - max), normalised (the combination step of
Flash-Decoding, 2023).
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from whisper_flash_attention.kernels._checks import (
    HEAD_WIDTH,
    check_absorbed_query,
    check_absorbed_values,
)
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait


@dataclass(frozen=True)
class QueryConfig:
    """Tile of one program: rows of x, columns of the output, D columns per step."""

    rows: int = 16
    columns: int = 128
    chunk: int = 128
    warps: int = 4
    stages: int = 4


def choose_query_config(rows: int, d: int, dtype: torch.dtype) -> QueryConfig:
    """A configuration for `rows` rows of width `d`: 64 programs or more where the work allows."""
    if dtype == torch.float32:
        return QueryConfig(columns=64, chunk=32, warps=8, stages=2)
    columns = 64 if d <= 512 else 128 if d <= 1024 else 256
    columns = columns if d % columns == 0 else 64
    chunk = 128 if d % 128 == 0 else 64
    if rows <= 16:
        return QueryConfig(columns=columns, chunk=chunk)
    return QueryConfig(rows=32, columns=columns, chunk=chunk, warps=8)


def absorb_query(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    eps: float = 1e-5,
    config: QueryConfig | None = None,
) -> None:
    """Write the absorbed queries of all heads.

    Args:
        x: [R, D] rows of the residual stream.
        norm_weight, norm_bias: [D] of the layer norm, which is computed in float32.
        q_weight: [D, D] in nn.Linear's layout; q_bias: [D] or None.
        k_weight: [D, D] in nn.Linear's layout; the key projection must have no bias.
        out: [R, H, D], H = D / 64, written; all tensors have the same dtype.
        scale: factor of the projected query (for Whisper 64 ** -0.5).
        eps: of the layer norm.
        config: overrides `choose_query_config`.

    Raises:
        KernelShapeError: shapes that do not fit each other.
    """
    rows, d = x.shape
    heads = d // HEAD_WIDTH
    check_absorbed_query(x, out, q_weight, k_weight)
    config = config or choose_query_config(rows, d, x.dtype)
    high = 1 << (d.bit_length() - 1)
    launch(_absorb_query_kernel, (d // config.columns, heads, triton.cdiv(rows, config.rows)))(
        x, norm_weight, norm_bias, q_weight, q_weight if q_bias is None else q_bias, k_weight, out,
        rows, scale, eps,
        BIAS=q_bias is not None, D=d, HIGH=high,
        LOW=0 if high == d else 1 << (d - high - 1).bit_length(),
        ROWS=config.rows, COLUMNS=config.columns, CHUNK=config.chunk, STAGES=config.stages,
        num_warps=config.warps, **pdl(x.device),
    )  # fmt: skip


def fold_queries(
    queries: torch.Tensor, k_weight: torch.Tensor, out: torch.Tensor, *, scale: float
) -> None:
    """Compute the second half of `absorb_query`, for projected queries.

    With many rows or a large D, projecting the queries once (`linear`) and folding them here is
    faster than projecting them again for every block of columns.

    Args:
        queries: [R, D], of the linear layer, before the scale.
        k_weight: [D, D] in nn.Linear's layout; the key projection must have no bias.
        out: [R, H, D], written; all tensors have the same dtype.
        scale: factor of the queries.

    Raises:
        KernelShapeError: shapes that do not fit each other.
    """
    rows, d = queries.shape
    heads = d // HEAD_WIDTH
    check_absorbed_query(queries, out, k_weight)
    columns = 128 if d % 128 == 0 else 64
    block = 16 if rows <= 16 else 32
    launch(_fold_queries_kernel, (d // columns, heads, triton.cdiv(rows, block)))(
        queries, k_weight, out, rows, scale,
        D=d, ROWS=block, COLUMNS=columns, num_warps=4, **pdl(queries.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _fold_queries_kernel(
    queries,
    k_weight,
    out,
    n_rows,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(1)
    value = head * 64 + tl.arange(0, 64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keys = tl.load(k_weight + value[:, None] * D + column[None, :])
    release(PDL)
    wait(PDL)
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < n_rows
    query = tl.load(queries + row * D + value[None, :], mask=inside, other=0.0)
    query = (query.to(tl.float32) * scale).to(keys.dtype)
    folded = tl.dot(query, keys, input_precision="ieee")
    release_late(PDL)
    at = out + (row.to(tl.int64) * (D // 64) + head) * D + column[None, :]
    tl.store(at, folded.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _moments(x, row, inside, D: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Mean and variance of rows of D = HIGH + (at most) LOW columns, in float32; two passes."""
    high = tl.arange(0, HIGH)[None, :]
    x0 = tl.load(x + row * D + high, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(x0, 1)
    if LOW > 0:
        low = HIGH + tl.arange(0, LOW)[None, :]
        x1 = tl.load(x + row * D + low, mask=inside & (low < D), other=0.0).to(tl.float32)
        total += tl.sum(x1, 1)
    mean = (total / D)[:, None]
    variance = tl.sum((x0 - mean) * (x0 - mean), 1)
    if LOW > 0:
        variance += tl.sum(tl.where(low < D, (x1 - mean) * (x1 - mean), 0.0), 1)
    return mean, (variance / D)[:, None]


@triton.jit(do_not_specialize=["n_rows"])
def _absorb_query_kernel(
    x,
    norm_weight,
    norm_bias,
    q_weight,
    q_bias,
    k_weight,
    out,
    n_rows,
    scale,
    eps,
    BIAS: tl.constexpr,
    D: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(1)
    value = head * 64 + tl.arange(0, 64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keys = tl.load(k_weight + value[:, None] * D + column[None, :])
    release(PDL)
    wait(PDL)
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < n_rows
    mean, variance = _moments(x, row, inside, D, HIGH, LOW)
    inverse = tl.rsqrt(variance + eps)
    query = tl.zeros((ROWS, 64), tl.float32)
    step = tl.arange(0, CHUNK)
    for k in tl.range(0, D, CHUNK, num_stages=STAGES):
        weight = tl.load(q_weight + value[:, None] * D + (k + step)[None, :])
        part = tl.load(x + row * D + (k + step)[None, :], mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(norm_weight + k + step).to(tl.float32)[None, :]
        shift = tl.load(norm_bias + k + step).to(tl.float32)[None, :]
        normed = ((part - mean) * inverse * gain + shift).to(weight.dtype)
        query = tl.dot(normed, tl.trans(weight), query, input_precision="ieee")
    if BIAS:
        query += tl.load(q_bias + value).to(tl.float32)[None, :]
    # Rounded as a linear layer's output, then as its product with the scale.
    query = (query.to(keys.dtype).to(tl.float32) * scale).to(keys.dtype)
    absorbed = tl.dot(query, keys, input_precision="ieee")
    release_late(PDL)
    at = out + (row.to(tl.int64) * (D // 64) + head) * D + column[None, :]
    tl.store(at, absorbed.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class ValuesConfig:
    """Tile of one program: rows, output columns of one head, D columns per step.

    `chunk` divides D and is at least 16 * `warps`: each warp sums over its own share of it.
    """

    rows: int = 16
    columns: int = 16
    chunk: int = 256
    warps: int = 4
    stages: int = 3


def choose_values_config(rows: int, d: int, dtype: torch.dtype) -> ValuesConfig:
    """A configuration for `rows` rows of width `d`: narrow tiles while there are few rows."""
    chunk = 256 if d % 256 == 0 else 128 if d % 128 == 0 else 64
    if dtype == torch.float32:
        return ValuesConfig(chunk=64, stages=2)
    if rows <= 64:
        return ValuesConfig(columns=16 if rows <= 32 else 32, chunk=chunk)
    return ValuesConfig(rows=32, columns=64, chunk=min(chunk, 128))


def project_values(
    partial_out: torch.Tensor,
    partial_stats: torch.Tensor,
    v_weight: torch.Tensor,
    v_bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    finished: torch.Tensor | None = None,
    tokens_per_slot: int = 1,
    config: ValuesConfig | None = None,
) -> None:
    """Write the attention output of all heads, before the output projection.

    Args:
        partial_out: [splits, R, H, D] means of the parts, as `absorbed_attention` writes them.
        partial_stats: [splits, R, H, 2] float32, likewise.
        v_weight: [D, D] in nn.Linear's layout; v_bias: [D] or None.
        out: [R, D], written; zeros in the rows of finished slots, whose parts are not read.
        finished: [slots] bool; row r belongs to slot r // tokens_per_slot.
        config: overrides `choose_values_config`.

    Raises:
        KernelShapeError: shapes that do not fit each other.
    """
    splits, rows, heads, d = partial_out.shape
    check_absorbed_values(partial_out, v_weight, out)
    config = config or choose_values_config(rows, d, out.dtype)
    grid = (HEAD_WIDTH // config.columns, heads, triton.cdiv(rows, config.rows))
    launch(_project_values_kernel, grid)(
        partial_out, partial_stats, v_weight, v_weight if v_bias is None else v_bias,
        partial_stats if finished is None else finished, out, rows,
        BIAS=v_bias is not None, FINISHED=finished is not None, TOKENS=tokens_per_slot,
        HEADS=heads, D=d, SPLITS=splits, ROWS=config.rows, COLUMNS=config.columns,
        CHUNK=config.chunk, WARPS=config.warps, STAGES=config.stages,
        num_warps=config.warps, **pdl(out.device),
    )  # fmt: skip


@triton.jit
def _stats(partial_stats, split, n_rows, row, head, HEADS: tl.constexpr, live):
    """(max, sum) of the rows' part `split`; (-inf, 0) where `live` is false."""
    at = partial_stats + ((split * n_rows + row) * HEADS + head) * 2
    highest = tl.load(at, mask=live, other=-float("inf"))
    return highest, tl.load(at + 1, mask=live, other=0.0)


@triton.jit
def _share(highest, total, top):
    """2^(highest - top) total, and 0 for a part without keys."""
    return tl.where(total > 0, total * tl.exp2(highest - top), 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def _project_values_kernel(
    partial_out,
    partial_stats,
    v_weight,
    v_bias,
    finished,
    out,
    n_rows,
    BIAS: tl.constexpr,
    FINISHED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(1)
    value = head * 64 + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    bias = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        bias = tl.load(v_bias + value).to(tl.float32)
    release(PDL)
    wait(PDL)
    if FINISHED:
        live = live & (tl.load(finished + row // TOKENS, mask=live, other=1).to(tl.int32) == 0)

    # Finite, so that a row without any key gives shares of 0 and not NaN.
    top = tl.full((ROWS,), -1e38, tl.float32)
    for split in tl.static_range(SPLITS):
        highest, total = _stats(partial_stats, split, n_rows, row, head, HEADS, live)
        top = tl.maximum(top, highest)
    shares = tl.zeros((ROWS,), tl.float32)
    for split in tl.static_range(SPLITS):
        highest, total = _stats(partial_stats, split, n_rows, row, head, HEADS, live)
        shares += _share(highest, total, top)
    inverse = 1.0 / tl.where(shares > 0, shares, 1.0)

    # [WARPS, rows, columns]: each warp sums over its own columns of D.
    OWN: tl.constexpr = CHUNK // WARPS
    d = tl.arange(0, WARPS)[:, None, None] * OWN + tl.arange(0, OWN)[None, None, :]
    weights = v_weight + value[None, :, None] * D + d
    parts = partial_out + (row[None, :, None].to(tl.int64) * HEADS + head) * D + d
    alive = live[None, :, None]
    sums = tl.zeros((WARPS, ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, D, CHUNK, num_stages=STAGES):
        weight = tl.load(weights + k)
        mean = tl.zeros((WARPS, ROWS, OWN), tl.float32)
        for split in tl.static_range(SPLITS):
            highest, total = _stats(partial_stats, split, n_rows, row, head, HEADS, live)
            share = (_share(highest, total, top) * inverse)[None, :, None]
            offset = tl.cast(n_rows, tl.int64) * (split * HEADS * D)
            mean += share * tl.load(parts + offset + k, mask=alive, other=0.0).to(tl.float32)
        mean = mean.to(weight.dtype)
        sums = tl.dot(mean, tl.permute(weight, (0, 2, 1)), sums, input_precision="ieee")
    release_late(PDL)
    result = tl.where(live[:, None], tl.sum(sums, 0) + bias[None, :], 0.0)
    at = out + row[:, None].to(tl.int64) * D + value[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(row < n_rows)[:, None])
