"""Combining the parts of absorbed cross-attention, and its value projection, in one kernel.

    out[r, 64 h + c] = W_v[64 h + c] . (sum_s w_s partial_s[r, h]) + b_v[64 h + c]

w_s are the shares of the parts of the keys: sum_s 2^(max_s - max), normalised (the combination
step of Flash-Decoding, 2023). See `absorbed_attention`.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from whisper_flash_attention.kernels._checks import HEAD_WIDTH, check_absorbed_values
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait


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
