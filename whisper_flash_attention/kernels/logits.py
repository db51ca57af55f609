"""The decoder's last layer norm, the logits, and their reduction for greedy decoding.

One pass over the embedding [V, D] (106 MB at D 1024 in half precision) takes all the time. Logits
are stored only on request: each block of the vocabulary yields, per slot, the best text token, the
best timestamp and the two sums of exponentials, which `greedy_sample` merges. Two variants: "gemv"
for one or two slots, without tensor cores, whose weights are loaded before the input is known;
"dot" for more.

Tokens are forbidden by data, so that a captured CUDA graph serves any logits processors:

    flags [V] uint8         bits of each token
    limits [B, 4] int32     per slot: bits that forbid a token now, first text id, first timestamp
                            id, end of the timestamp ids
    settings [B, 8] int32   per slot, constant; column 6 is the id at which timestamps begin
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from whisper_flash_attention.kernels._checks import check_logits
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait

SETTINGS = tl.constexpr(8)
LIMITS = tl.constexpr(4)
TIMESTAMPS_FROM = tl.constexpr(6)
NOWHERE = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Config:
    """How the vocabulary is cut up.

    Args:
        variant: "gemv" or "dot".
        block_m: slots per program ("dot"; a power of two, 16 or more).
        block_n: vocabulary ids per program, a power of two.
        block_k: columns per step of the inner loop ("dot"; a divisor of D).
        warps, stages: of the program.
    """

    variant: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def choose(slots: int, width: int, dtype: torch.dtype) -> Config:
    """The default configuration for this number of slots and width D."""
    whole = triton.next_power_of_2(width)
    size = dtype.itemsize
    if slots <= 2:
        block_n = 32 if whole * size <= 1024 else 16
        return Config("gemv", 1, block_n, whole, 8 if whole * size >= 4096 else 4, 1)
    block_k = 32 if size == 4 else 64
    if slots <= 32 and size == 2:
        return Config("dot", 16 if slots <= 16 else 32, 128, block_k, 8, 5)
    if slots <= 32:
        return Config("dot", 16 if slots <= 16 else 32, 64, block_k, 4, 3)
    return Config("dot", 64, 128 if size == 2 else 64, block_k, 8, 3)


@dataclass(frozen=True)
class Partials:
    """Reduced logits of each block of the vocabulary, per slot.

    Args:
        values: [4, B, blocks] float32: largest allowed text logit, sum of exp(logit - largest) over
            the allowed text, and the same two of timestamps. NaN among them shows in the sums.
        ids: [2, B, blocks] int32: the lowest ids of those largest logits.
        config: the tiles that `logits` uses.
    """

    values: torch.Tensor
    ids: torch.Tensor
    config: Config


def logits(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    embedding: torch.Tensor,
    flags: torch.Tensor,
    limits: torch.Tensor,
    settings: torch.Tensor,
    partials: Partials,
    *,
    raw: torch.Tensor | None = None,
    tokens_per_slot: int = 1,
    eps: float = 1e-5,
) -> None:
    """Fill `partials` with the reduced logits LN(x) embedding^T of every slot's last row.

    Args:
        x: [B * P, D], P = tokens_per_slot; slot b's row is b P + P - 1. Rows may be strided.
        norm_weight, norm_bias: [D]; without a weight x is not normalised.
        embedding: [V, D], of the dtype of x. Logits are rounded to it before they are compared.
        flags, limits, settings: see above; contiguous.
        raw: [B, V] of any floating dtype, written: the unprocessed logits.

    Raises:
        KernelShapeError: shapes do not fit together.
    """
    slots, blocks = partials.values.shape[1:]
    vocabulary, width = embedding.shape
    config = partials.config
    needed = triton.cdiv(vocabulary, config.block_n)
    block_k = width if config.variant == "gemv" else config.block_k
    check_logits(
        x, norm_weight, norm_bias, embedding, slots, (blocks, needed), tokens_per_slot, block_k
    )
    tensors = (x, norm_weight, norm_bias, embedding, flags, limits, settings)
    outputs = (partials.values, partials.ids, raw)
    strides = (x.stride(0), embedding.stride(0), 0 if raw is None else raw.stride(0))
    numbers = (slots, vocabulary, blocks, tokens_per_slot, *strides, eps)
    options = {
        "NORM": norm_weight is not None,
        "BIAS": norm_bias is not None,
        "RAW": raw is not None,
        "D": width,
        "BLOCK_N": config.block_n,
        "num_warps": config.warps,
        **pdl(x.device),
    }
    if config.variant == "gemv":
        launch(_gemv, (blocks,))(
            *tensors,
            *outputs,
            *numbers,
            SLOTS=slots,
            BLOCK_D=triton.next_power_of_2(width),
            **options,
        )
    else:
        launch(_dot, (blocks * triton.cdiv(slots, config.block_m),))(
            *tensors,
            *outputs,
            *numbers,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            num_stages=config.stages,
            **options,
        )


@triton.jit
def _gemv(
    x,
    norm_weight,
    norm_bias,
    embedding,
    flags,
    limits,
    settings,
    values,
    ids_out,
    raw,
    slots,
    vocabulary,
    blocks,
    tokens_per_slot,
    x_stride,
    embedding_stride,
    raw_stride,
    eps,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    ids = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    known = ids < vocabulary
    # Evicted first, so that the L2 cache keeps the weights of the layers.
    table = tl.load(
        embedding + ids[:, None] * embedding_stride + columns[None, :],
        mask=known[:, None] & inside[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    weight = 1.0
    bias = 0.0
    if NORM:
        weight = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    release(PDL)
    wait(PDL)
    flag = tl.load(flags + ids, mask=known, other=0).to(tl.int32)
    for slot in tl.static_range(SLOTS):
        one = slot + tl.arange(0, 1)
        bounds = _bounds(limits, settings, one, one < slots)
        row = x + (slot * tokens_per_slot + tokens_per_slot - 1) * x_stride
        hidden = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.sum(hidden, axis=0) / D
            centred = tl.where(inside, hidden - mean, 0.0)
            scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
            hidden = centred * scale * weight + bias
        hidden = hidden.to(table.dtype).to(tl.float32)
        scores = tl.sum(table.to(tl.float32) * hidden[None, :], axis=1)
        scores = scores.to(table.dtype).to(tl.float32)
        if RAW:
            place = raw + slot * raw_stride + ids
            tl.store(place, scores.to(raw.dtype.element_ty), mask=known)
        _summarise(scores[None, :], ids, flag, bounds, one, values, ids_out, slots, blocks, block)


@triton.jit
def _dot(
    x,
    norm_weight,
    norm_bias,
    embedding,
    flags,
    limits,
    settings,
    values,
    ids_out,
    raw,
    slots,
    vocabulary,
    blocks,
    tokens_per_slot,
    x_stride,
    embedding_stride,
    raw_stride,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PDL: tl.constexpr,
):
    # Programs that share rows of the embedding run side by side.
    groups = tl.cdiv(slots, BLOCK_M)
    block = tl.program_id(0) // groups
    members = tl.program_id(0) % groups * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    there = members < slots
    known = ids < vocabulary
    release(PDL)
    wait(PDL)
    flag = tl.load(flags + ids, mask=known, other=0).to(tl.int32)
    bounds = _bounds(limits, settings, members, there)
    lasts = members * tokens_per_slot + tokens_per_slot - 1
    rows = x + lasts[:, None] * x_stride + columns[None, :]
    table = embedding + ids[None, :] * embedding_stride + columns[:, None]
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if NORM:
        # Means and squared deviations of chunks put together (Chan, Golub, LeVeque 1979).
        for start in range(0, D, BLOCK_K):
            part = tl.load(rows + start, mask=there[:, None], other=0.0).to(tl.float32)
            part_mean = tl.sum(part, axis=1) / BLOCK_K
            centred = part - part_mean[:, None]
            step = part_mean - mean
            share = BLOCK_K / (start + BLOCK_K)
            mean += step * share
            squares += tl.sum(centred * centred, axis=1) + step * step * share * start
    scale = tl.rsqrt(squares / D + eps)
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        hidden = tl.load(rows + start, mask=there[:, None], other=0.0)
        part = tl.load(table + start, mask=known[None, :], other=0.0)
        if NORM:
            weight = tl.load(norm_weight + start + columns).to(tl.float32)
            normed = (hidden.to(tl.float32) - mean[:, None]) * scale[:, None] * weight[None, :]
            if BIAS:
                normed += tl.load(norm_bias + start + columns).to(tl.float32)[None, :]
            hidden = normed.to(part.dtype)
        scores = tl.dot(hidden, part, scores, input_precision="ieee")
    release_late(PDL)
    scores = scores.to(embedding.dtype.element_ty).to(tl.float32)
    if RAW:
        place = raw + members[:, None] * raw_stride + ids[None, :]
        stored = scores.to(raw.dtype.element_ty)
        tl.store(place, stored, mask=there[:, None] & known[None, :])
    _summarise(scores, ids, flag, bounds, members, values, ids_out, slots, blocks, block)


@triton.jit
def _bounds(limits, settings, members, there):
    """Per slot [M, 1]: forbidding bits, first text, first stamp, stamps' end, stamps' begin."""
    limit = limits + members * LIMITS
    forbid = tl.load(limit, mask=there, other=0)
    text_from = tl.load(limit + 1, mask=there, other=0)
    stamp_from = tl.load(limit + 2, mask=there, other=0)
    stamp_end = tl.load(limit + 3, mask=there, other=0)
    begin = tl.load(settings + members * SETTINGS + TIMESTAMPS_FROM, mask=there, other=0)
    return (
        forbid[:, None],
        text_from[:, None],
        stamp_from[:, None],
        stamp_end[:, None],
        begin[:, None],
    )


@triton.jit
def _summarise(scores, ids, flag, bounds, members, values, ids_out, slots, blocks, block):
    """Reduce scores [M, N] of the slots `members` [M] over the allowed among `ids` [N].

    Ids beyond the vocabulary are neither text (below `begin`) nor stamps (below `stamp_end`).
    """
    forbid, text_from, stamp_from, stamp_end, begin = bounds
    ids = ids[None, :]
    allowed = ((flag[None, :] & forbid) == 0) & (ids >= text_from)
    stamps = allowed & (ids >= begin) & (ids >= stamp_from) & (ids < stamp_end)
    # Offsets of values [4, B, blocks] and ids [2, B, blocks].
    there = members < slots
    plane = slots * blocks
    place = members * blocks + block
    _best(scores, allowed & (ids < begin), ids, values + place, plane, ids_out + place, there)
    _best(scores, stamps, ids, values + 2 * plane + place, plane, ids_out + plane + place, there)


@triton.jit
def _best(scores, allowed, ids, values, plane, ids_out, there):
    """Store the largest allowed score, the sum of exponentials relative to it, its lowest id."""
    scores = tl.where(allowed, scores, float("-inf"))
    comparable = tl.where(scores == scores, scores, float("-inf"))
    top = tl.max(comparable, axis=1)
    at = tl.min(tl.where(comparable == top[:, None], ids, NOWHERE), axis=1)
    # NaN, and infinity minus itself, stay visible in the sum.
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(scores - shift[:, None]), axis=1)
    tl.store(values, top, mask=there)
    tl.store(values + plane, total, mask=there)
    tl.store(ids_out, at, mask=there)
