"""Absorbed cross-attention of wide models on Hopper: the formulation `ring`, in Gluon.

    scores [keys, queries] = states . queries^T,  mean [D, queries] = states^T . weights

are warp-group products whose operands lie in shared memory. That holds all queries of the tile, and
a ring of `SLOTS` chunks, each of a block's keys and `CHUNK` columns, which the tensor memory
accelerator fills ahead of their use. A block of keys does not fit beside the queries, so its chunks
pass twice: for the scores, and for the mean, then from the L2 cache. The last `KEEP` chunks of the
first pass stay, and are the first of the second.

`D * queries` sums fill the registers: 160 of a thread for 1280 columns and 32 queries. Addresses of
chunks therefore depend on a zero that the compiler cannot see through (`_opaque_zero`): it would
keep all of them in registers otherwise, and spill the sums.

Arguments, statistics and the online softmax are those of `absorbed_attention`. Gluon is Triton's
language for explicit layouts and is called experimental: `absorbed_attention.RING_TRITON` has the
releases that compile this kernel.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from whisper_flash_attention.kernels.launch import launch

# Columns of a chunk, chunks in shared memory, and chunks that are used twice.
CHUNK, SLOTS, KEEP = 256, 4, 2
CHUNKS_LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)
LOG2_E = gl.constexpr(1.4426950408889634)
# The second of each are the names in Triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def attend_ring(
    queries: torch.Tensor, states: torch.Tensor, grid: tuple[int, int], arguments: dict[str, Any]
) -> None:
    """Launch the kernel; shapes as in `absorbed_attention`, which checks them.

    Args:
        grid: tiles of queries, and parts of the keys.
        arguments: the kernel's others, `KEYS` and `num_warps` among them.
    """
    columns = states.view(-1, states.shape[-1])
    chunks = TensorDescriptor.from_tensor(columns, [arguments["KEYS"], CHUNK], CHUNKS_LAYOUT)
    launch(ring_kernel, grid)(
        queries=queries,
        states=chunks,
        CHUNK=CHUNK,
        SLOTS=SLOTS,
        KEEP=KEEP,
        **arguments,
    )


@gluon.jit
def _opaque_zero(x):
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _block_start(block, blocks, first, n_keys, KEYS: gl.constexpr, BACKWARDS: gl.constexpr):
    """The first key of a block, and where it is read from: never beyond the clip's last key."""
    if BACKWARDS:
        block = blocks - 1 - block
    start = first + block * KEYS
    return start, gl.minimum(start, n_keys - KEYS)


@gluon.jit
def _load(
    states,
    ring,
    bars,
    index,
    clip_row,
    first,
    blocks,
    n_keys,
    CHUNKS: gl.constexpr,
    LOADS: gl.constexpr,
    BACKWARDS: gl.constexpr,
):
    """Start loading the chunk that is the `index`-th to be loaded, if there is one."""
    KEYS: gl.constexpr = ring.shape[1]
    CHUNK: gl.constexpr = ring.shape[2]
    block = index // LOADS
    slot = index % ring.shape[0]
    _, start = _block_start(block, blocks, first, n_keys, KEYS, BACKWARDS)
    column = index % LOADS % CHUNKS * CHUNK
    bar = bars.index(slot)
    mbarrier.expect(bar, KEYS * CHUNK * 2, pred=block < blocks)
    _async_load(states, [clip_row + start, column], bar, ring.index(slot), pred=block < blocks)


