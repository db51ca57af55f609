"""Cross-attention of a few rows over the encoder's keys and values: all keys, no mask.

The keys are cut into `splits` parts, one program each, so that few rows still fill the GPU. Each
program stores its statistics (the largest score, the sum of weights, the weighted sum of values) in
a workspace; the last one to finish, which a counter identifies, merges the parts, writes the result
and resets the counter to zero for the next launch. There is one kernel for a single row of a clip
and one for several rows (a prompt, beams), which reads keys and values once for up to
`Config.block_m` rows.

Splitting the keys: Dao et al., "Flash-Decoding for long-context inference", 2023. The last block
reduces: threadFenceReduction of the CUDA samples. Online softmax: see self_attention.py.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.kernels._checks import (
    HEAD_WIDTH,
    check_cache_attention,
    check_clip_rows,
    check_splits,
)
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait
from whisper_flash_attention.kernels.self_attention import (
    LOG2_E,
    LOWEST,
    attend_tile,
    load_tile,
    merge_lanes,
)

# Keys per tile by default, and so the smallest part that a split makes.
_BLOCK = 64
# Target number of programs: two on each processor of an H100.
_PROGRAMS = 264


@dataclass(frozen=True)
class Config:
    """Tiles of a launch.

    variant: "vector" takes one row per program; "dot" takes up to `block_m` rows of a clip, on
    tensor cores where the dtype has them (block_m: 16, 32 or 64; 1 for "vector").
    block: keys per tile, a power of two, at least 16. warps, stages: of a program, and of its
    pipeline of tiles.
    """

    variant: Literal["vector", "dot"]
    block_m: int
    block: int
    warps: int
    stages: int


class Workspace(NamedTuple):
    """Elements that a launch needs: float32 `partials`, and int32 `counters`, zeros at first."""

    partials: int
    counters: int


def choose(rows_per_clip: int, dtype: torch.dtype = torch.float16) -> Config:
    """The default configuration for clips of `rows_per_clip` rows each."""
    if rows_per_clip == 1:
        return Config("vector", block_m=1, block=_BLOCK, warps=4, stages=2)
    # Without tensor cores a larger tile does not fit the registers.
    largest = 16 if dtype is torch.float32 else 64
    block_m = min(largest, max(16, triton.next_power_of_2(rows_per_clip)))
    return Config("dot", block_m=block_m, block=_BLOCK, warps=4, stages=2)


def choose_splits(rows: int, heads: int, keys: int, *, rows_per_clip: int = 1) -> int:
    """Into how many parts to cut `keys` keys, so that a device's processors are busy.

    No part is empty, and all but the last have equally many tiles of the default size where that
    costs no parallelism.
    """
    groups = triton.cdiv(rows_per_clip, choose(rows_per_clip).block_m)
    programs = rows // rows_per_clip * groups * heads
    wanted = triton.cdiv(_PROGRAMS, programs)
    tiles = triton.cdiv(keys, _BLOCK)
    return int(triton.cdiv(tiles, triton.cdiv(tiles, min(wanted, tiles))))


def workspace_size(rows: int, heads: int, splits: int) -> Workspace:
    """The least workspace of `cross_attention` for `splits` parts."""
    if splits == 1:
        return Workspace(0, 0)
    return Workspace(rows * heads * splits * (HEAD_WIDTH + 2), rows * heads)


@triton.jit
def _part(split, keys_count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """First key of a part, and the key after its last tile; tiles are shared out evenly."""
    tiles = tl.cdiv(keys_count, BLOCK)
    return split * tiles // SPLITS * BLOCK, (split + 1) * tiles // SPLITS * BLOCK


@triton.jit
def _statistics_offsets(partials, rows_per_clip, SPLITS: tl.constexpr):
    """Where maxima and sums of weights begin in `partials`: each is [rows, heads, SPLITS], after
    the weighted sums of values [rows, heads, SPLITS, 64]."""
    cells = tl.num_programs(2) * rows_per_clip * tl.num_programs(1) * SPLITS
    return partials + cells * 64, partials + cells * 65


@triton.jit
def _arrive(counter, SPLITS: tl.constexpr):
    """Whether this program is the last of its parts; the others' partials are readable then.

    The barrier puts the stores of all threads before the one thread that counts; the counter's
    release and acquire put them before what the last program reads.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1


