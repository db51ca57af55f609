"""Absorbed cross-attention: attend to the encoder's output itself, not to keys and values.

Where the key projection has no bias, keys k_j = W_k e_j and values v_j = W_v e_j + b_v give

    q . k_j        = (W_k^T q) . e_j                       `absorbed_projections.absorb_query`
    sum_j p_j v_j  = W_v (sum_j p_j e_j) + b_v             `absorbed_projections.project_values`

so that a single read of the states e between the two serves all heads of a clip, in every layer.

Every kernel does the same work on a tile of `count` queries of one clip and one part (`split`) of
its keys: scores of a block of keys, online softmax, weighted sum of the same block. They differ in
the roles of the operands of the matrix product:

    rows      queries are the rows of plain 2-D products; every warp needs every query
    wgmma     keys and columns are rows of warp-group products, operands in shared memory, 64 keys
    ring      as `wgmma`, for 1280 columns, of which a block of keys does not fit into shared memory
              (`absorbed_ring`)
    blocks    any dtype and small tiles: a program computes one block of output columns and reads
              all columns for the scores

`rows` and `blocks` load through pointers; `wgmma` and `ring` through tensor descriptors (the tensor
memory accelerator of CUDA capability 9.0 and above).

D is one or two powers of two, `D0 + D1` (D1 may be 0): Triton's tiles are powers of two.
Statistics are in base 2: partial_stats holds max(s) and sum(2^(s - max)) of s = log2(e) * scores;
partial_out holds the softmax-weighted mean of the split's keys. A split without keys, or a tile
whose slots have all finished, gives zeros, -inf and 0.

Online softmax: Milakov and Gimelshein, 2018; split over keys: Dao et al., Flash-Decoding, 2023.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from whisper_flash_attention.kernels._checks import check_absorbed_attention
from whisper_flash_attention.kernels.launch import (
    interpreted,
    launch,
    pdl,
    release,
    release_late,
    wait,
)

Formulation = Literal["rows", "wgmma", "ring", "blocks"]
FORMULATIONS: tuple[Formulation, ...] = get_args(Formulation)
MOST_SPLITS = 8
# Of `ring`: the width, the tile (a clip has as many keys at least), and the releases of Triton that
# compile it.
RING_WIDTH, RING_QUERIES, RING_KEYS = 1280, 32, 64
RING_TRITON = ((3, 6), (3, 9))
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of one program: at most `queries` queries of one clip, `keys` keys at a time.

    `ring` has one tile, and ignores `stages`.
    """

    formulation: Formulation
    queries: int = 16
    keys: int = 16
    warps: int = 4
    stages: int = 3


def split_columns(d: int) -> tuple[int, int] | None:
    """`d` as one or two powers of two of at least 64 (384 = 256 + 128), or None."""
    high = 1 << (d.bit_length() - 1)
    low = d - high
    if d < 64 or (low and (low < 64 or low & (low - 1))):
        return None
    return high, low


def choose_config(
    clip_queries: int,
    d: int,
    dtype: torch.dtype,
    capability: tuple[int, int] = (9, 0),
    *,
    keys: int = 1500,
) -> AttentionConfig:
    """A configuration for `clip_queries` queries per clip (rows x heads) of width `d`.

    Args:
        capability: the device's CUDA compute capability; others than 9.x and 10.x have less than
            half of their shared memory, or no tensor descriptors in hardware, hence `rows`.
    """
    if dtype == torch.float32 or split_columns(d) is None:
        return AttentionConfig("blocks", queries=16, keys=16, warps=4, stages=2)
    if capability[0] not in (9, 10):
        warps = 4 if d <= 512 else 8
        return AttentionConfig("rows", queries=16, keys=16, warps=warps, stages=2)
    if d <= 512:
        return AttentionConfig("wgmma", queries=16, keys=64, warps=4, stages=3)
    if d <= 768:
        return AttentionConfig("wgmma", queries=16, keys=64, warps=4, stages=2)
    if d <= 1024:
        return AttentionConfig("rows", queries=16, keys=32, warps=4, stages=3)
    is_ring = d == RING_WIDTH and keys >= RING_KEYS and capability[0] == 9
    if is_ring and ring_is_available():
        return AttentionConfig("ring", queries=RING_QUERIES, keys=RING_KEYS, warps=8)
    return AttentionConfig("rows", queries=32, keys=32, warps=8, stages=2)


def ring_is_available() -> bool:
    """Whether this release of Triton compiles `ring`, whose language the interpreter lacks."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not interpreted() and RING_TRITON[0] <= release <= RING_TRITON[1]


def choose_splits(rows: int, keys: int, multiprocessors: int = 132) -> int:
    """The number of parts of each clip's `keys` with which `rows` clips fill the device, up to 8.

    The time of a launch is modelled as rounds of programs over the multiprocessors, each as long
    as one part's keys, plus a start-up of about 48 keys' time per round.

    Args:
        rows: programs without a split: clips, or rows where rows share nothing.
        multiprocessors: programs that run at the same time.
    """

    def cost(splits: int) -> float:
        rounds = triton.cdiv(rows * splits, multiprocessors)
        return float(rounds * (keys / splits + 48))

    most = max(1, min(MOST_SPLITS, keys // 64))
    return min(range(1, most + 1), key=cost)


def workspace_shapes(
    rows: int, heads: int, d: int, splits: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of `partial_out` [splits, R, H, D] and `partial_stats` [splits, R, H, 2] (float32)."""
    return (splits, rows, heads, d), (splits, rows, heads, 2)