@gluon.jit
def _chunk(ring, bars, block, zero, j: gl.constexpr, LOADS: gl.constexpr, IS_NEW: gl.constexpr):
    """The j-th chunk that is loaded of a block, once it has arrived."""
    SLOTS: gl.constexpr = ring.shape[0]
    slot: gl.constexpr = j % SLOTS
    if IS_NEW:
        mbarrier.wait(bars.index(slot), (block * (LOADS // SLOTS) + j // SLOTS) & 1)
    return ring.index(slot + zero)


@gluon.jit
def _add_to_mean(
    mean,
    ring,
    bars,
    weights,
    decay,
    block,
    zero,
    i: gl.constexpr,
    CHUNKS: gl.constexpr,
    KEEP: gl.constexpr,
):
    """Add the i-th chunk of the second pass, which begins with those that were kept."""
    c: gl.constexpr = (i + CHUNKS - KEEP) % CHUNKS
    chunk = _chunk(
        ring, bars, block, zero, CHUNKS - KEEP + i, LOADS=2 * CHUNKS - KEEP, IS_NEW=i >= KEEP
    )
    found = warpgroup_mma(chunk.permute((1, 0)), weights, mean[c] * decay, is_async=True)
    found = warpgroup_mma_wait(0, deps=[found])
    return mean[:c] + (found,) + mean[c + 1 :]  # noqa: RUF005


@gluon.jit(do_not_specialize=["n_keys", "n_queries"])
def ring_kernel(
    queries,
    states,
    partial_out,
    partial_stats,
    finished,
    n_keys,
    n_queries,
    CLIP_QUERIES: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    TILES: gl.constexpr,
    WIDTH: gl.constexpr,
    M: gl.constexpr,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    CHUNK: gl.constexpr,
    SLOTS: gl.constexpr,
    KEEP: gl.constexpr,
    FINISHED: gl.constexpr,
    BACKWARDS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Scores [KEYS, M] of a block of keys, then mean [D, M], chunk by chunk of CHUNK columns."""
    CHUNKS: gl.constexpr = D // CHUNK
    LOADS: gl.constexpr = 2 * CHUNKS - KEEP
    gl.static_assert(LOADS % SLOTS == 0)
    dtype: gl.constexpr = queries.dtype.element_ty
    ROWS: gl.constexpr = KEYS // 16  # warps along the keys
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[ROWS, num_warps // ROWS],
        instr_shape=[16, M * ROWS // num_warps, 16],
    )
    MEAN: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, M, 16]
    )
    clip = gl.program_id(0) // TILES
    inside = (gl.program_id(0) % TILES) * WIDTH
    start = clip * CLIP_QUERIES + inside
    count = gl.minimum(WIDTH, CLIP_QUERIES - inside)
    part = gl.cdiv(gl.cdiv(n_keys, KEYS), gl.num_programs(1)) * KEYS
    first = gl.program_id(1) * part
    last = gl.minimum(first + part, n_keys)
    query = gl.arange(0, M, gl.SliceLayout(0, SCORES))
    if FINISHED:
        slots = (start + query) // HEADS // TOKENS
        done = gl.load(finished + slots, mask=query < count, other=1).to(gl.int32)
        last = gl.where(gl.min(done, 0) == 0, last, first)
    blocks = gl.maximum(gl.cdiv(last - first, KEYS), 0)
    clip_row = clip * n_keys

    ring = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, CHUNK], CHUNKS_LAYOUT)
    held = gl.allocate_shared_memory(dtype, [CHUNKS, M, CHUNK], CHUNKS_LAYOUT)
    shares = gl.allocate_shared_memory(dtype, [KEYS, M], gl.NVMMASharedLayout(2 * M, 16, rank=2))
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=1)
    _barrier()
    for i in gl.static_range(SLOTS):
        _load(states, ring, bars, i, clip_row, first, blocks, n_keys, CHUNKS, LOADS, BACKWARDS)

    THREADS: gl.constexpr = CHUNK // 8  # along the columns, 16 bytes each
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [num_warps, 1], [1, 0])
    row = gl.arange(0, M, gl.SliceLayout(1, ROW))[:, None]
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, ROW))[None, :]
    for c in gl.static_range(CHUNKS):
        at = queries + (start + row).to(gl.int64) * D + c * CHUNK + column
        held.index(c).store(gl.load(at, mask=row < count, other=0.0))
    fence_async_shared()
    _barrier()

    highest = gl.full([M], -float("inf"), gl.float32, gl.SliceLayout(0, SCORES))
    total = gl.full([M], 0.0, gl.float32, gl.SliceLayout(0, SCORES))
    mean = ()
    for _ in gl.static_range(CHUNKS):
        mean = mean + (gl.full([CHUNK, M], 0.0, gl.float32, MEAN),)  # type: ignore[assignment]  # noqa: RUF005
    key = gl.arange(0, KEYS, gl.SliceLayout(1, SCORES))
    for block in range(blocks):
        following = block * LOADS + SLOTS
        zero = _opaque_zero(block)
        scores = gl.full([KEYS, M], 0.0, gl.float32, SCORES)
        for c in gl.static_range(CHUNKS):
            chunk = _chunk(ring, bars, block, zero, c, LOADS, True)
            of_chunk = held.index(c + zero).permute((1, 0))
            scores = warpgroup_mma(chunk, of_chunk, scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            if c < CHUNKS - KEEP:
                _barrier()
                _load(
                    states, ring, bars, following, clip_row, first, blocks, n_keys,
                    CHUNKS, LOADS, BACKWARDS,
                )  # fmt: skip
                following += 1
        begin, read = _block_start(block, blocks, first, n_keys, KEYS, BACKWARDS)
        seen = (read + key >= begin) & (read + key < last)
        scores = gl.where(seen[:, None], scores * LOG2_E, -float("inf"))
        new = gl.maximum(highest, gl.max(scores, 0))
        decay = gl.exp2(highest - new)
        weights = gl.exp2(scores - new[None, :])
        total = total * decay + gl.sum(weights, 0)
        highest = new
        shares.store(weights.to(dtype))
        fence_async_shared()
        _barrier()
        decay = gl.convert_layout(decay, gl.SliceLayout(0, MEAN))[None, :]
        for i in gl.static_range(CHUNKS):
            mean = _add_to_mean(mean, ring, bars, shares, decay, block, zero, i, CHUNKS, KEEP)
            _barrier()
            _load(
                states, ring, bars, following, clip_row, first, blocks, n_keys,
                CHUNKS, LOADS, BACKWARDS,
            )  # fmt: skip
            following += 1
    for i in gl.static_range(SLOTS):
        mbarrier.invalidate(bars.index(i))

    inverse = gl.where(total > 0, 1.0 / gl.where(total > 0, total, 1.0), 0.0)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(0, MEAN))[None, :]
    start += gl.program_id(1) * n_queries
    COLUMN: gl.constexpr = gl.BlockedLayout(
        [8, 1], [THREADS, 32 // THREADS], [1, num_warps], [0, 1]
    )
    row = gl.arange(0, M, gl.SliceLayout(0, COLUMN))[None, :]
    column = gl.arange(0, CHUNK, gl.SliceLayout(1, COLUMN))[:, None]
    for c in gl.static_range(CHUNKS):
        out = gl.convert_layout((mean[c] * inverse).to(dtype), COLUMN)
        at = partial_out + (start + row).to(gl.int64) * D + c * CHUNK + column
        gl.store(at, out, mask=row < count)
    at = partial_stats + (start + query) * 2
    gl.store(at, highest, mask=query < count)
    gl.store(at + 1, total, mask=query < count)