@triton.jit
def _attend_row(
    q,
    keys,
    values,
    finished,
    out,
    partials,
    counters,
    keys_count,
    rows_per_clip,
    scale,
    q_row,
    out_row,
    key_clip,
    key_head,
    key_position,
    value_clip,
    value_head,
    value_position,
    TOKENS_PER_SLOT: tl.constexpr,
    HAS_FINISHED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    clip = tl.program_id(2)
    row = clip * rows_per_clip + tl.program_id(0) // SPLITS
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, 64)
    keys += clip.to(tl.int64) * key_clip + head * key_head
    values += clip.to(tl.int64) * value_clip + head * value_head
    start, stop = _part(split, keys_count, SPLITS, BLOCK)
    release(PDL)
    wait(PDL)

    done = False
    if HAS_FINISHED:
        done = tl.load(finished + row // TOKENS_PER_SLOT)
        stop = tl.where(done, start, stop)
    query = tl.load(q + row.to(tl.int64) * q_row + head * 64 + column).to(tl.float32)
    query *= scale * LOG2_E
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, 64], tl.float32)
    # Tiles go through shared memory, which puts all loads before the first wait. Loads to registers
    # do not: the assembler moves those of a single tile's values after its scores.
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        valid = first + lane < keys_count
        k = load_tile(keys, (first + lane) * key_position, valid)
        v = load_tile(values, (first + lane) * value_position, valid)
        top, total, mixed = attend_tile(query, k, v, valid, top, total, mixed)
    release_late(PDL)
    top, total, mixed = merge_lanes(top, total, mixed)

    writes = 64  # columns
    if SPLITS > 1:
        pair = row * tl.num_programs(1) + head
        maxima, sums = _statistics_offsets(partials, rows_per_clip, SPLITS)
        cell = pair * SPLITS + split
        tl.store(partials + cell * 64 + column, mixed)
        tl.store(maxima + cell, top)
        tl.store(sums + cell, total)
        is_last = _arrive(counters + pair, SPLITS)
        writes = tl.where(is_last, 64, 0)
        if is_last:
            part = tl.arange(0, SPLITS_PADDED)
            cells = pair * SPLITS + part
            here = part < SPLITS
            tops = tl.load(maxima + cells, mask=here, other=LOWEST, cache_modifier=".cg")
            totals = tl.load(sums + cells, mask=here, other=0.0, cache_modifier=".cg")
            mixtures = load_tile(partials, cells * 64, here, ".cg")
            top, total, mixed = merge_lanes(tops, totals, mixtures)
            tl.store(counters + pair, 0)
    # A finished row has no keys: its sums are 0, and so is its result.
    mixed = mixed / tl.where(done, 1.0, total)
    result_at = out + row.to(tl.int64) * out_row + head * 64 + column
    tl.store(result_at, mixed.to(out.dtype.element_ty), mask=column < writes)


