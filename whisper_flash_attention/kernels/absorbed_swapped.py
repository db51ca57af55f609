"""Formulation `swapped` of absorbed cross-attention (see `absorbed_tiles`).

Each warp owns a slice of the D columns; keys (for scores) and columns (for the mean) are the rows
of the products, and queries are their columns, in one or two powers of two of at least 8: the
products' columns come in eights, where their rows come in sixteens. 20 heads are 16 + 8 columns,
not 32 rows, so that 24 x 1280 sums and all operands fit into the registers of 8 warps.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from whisper_flash_attention.kernels.absorbed_tiles import (
    inverse_sum,
    load_queries,
    softmax_step,
    store_mean,
    store_stats,
    tile_of,
)
from whisper_flash_attention.kernels.launch import release, wait


@triton.jit
def _queries(queries, start, index, count, first: tl.constexpr, D: tl.constexpr, W, C, M):
    """[W, C, M] queries of the W * C columns from `first` on."""
    q = load_queries(queries, start, index, count, first, D, W * C, M)
    return tl.permute(tl.reshape(q, (M, W, C)), (1, 2, 0))


@triton.jit
def _scores(e0, e1, q0, q1, D1: tl.constexpr):
    """[keys, M] from keys [keys, W, C] and queries [W, C, M]."""
    parts = tl.dot(tl.permute(e0, (1, 0, 2)), q0)
    if D1 > 0:
        parts = tl.dot(tl.permute(e1, (1, 0, 2)), q1, parts)
    return tl.sum(parts, 0)


@triton.jit
def _add(weights, decay, e0, e1, mean0, mean1, W: tl.constexpr, D1: tl.constexpr):
    """means [W, C, M] * decay + keys^T . weights."""
    wide = tl.broadcast_to(weights[None, :, :], (W, weights.shape[0], weights.shape[1]))
    wide = wide.to(e0.dtype)
    decay = decay[None, None, :]
    mean0 = tl.dot(tl.permute(e0, (1, 2, 0)), wide, mean0 * decay)
    if D1 > 0:
        mean1 = tl.dot(tl.permute(e1, (1, 2, 0)), wide, mean1 * decay)
    return mean0, mean1


@triton.jit
def _store(
    mean0, mean1, highest, total, partial_out, partial_stats, start, index, count,
    D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = highest.shape[0]
    inverse = inverse_sum(total)[None, None, :]
    mean0 = tl.reshape(tl.permute(mean0 * inverse, (2, 0, 1)), (M, D0))
    store_mean(mean0, partial_out, start, index, count, 0, D0 + D1)
    if D1 > 0:
        mean1 = tl.reshape(tl.permute(mean1 * inverse, (2, 0, 1)), (M, D1))
        store_mean(mean1, partial_out, start, index, count, D0, D0 + D1)
    store_stats(highest, total, partial_stats, start, index, count)


@triton.jit(do_not_specialize=["n_keys", "n_queries"])
def swapped_kernel(
    queries,
    states0,
    states1,
    partial_out,
    partial_stats,
    finished,
    n_keys,
    n_queries,
    CLIP_QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    WARPS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    FINISHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """M0 + M1 queries (M1 may be 0), each with means [WARPS, D / WARPS, M]."""
    D: tl.constexpr = D0 + D1
    C0: tl.constexpr = D0 // WARPS
    C1: tl.constexpr = D1 // WARPS
    release(PDL)
    wait(PDL)
    clip, start, count, first, last = tile_of(
        tl.program_id(0), finished, n_keys, CLIP_QUERIES, HEADS, TOKENS, TILES, WIDTH, PADDED, KEYS,
        FINISHED,
    )  # fmt: skip
    none = tl.zeros((1, 1, 1), tl.float32)
    mean00 = tl.zeros((WARPS, C0, M0), tl.float32)
    mean01, mean10, mean11 = none, none, none
    highest0 = tl.full((M0,), -float("inf"), tl.float32)
    total0 = tl.zeros((M0,), tl.float32)
    highest1, total1 = highest0, total0
    q00 = _queries(queries, start, 0, count, 0, D, WARPS, C0, M0)
    q01, q10, q11 = q00, q00, q00
    if D1 > 0:
        q01 = _queries(queries, start, 0, count, D0, D, WARPS, C1, M0)
        mean01 = tl.zeros((WARPS, C1, M0), tl.float32)
    if M1 > 0:
        q10 = _queries(queries, start, M0, count, 0, D, WARPS, C0, M1)
        mean10 = tl.zeros((WARPS, C0, M1), tl.float32)
        highest1 = tl.full((M1,), -float("inf"), tl.float32)
        total1 = tl.zeros((M1,), tl.float32)
        if D1 > 0:
            q11 = _queries(queries, start, M0, count, D0, D, WARPS, C1, M1)
            mean11 = tl.zeros((WARPS, C1, M1), tl.float32)
    for k in tl.range(first, last, KEYS, num_stages=STAGES):
        e0 = tl.reshape(states0.load([clip, k, 0]), (KEYS, WARPS, C0))
        e1 = e0
        if D1 > 0:
            e1 = tl.reshape(states1.load([clip, k, D0]), (KEYS, WARPS, C1))
        seen = k + tl.arange(0, KEYS) < last
        scores0 = _scores(e0, e1, q00, q01, D1)
        if M1 > 0:
            scores1 = _scores(e0, e1, q10, q11, D1)
        weights0, decay0, highest0, total0 = softmax_step(scores0, seen, highest0, total0, 1)
        if M1 > 0:
            weights1, decay1, highest1, total1 = softmax_step(scores1, seen, highest1, total1, 1)
        mean00, mean01 = _add(weights0, decay0, e0, e1, mean00, mean01, WARPS, D1)
        if M1 > 0:
            mean10, mean11 = _add(weights1, decay1, e0, e1, mean10, mean11, WARPS, D1)
    start += tl.program_id(1) * n_queries
    _store(mean00, mean01, highest0, total0, partial_out, partial_stats, start, 0, count, D0, D1)
    if M1 > 0:
        _store(
            mean10, mean11, highest1, total1, partial_out, partial_stats, start, M0, count, D0, D1
        )  # fmt: skip