def absorbed_attention(
    queries: torch.Tensor,
    states: torch.Tensor,
    partial_out: torch.Tensor,
    partial_stats: torch.Tensor,
    *,
    rows_per_clip: int = 1,
    tokens_per_slot: int = 1,
    finished: torch.Tensor | None = None,
    splits: int,
    backwards: bool = False,
    config: AttentionConfig | None = None,
) -> None:
    """Softmax-weighted means of the states, per part of the keys: softmax_j(q . e_j) e_j.

    Args:
        queries: [R, H, D] absorbed (and scaled) queries; row r attends to clip r // rows_per_clip.
        states: [C, S, D] encoder output, C >= R / rows_per_clip; the dtype of `queries`.
        partial_out: [splits, R, H, D], written: each part's mean, normalised within the part.
        partial_stats: [splits, R, H, 2] float32, written: max of log2(e) q . e_j over the part,
            and sum of 2 ** (log2(e) q . e_j - max).
        rows_per_clip: consecutive rows that share a clip (beams, tokens of a short prefill).
        tokens_per_slot: row r belongs to slot r // tokens_per_slot.
        finished: [slots] bool; where every row of a program has finished nothing is read, and the
            row's parts are zeros with stats (-inf, 0). Other finished rows may get values.
        splits: parts of the keys, from `choose_splits`.
        backwards: read the keys from the last to the first. The keys that a launch read last may
            still be in the device's cache for the next one on the same states.
        config: overrides `choose_config`.

    Raises:
        KernelShapeError: shapes, dtypes or D do not fit each other or the formulation.
    """
    rows, heads, d = queries.shape
    device = states.device
    if config is None:
        capability = torch.cuda.get_device_capability(device) if states.is_cuda else (9, 0)
        config = choose_config(
            rows_per_clip * heads, d, states.dtype, capability, keys=states.shape[1]
        )
    check_absorbed_attention(
        queries,
        states,
        partial_out,
        partial_stats,
        rows_per_clip,
        splits,
        _formulation_reasons(states, d, config),
    )

    clip_queries = rows_per_clip * heads
    tiles = triton.cdiv(clip_queries, config.queries)
    width = triton.cdiv(clip_queries, tiles)
    tiles = triton.cdiv(clip_queries, width)
    programs = rows // rows_per_clip * tiles
    arguments: dict[str, Any] = {
        "partial_out": partial_out,
        "partial_stats": partial_stats,
        "finished": queries if finished is None else finished,
        "n_keys": states.shape[1],
        "n_queries": rows * heads,
        "CLIP_QUERIES": clip_queries,
        "HEADS": heads,
        "TOKENS": tokens_per_slot,
        "TILES": tiles,
        "WIDTH": width,
        "KEYS": config.keys,
        "FINISHED": finished is not None,
        "BACKWARDS": backwards,
        "num_warps": config.warps,
    }
    grid = (programs, splits)
    if config.formulation == "ring":
        from whisper_flash_attention.kernels.absorbed_ring import attend_ring

        attend_ring(queries, states, grid, {"M": config.queries, "D": d, **arguments})
        return

    arguments |= {
        "queries": queries,
        "STAGES": config.stages,
        **pdl(device),
    }
    if config.formulation == "blocks":
        block = 128 if d % 128 == 0 else 64
        arguments |= {"states": states, "M": 16, "D": d, "BLOCK": block, "CHUNK": 32}
        launch(blocks_kernel, (programs * (d // block), splits))(**arguments)
        return

    d0, d1 = split_columns(d) or (d, 0)
    arguments |= {"D0": d0, "D1": d1}
    if config.formulation == "rows":
        launch(rows_kernel, grid)(states=states, M=_padded(width, 16), **arguments)
        return
    arguments |= _descriptors(states, config.keys, d0, d1)
    launch(wgmma_kernel, grid)(M=_padded(width, 8), **arguments)


def _padded(width: int, least: int) -> int:
    return max(least, 1 << (width - 1).bit_length())


def _descriptors(states: torch.Tensor, keys: int, d0: int, d1: int) -> dict[str, TensorDescriptor]:
    """Boxes of `keys` keys of one clip, per block of columns; zeros beyond the clip."""
    first = TensorDescriptor.from_tensor(states, [1, keys, d0])
    second = TensorDescriptor.from_tensor(states, [1, keys, d1]) if d1 else first
    return {"states0": first, "states1": second}


def _formulation_reasons(states: torch.Tensor, d: int, config: AttentionConfig) -> list[str]:
    """Why the formulation cannot run; only `blocks` supports float32 and any multiple of 64."""
    name = config.formulation
    if name == "blocks":
        return [] if config.queries <= 16 else ["blocks takes at most 16 queries a program"]
    reasons = []
    if states.dtype == torch.float32:
        reasons.append(f"{name} is for float16 and bfloat16, not float32: use blocks")
    if split_columns(d) is None:
        reasons.append(f"{name} needs a width of one or two powers of two: use blocks")
    if name == "wgmma" and not interpreted() and not states.is_cuda:
        reasons.append(f"{name} needs a CUDA device")
    if name == "ring" and (config.queries, config.keys) != (RING_QUERIES, RING_KEYS):
        reasons.append(f"ring takes {RING_QUERIES} queries and {RING_KEYS} keys a program")
    if name == "ring" and (d != RING_WIDTH or states.shape[1] < RING_KEYS):
        reasons.append(f"ring is for a width of {RING_WIDTH} and {RING_KEYS} keys or more")
    if name == "ring" and not (states.is_cuda and ring_is_available()):
        reasons.append("ring needs a CUDA device of capability 9.x, and a Triton that compiles it")
    return reasons


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
    """The index of the k-th block to read, counted from the end with BACKWARDS."""
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
