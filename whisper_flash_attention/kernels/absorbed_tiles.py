"""The bodies of absorbed cross-attention: one clip's keys, read once, for several queries.

Every kernel here does the same work on a tile of `count` queries of one clip and one part
(`split`) of its keys: scores of a block of keys, online softmax, weighted sum of the same block.
They differ in which operand of the matrix product is what, hence in who holds it:

    rows      queries are the rows of plain 2-D products; every warp needs every query
    wgmma     keys and columns as rows of warp-group products, operands in shared memory, 64 keys
    blocks    any dtype and small tiles: one program makes one block of output columns and reads
              all columns for the scores

`rows` and `blocks` load through pointers; `wgmma` through tensor descriptors (the tensor memory
accelerator of CUDA capability 9.0 and above).

D is one or two powers of two, `D0 + D1` (D1 may be 0): Triton's tiles are powers of two.
Statistics are in base 2: partial_stats holds max(s) and sum(2^(s - max)) of s = log2(e) * scores;
partial_out holds the softmax-weighted mean of the split's keys. A split without keys, or a tile
whose slots have all finished, gives zeros, -inf and 0.

Online softmax: Milakov and Gimelshein, 2018; split over keys: Dao et al., Flash-Decoding, 2023.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from whisper_flash_attention.kernels.launch import release, release_late, wait

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_bounds(
    tile,
    finished,
    n_keys,
    CLIP_QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    FINISHED: tl.constexpr,
):
    """The tile's clip, first query, queries and its keys' bounds (no keys if all have finished)."""
    clip = tile // TILES
    inside = (tile % TILES) * WIDTH
    start = clip * CLIP_QUERIES + inside
    count = min(WIDTH, CLIP_QUERIES - inside)
    part = tl.cdiv(tl.cdiv(n_keys, KEYS), tl.num_programs(1)) * KEYS
    first = tl.program_id(1) * part
    last = min(first + part, n_keys)
    if FINISHED:
        query = tl.arange(0, PADDED)
        slot = (start + query) // HEADS // TOKENS
        done = tl.load(finished + slot, mask=query < count, other=1).to(tl.int32)
        last = tl.where(tl.min(done, 0) == 0, last, first)
    return clip, start, count, first, last


@triton.jit
def key_block(k, first, last, KEYS: tl.constexpr, BACKWARDS: tl.constexpr):
    """The block of keys that has block k's turn: k itself, or the one as near to the end."""
    if BACKWARDS:
        k = first + (tl.cdiv(last - first, KEYS) - 1) * KEYS - (k - first)
    return k


@triton.jit
def softmax_step(scores, seen, highest, total, QUERY: tl.constexpr):
    """One step of the online softmax; queries lie on axis QUERY of `scores` (0 or 1)."""
    KEY: tl.constexpr = 1 - QUERY
    scores = tl.where(tl.expand_dims(seen, QUERY), scores * LOG2_E, -float("inf"))
    new = tl.maximum(highest, tl.max(scores, KEY))
    decay = tl.exp2(highest - new)
    weights = tl.exp2(scores - tl.expand_dims(new, KEY))
    return weights, decay, new, total * decay + tl.sum(weights, KEY)


@triton.jit
def inverse_sum(total):
    """1 / total, or 0 where no key was seen."""
    return tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def load_queries(queries, start, index, count, first: tl.constexpr, D: tl.constexpr, C, M):
    """[M, C] queries from column `first` on, zero beyond `count`."""
    query = index + tl.arange(0, M)[:, None]
    column = first + tl.arange(0, C)[None, :]
    at = queries + (start + query).to(tl.int64) * D + column
    return tl.load(at, mask=query < count, other=0.0)


