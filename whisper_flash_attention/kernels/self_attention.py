"""Self-attention of a few rows over a cache of keys and values that grows by a position a step.

A program works on one row and one head. Each lane of its tile of keys (a lane is a row of the
tile) keeps an online softmax of its own, and the lanes are merged once at the end: the loop over
keys needs no exchange between warps, and a past of one tile is a plain softmax.

Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018
(arXiv:1805.02867). Its use for attention: Rabe and Staats, 2021 (arXiv:2112.05682), and Dao,
"FlashAttention-2", 2023 (arXiv:2307.08691).
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.kernels._checks import check_cache_attention, check_slots
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait

# Scores are in units of log 2, because the hardware's exponential is 2 to the x.
LOG2_E = tl.constexpr(1.4426950408889634)
# The maximum of no scores: finite, so that no difference of two maxima is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Fewer programs than this leave a GPU partly idle: latency counts, not bandwidth.
_FEW_PROGRAMS = 264


@dataclass(frozen=True)
class Config:
    """How a launch is cut up.

    block: keys per tile, a power of two. warps, stages: of a program, and of its pipeline of tiles.
    eager: read the whole first tile while the position is still being loaded, instead of only up
    to the position. This saves a round trip to memory and reads keys that may not be needed;
    ignored if `ancestors` are given.
    """

    block: int
    warps: int
    stages: int
    eager: bool


def choose(rows: int, heads: int, capacity: int) -> Config:
    """The default configuration for `rows` x `heads` programs over caches of `capacity` keys."""
    if rows * heads <= _FEW_PROGRAMS:
        if capacity <= 64:
            return Config(block=32, warps=2, stages=1, eager=True)
        return Config(block=128, warps=8, stages=3, eager=True)
    return Config(block=32, warps=2, stages=3, eager=False)


@triton.jit
def load_tile(rows, offsets, valid, CACHE: tl.constexpr = tl.constexpr("")):
    """[lanes, 64]: the 64 elements at each offset [lanes] from `rows`, zeros where not `valid`."""
    at = offsets[:, None] + tl.arange(0, 64)[None, :]
    return tl.load(rows + at, mask=valid[:, None], other=0.0, cache_modifier=CACHE)


@triton.jit
def keep_loads_above():
    """Keep loads above from being moved below, after a wait for those that are used first."""
    tl.debug_barrier()


@triton.jit
def attend_tile(query, k, v, valid, top, total, mixed):
    """Add one tile of keys, one key per lane, to the online softmax.

    query [64] float32 in units of log 2; k, v [lanes, 64]; valid [lanes] bool. Per lane: the
    largest score so far, the sum of weights [lanes], the weighted sum of values [lanes, 64].
    NaN passes through the weights: a maximum skips it, an exponential does not.
    """
    score = tl.sum(k.to(tl.float32) * query[None, :], axis=1)
    score = tl.where(valid, score, float("-inf"))
    above = tl.maximum(top, score)
    weight = tl.exp2(score - above)
    keep = tl.exp2(top - above)
    total = total * keep + weight
    mixed = mixed * keep[:, None] + weight[:, None] * v.to(tl.float32)
    return above, total, mixed


@triton.jit
def merge_lanes(top, total, mixed):
    """The softmax over all lanes: largest score, sum of weights, weighted sum of values [64]."""
    above = tl.max(top, axis=0)
    share = tl.exp2(top - above)
    return above, tl.sum(total * share, axis=0), tl.sum(mixed * share[:, None], axis=0)


@triton.jit
def _self_attention(
    q,
    keys,
    values,
    positions,
    finished,
    ancestors,
    out,
    capacity,
    q_row,
    out_row,
    key_slot,
    key_head,
    key_position,
    value_slot,
    value_head,
    value_position,
    ancestors_slot,
    TOKENS_PER_SLOT: tl.constexpr,
    HAS_FINISHED: tl.constexpr,
    HAS_ANCESTORS: tl.constexpr,
    EAGER: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = row // TOKENS_PER_SLOT
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, 64)
    keys += head * key_head
    values += head * value_head
    if not HAS_ANCESTORS:
        keys += slot.to(tl.int64) * key_slot
        values += slot.to(tl.int64) * value_slot
    release(PDL)
    wait(PDL)

    last = tl.load(positions + slot) + row % TOKENS_PER_SLOT
    last = tl.minimum(last, capacity - 1)
    if HAS_FINISHED:
        last = tl.where(tl.load(finished + slot), -1, last)
    query = tl.load(q + row.to(tl.int64) * q_row + head * 64 + column).to(tl.float32) * LOG2_E

    valid = lane <= last
    # With EAGER the addresses and the mask of these loads do not depend on `last`.
    wanted = lane < capacity if EAGER else valid
    k_at = lane * key_position
    v_at = lane * value_position
    if HAS_ANCESTORS:
        owner = tl.load(ancestors + slot * ancestors_slot + lane, mask=wanted, other=0)
        k_at += owner.to(tl.int64) * key_slot
        v_at += owner.to(tl.int64) * value_slot
    k = load_tile(keys, k_at, wanted)
    v = load_tile(values, v_at, wanted)
    keep_loads_above()
    if EAGER:  # unwritten values may be NaN, and 0 * NaN is NaN
        v = tl.where(valid[:, None], v, 0.0)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, 64], tl.float32)
    top, total, mixed = attend_tile(query, k, v, valid, top, total, mixed)

    for start in tl.range(BLOCK, last + 1, BLOCK, num_stages=STAGES):
        position = start + lane
        valid = position <= last
        k_at = position * key_position
        v_at = position * value_position
        if HAS_ANCESTORS:
            owner = tl.load(ancestors + slot * ancestors_slot + position, mask=valid, other=0)
            k_at += owner.to(tl.int64) * key_slot
            v_at += owner.to(tl.int64) * value_slot
        k = load_tile(keys, k_at, valid)
        v = load_tile(values, v_at, valid)
        top, total, mixed = attend_tile(query, k, v, valid, top, total, mixed)

    release_late(PDL)
    _, weights, result = merge_lanes(top, total, mixed)
    # A finished slot has no keys: its sums are 0, and so is its result.
    result = result / tl.where(last < 0, 1.0, weights)
    tl.store(out + row.to(tl.int64) * out_row + head * 64 + column, result.to(out.dtype.element_ty))


def self_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    tokens_per_slot: int = 1,
    finished: Tensor | None = None,
    ancestors: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """softmax(q kᵀ) v over the past of each row, itself included, into `out`.

    Row r belongs to slot r // tokens_per_slot and has position
    p = positions[slot] + r % tokens_per_slot; it attends to cache positions 0 to p, up to the
    capacity T. Its own key and value are in the cache already.

    q, out: [R, D], H heads of 64 columns; q is scaled already. keys, values: [B, H, T, 64] in the
    dtype of q, any strides but a contiguous last dimension. positions: [B] int32. finished: [B]
    bool; rows of finished slots become zeros, and with `config.eager` off nothing is read for
    them. ancestors: [B, T] int32; position t of slot b is read from slot ancestors[b, t] (beam
    search). Sums are in float32; only the result is rounded to the dtype of `out`.

    Raises KernelShapeError if shapes or strides do not fit each other.
    """
    check_cache_attention(q, keys, values, out)
    slots, heads, capacity, _ = keys.shape
    check_slots(q, slots, capacity, positions, tokens_per_slot, finished, ancestors)
    rows = q.shape[0]
    config = config or choose(rows, heads, capacity)
    launch(_self_attention, (rows, heads))(
        q,
        keys,
        values,
        positions,
        finished,
        ancestors,
        out,
        capacity,
        q.stride(0),
        out.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        0 if ancestors is None else ancestors.stride(0),
        TOKENS_PER_SLOT=tokens_per_slot,
        HAS_FINISHED=finished is not None,
        HAS_ANCESTORS=ancestors is not None,
        EAGER=config.eager and ancestors is None,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
        **pdl(q.device),
    )