@triton.jit
def _attend_rows(
    q,
    keys,
    values,
    finished,
    out,
    partials,
    counters,
    keys_count,
    rows_per_clip,
    scale,
    q_row,
    out_row,
    key_clip,
    key_head,
    key_position,
    value_clip,
    value_head,
    value_position,
    TOKENS_PER_SLOT: tl.constexpr,
    HAS_FINISHED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    clip = tl.program_id(2)
    group = tl.program_id(0) // SPLITS * BLOCK_M
    of_clip = group + tl.arange(0, BLOCK_M)
    here = of_clip < rows_per_clip
    row = clip * rows_per_clip + of_clip
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, 64)
    keys += clip.to(tl.int64) * key_clip + head * key_head
    values += clip.to(tl.int64) * value_clip + head * value_head
    start, stop = _part(split, keys_count, SPLITS, BLOCK)
    release(PDL)
    wait(PDL)

    done = of_clip >= rows_per_clip
    if HAS_FINISHED:
        done = tl.load(finished + row // TOKENS_PER_SLOT, mask=here, other=1).to(tl.int1)
        stop = tl.where(tl.min(done.to(tl.int32), axis=0) == 1, start, stop)
    query = tl.load(
        q + row.to(tl.int64)[:, None] * q_row + head * 64 + column[None, :],
        mask=here[:, None],
        other=0.0,
    )
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, 64], tl.float32)
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        valid = first + lane < keys_count
        k = load_tile(keys, (first + lane) * key_position, valid)
        v = load_tile(values, (first + lane) * value_position, valid)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        score = tl.where(valid[None, :], score, float("-inf"))
        above = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - above[:, None])
        keep = tl.exp2(top - above)
        total = total * keep + tl.sum(weight, axis=1)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * keep[:, None], input_precision="ieee")
        top = above

    release_late(PDL)
    writes = rows_per_clip
    if SPLITS > 1:
        pair = row * tl.num_programs(1) + head
        maxima, sums = _statistics_offsets(partials, rows_per_clip, SPLITS)
        cell = pair * SPLITS + split
        tl.store(partials + cell[:, None] * 64 + column[None, :], mixed, mask=here[:, None])
        tl.store(maxima + cell, top, mask=here)
        tl.store(sums + cell, total, mask=here)
        counter = counters + (clip * rows_per_clip + group) * tl.num_programs(1) + head
        is_last = _arrive(counter, SPLITS)
        writes = tl.where(is_last, rows_per_clip, 0)
        if is_last:
            top = tl.full([BLOCK_M], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, 64], tl.float32)
            for part in range(SPLITS):
                cell = pair * SPLITS + part
                its_top = tl.load(maxima + cell, mask=here, other=LOWEST, cache_modifier=".cg")
                its_total = tl.load(sums + cell, mask=here, other=0.0, cache_modifier=".cg")
                its_mixed = load_tile(partials, cell * 64, here, ".cg")
                above = tl.maximum(top, its_top)
                keep = tl.exp2(top - above)
                share = tl.exp2(its_top - above)
                total = total * keep + its_total * share
                mixed = mixed * keep[:, None] + its_mixed * share[:, None]
                top = above
            tl.store(counter, 0)
    # Rows that are finished or out of range may share a program with others: they have sums.
    mixed = tl.where(done[:, None], 0.0, mixed / tl.where(done, 1.0, total)[:, None])
    result_at = out + row.to(tl.int64)[:, None] * out_row + head * 64 + column[None, :]
    tl.store(result_at, mixed.to(out.dtype.element_ty), mask=(of_clip < writes)[:, None])


def cross_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    partials: Tensor | None,
    counters: Tensor | None,
    splits: int,
    scale: float = 1.0,
    rows_per_clip: int = 1,
    tokens_per_slot: int = 1,
    finished: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """softmax(scale q kᵀ) v over all keys of each row's clip, into `out`.

    Row r belongs to clip r // rows_per_clip and to slot r // tokens_per_slot (each beam of a clip
    is a slot: rows_per_clip = tokens_per_slot * beams).

    q, out: [R, D], H heads of 64 columns. keys, values: [C, H, S, 64] in the
    dtype of q, any strides but a contiguous last dimension. finished: [R / tokens_per_slot] bool;
    rows of finished slots become zeros, and no key or value is read where all rows of a program
    are finished. Programs wait for it before they read keys: omit it where it saves nothing.
    partials (float32), counters (int32, zeros): as many elements as `workspace_size` returns; None
    for one split. The counters are zeros again when the launch has ended. Launches that overlap
    on the device must not share them.
    splits: parts that the keys are cut into, see `choose_splits`; at most one per tile of keys.
    Sums are in float32; only the result is rounded to the dtype of `out` (and the "dot" variant's
    weights, to multiply them by the values). The order in which parts are merged is fixed.

    Raises KernelShapeError if shapes, strides, splits or the workspace do not fit.
    """
    check_cache_attention(q, keys, values, out)
    clips, heads, keys_count, _ = keys.shape
    config = config or choose(rows_per_clip, q.dtype)
    tiles = triton.cdiv(keys_count, config.block)
    check_clip_rows(q.shape[0], clips, rows_per_clip, tokens_per_slot, finished)
    check_splits(splits, tiles, workspace_size(q.shape[0], heads, splits), partials, counters)
    kernel = _attend_row if config.variant == "vector" else _attend_rows
    groups = triton.cdiv(rows_per_clip, config.block_m)
    launch(kernel, (groups * splits, heads, clips))(
        q,
        keys,
        values,
        finished,
        out,
        partials,
        counters,
        keys_count,
        rows_per_clip,
        scale,
        q.stride(0),
        out.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        TOKENS_PER_SLOT=tokens_per_slot,
        HAS_FINISHED=finished is not None,
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        BLOCK_M=config.block_m,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
        **pdl(q.device),
    )