@triton.jit
def store_mean(mean, partial_out, start, index, count, first: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_queries`: mean [M, C]; `start` includes the split."""
    query = index + tl.arange(0, mean.shape[0])[:, None]
    column = first + tl.arange(0, mean.shape[1])[None, :]
    at = partial_out + (start + query).to(tl.int64) * D + column
    tl.store(at, mean.to(partial_out.dtype.element_ty), mask=query < count)


@triton.jit
def store_stats(highest, total, partial_stats, start, index, count):
    query = index + tl.arange(0, highest.shape[0])
    at = partial_stats + (start + query) * 2
    tl.store(at, highest, mask=query < count)
    tl.store(at + 1, total, mask=query < count)


@triton.jit(do_not_specialize=["n_keys", "n_queries"])
def rows_kernel(
    queries,
    states,
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
    M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    FINISHED: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Formulation `rows`: scores [M, keys] = queries . states^T, mean [M, D] = weights . states."""
    D: tl.constexpr = D0 + D1
    release(PDL)
    wait(PDL)
    clip, start, count, first, last = tile_bounds(
        tl.program_id(0), finished, n_keys, CLIP_QUERIES, HEADS, TOKENS, TILES, WIDTH, M, KEYS,
        FINISHED,
    )  # fmt: skip
    q0 = load_queries(queries, start, 0, count, 0, D, D0, M)
    mean0 = tl.zeros((M, D0), tl.float32)
    q1 = q0
    mean1 = tl.zeros((1, 1), tl.float32)
    if D1 > 0:
        q1 = load_queries(queries, start, 0, count, D0, D, D1, M)
        mean1 = tl.zeros((M, D1), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    key = tl.arange(0, KEYS)
    clip_states = states + clip.to(tl.int64) * n_keys * D
    for block in tl.range(first, last, KEYS, num_stages=STAGES):
        k = key_block(block, first, last, KEYS, BACKWARDS)
        seen = k + key < last
        at = clip_states + (k + key)[:, None] * D
        e0 = tl.load(at + tl.arange(0, D0)[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q0, tl.trans(e0), input_precision="ieee")
        if D1 > 0:
            e1 = tl.load(at + D0 + tl.arange(0, D1)[None, :], mask=seen[:, None], other=0.0)
            scores = tl.dot(q1, tl.trans(e1), scores, input_precision="ieee")
        weights, decay, highest, total = softmax_step(scores, seen, highest, total, 0)
        weights = weights.to(e0.dtype)
        mean0 = tl.dot(weights, e0, mean0 * decay[:, None], input_precision="ieee")
        if D1 > 0:
            mean1 = tl.dot(weights, e1, mean1 * decay[:, None], input_precision="ieee")
    release_late(PDL)
    inverse = inverse_sum(total)[:, None]
    start += tl.program_id(1) * n_queries
    store_mean(mean0 * inverse, partial_out, start, 0, count, 0, D)
    if D1 > 0:
        store_mean(mean1 * inverse, partial_out, start, 0, count, D0, D)
    store_stats(highest, total, partial_stats, start, 0, count)


@triton.jit(do_not_specialize=["n_keys", "n_queries"])
def wgmma_kernel(
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
    M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    FINISHED: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Formulation `wgmma`: scores [keys, M] = states . queries^T, mean [D, M] = states^T . p."""
    D: tl.constexpr = D0 + D1
    release(PDL)
    wait(PDL)
    clip, start, count, first, last = tile_bounds(
        tl.program_id(0), finished, n_keys, CLIP_QUERIES, HEADS, TOKENS, TILES, WIDTH, M, KEYS,
        FINISHED,
    )  # fmt: skip
    q0 = tl.trans(load_queries(queries, start, 0, count, 0, D, D0, M))
    mean0 = tl.zeros((D0, M), tl.float32)
    q1 = q0
    mean1 = tl.zeros((1, 1), tl.float32)
    if D1 > 0:
        q1 = tl.trans(load_queries(queries, start, 0, count, D0, D, D1, M))
        mean1 = tl.zeros((D1, M), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for block in tl.range(first, last, KEYS, num_stages=STAGES):
        k = key_block(block, first, last, KEYS, BACKWARDS)
        e0 = tl.reshape(states0.load([clip, k, 0]), (KEYS, D0))
        scores = tl.dot(e0, q0)
        if D1 > 0:
            e1 = tl.reshape(states1.load([clip, k, D0]), (KEYS, D1))
            scores = tl.dot(e1, q1, scores)
        seen = k + tl.arange(0, KEYS) < last
        weights, decay, highest, total = softmax_step(scores, seen, highest, total, 1)
        weights = weights.to(e0.dtype)
        mean0 = tl.dot(tl.trans(e0), weights, mean0 * decay[None, :])
        if D1 > 0:
            mean1 = tl.dot(tl.trans(e1), weights, mean1 * decay[None, :])
    release_late(PDL)
    inverse = inverse_sum(total)[None, :]
    start += tl.program_id(1) * n_queries
    store_mean(tl.trans(mean0 * inverse), partial_out, start, 0, count, 0, D)
    if D1 > 0:
        store_mean(tl.trans(mean1 * inverse), partial_out, start, 0, count, D0, D)
    store_stats(highest, total, partial_stats, start, 0, count)


@triton.jit(do_not_specialize=["n_keys", "n_queries"])
def blocks_kernel(
    queries,
    states,
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
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    FINISHED: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Formulation `blocks`: BLOCK output columns; scores from CHUNK columns at a time."""
    BLOCKS: tl.constexpr = D // BLOCK
    release(PDL)
    wait(PDL)
    clip, start, count, first, last = tile_bounds(
        tl.program_id(0) // BLOCKS, finished, n_keys, CLIP_QUERIES, HEADS, TOKENS, TILES, WIDTH, M,
        KEYS,
        FINISHED,
    )  # fmt: skip
    block = tl.program_id(0) % BLOCKS
    column = tl.arange(0, CHUNK)[None, :]
    query = tl.arange(0, M)[:, None]
    mean = tl.zeros((M, BLOCK), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    key = tl.arange(0, KEYS)
    clip_states = states + clip.to(tl.int64) * n_keys * D
    tile_queries = queries + (start + query).to(tl.int64) * D + column
    for step in range(first, last, KEYS):
        k = key_block(step, first, last, KEYS, BACKWARDS)
        seen = k + key < last
        at = clip_states + (k + key)[:, None] * D
        scores = tl.zeros((M, KEYS), tl.float32)
        for c in tl.range(0, D, CHUNK, num_stages=STAGES):
            q = tl.load(tile_queries + c, mask=query < count, other=0.0)
            e = tl.load(at + c + column, mask=seen[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(e), scores, input_precision="ieee")
        weights, decay, highest, total = softmax_step(scores, seen, highest, total, 0)
        own = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        e = tl.load(at + own, mask=seen[:, None], other=0.0)
        mean = tl.dot(weights.to(e.dtype), e, mean * decay[:, None], input_precision="ieee")
    start += tl.program_id(1) * n_queries
    release_late(PDL)
    mean *= inverse_sum(total)[:, None]
    store_mean(mean, partial_out + block * BLOCK, start, 0, count, 0, D)
    if block == 0:
        store_stats(highest, total, partial_stats, start, 0, count)
