"""From the alignment heads' attention to the position of each token, for many windows at a time.

The arithmetic and the preference among ties are those of OpenAI's `whisper/timing.py`: attention
normalised over the tokens, a median of 7 over positions that are reflected at their ends, the mean
over heads, and the cheapest monotonic path. `engine/alignment` does the same in NumPy.

Windows are rows of one length in memory, of which each has its own number of tokens and positions:

    attention [B, H, L, P] float32    row b: the first lengths[b] tokens and seen[b] positions count
    costs [B, N, P] float32           of the tokens first .. lengths[b] - 2, N >= their number
    starts [B, N] int32
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.kernels._checks import check_dtw
from whisper_flash_attention.kernels.launch import launch

BLOCK = 128


def token_costs(
    attention: Tensor, lengths: Tensor, seen: Tensor, first: int, moments: Tensor, costs: Tensor
) -> None:
    """Write the cost of each token at each position; less is better.

    Args:
        attention: [B, H, L, P] float32, contiguous.
        lengths, seen: int32 [B]: tokens and positions of every row.
        first: the first token to locate; the last is the second to last.
        moments: [2, B, H, P] float32, written: mean and standard deviation over tokens.
        costs: [B, N, P'] float32, contiguous, P' >= P; written up to each row's sizes.
    """
    rows, heads, tokens, positions = attention.shape
    check_dtw(attention, moments, costs)
    tiles = triton.cdiv(positions, BLOCK)
    launch(_moments, (rows * heads, tiles))(
        attention, moments, lengths, rows * heads, heads, tokens, positions, BLOCK=BLOCK
    )
    count, width = costs.shape[1:]
    launch(_costs, (rows * count, tiles))(
        attention,
        moments,
        lengths,
        seen,
        costs,
        rows * heads,
        heads,
        tokens,
        positions,
        first,
        count,
        width,
        BLOCK=BLOCK,
    )


def token_starts(
    costs: Tensor, lengths: Tensor, seen: Tensor, first: int, choices: Tensor, starts: Tensor
) -> None:
    """Write the position at which each token begins on the cheapest path.

    Args:
        costs, lengths, seen, first: as for `token_costs`.
        choices: int8 [B, N + P', M], M a power of two and N or more, written.
        starts: int32 [B, N], written up to each row's number of tokens.
    """
    rows, count, width = costs.shape
    size = choices.shape[2]
    totals = costs.new_empty((rows, 2, size))
    launch(_starts, (rows,))(
        costs,
        totals,
        choices,
        starts,
        lengths,
        seen,
        first,
        count,
        width,
        choices.shape[1],
        SIZE=size,
        num_warps=max(1, size // 32),
        num_stages=1,
    )


@triton.jit
def _moments(attention, moments, lengths, planes, heads, tokens, positions, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < positions
    length = tl.load(lengths + plane // heads)
    rows = attention + plane * tokens * positions + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(length):
        total += tl.load(rows + token * positions, mask=inside, other=0.0)
    mean = total / length
    squares = tl.zeros((BLOCK,), tl.float32)
    for token in range(length):
        centred = tl.load(rows + token * positions, mask=inside, other=0.0) - mean
        squares += centred * centred
    # Where all tokens have equal weights, none is preferred.
    deviation = tl.maximum(tl.sqrt(squares / length), 1.1754943508222875e-38)
    tl.store(moments + plane * positions + columns, mean, mask=inside)
    tl.store(moments + (planes + plane) * positions + columns, deviation, mask=inside)


@triton.jit
def _costs(
    attention,
    moments,
    lengths,
    seen,
    costs,
    planes,
    heads,
    tokens,
    positions,
    first,
    count,
    width,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // count).to(tl.int64)
    token = tl.program_id(0) % count
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(seen + row)
    inside = columns < tl.where(first + token < tl.load(lengths + row) - 1, end, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(heads):
        plane = row * heads + head
        weights = attention + (plane * tokens + first + token) * positions
        means = moments + plane * positions
        deviations = moments + (planes + plane) * positions
        a = _normed(weights, means, deviations, columns - 3, end, inside)
        b = _normed(weights, means, deviations, columns - 2, end, inside)
        c = _normed(weights, means, deviations, columns - 1, end, inside)
        d = _normed(weights, means, deviations, columns, end, inside)
        e = _normed(weights, means, deviations, columns + 1, end, inside)
        f = _normed(weights, means, deviations, columns + 2, end, inside)
        g = _normed(weights, means, deviations, columns + 3, end, inside)
        # Too few positions to be reflected are left unchanged.
        total += tl.where(end > 3, _median(a, b, c, d, e, f, g), d)
    tl.store(costs + (row * count + token) * width + columns, -(total / heads), mask=inside)


@triton.jit
def _normed(weights, means, deviations, columns, end, inside):
    """Normalised attention at columns that are reflected at 0 and at the last position."""
    columns = tl.where(columns < 0, -columns, columns)
    columns = tl.where(columns >= end, 2 * (end - 1) - columns, columns)
    columns = tl.minimum(tl.maximum(columns, 0), end - 1)
    weight = tl.load(weights + columns, mask=inside, other=0.0)
    mean = tl.load(means + columns, mask=inside, other=0.0)
    return (weight - mean) / tl.load(deviations + columns, mask=inside, other=1.0)


@triton.jit
def _median(a, b, c, d, e, f, g):
    """A sorting network of 7 entries, reduced to the fourth (Devillard, 1998)."""
    a, f = tl.minimum(a, f), tl.maximum(a, f)
    a, d = tl.minimum(a, d), tl.maximum(a, d)
    b, g = tl.minimum(b, g), tl.maximum(b, g)
    c, e = tl.minimum(c, e), tl.maximum(c, e)
    a, b = tl.minimum(a, b), tl.maximum(a, b)
    d, f = tl.minimum(d, f), tl.maximum(d, f)
    c, g = tl.minimum(c, g), tl.maximum(c, g)
    c, d = tl.minimum(c, d), tl.maximum(c, d)
    d, g = tl.minimum(d, g), tl.maximum(d, g)
    e, f = tl.minimum(e, f), tl.maximum(e, f)
    b, e = tl.minimum(b, e), tl.maximum(b, e)
    b, d = tl.minimum(b, d), tl.maximum(b, d)
    return tl.minimum(d, e)


@triton.jit
def _starts(
    costs,
    totals,
    choices,
    starts,
    lengths,
    seen,
    first,
    count,
    width,
    diagonals,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, SIZE)
    tokens = tl.load(lengths + row) - 1 - first
    positions = tl.load(seen + row)
    costs += row * count * width
    totals += row * 2 * SIZE
    choices += row * diagonals * SIZE
    infinite = float("inf")
    # Totals of the last anti-diagonal, and those of the one before it of the token before.
    now = tl.where(ids == 0, tl.load(costs), infinite)
    both = tl.full((SIZE,), infinite, tl.float32)
    for diagonal in range(1, tokens + positions - 1):
        # The threads of a program exchange their totals through two alternating buffers.
        columns = diagonal - ids
        inside = (ids < tokens) & (columns >= 0) & (columns < positions)
        cost = tl.load(costs + ids * width + columns, mask=inside, other=0.0)
        buffer = totals + (diagonal & 1) * SIZE
        tl.store(buffer + ids, now)
        tl.debug_barrier()
        token = tl.load(buffer + ids - 1, mask=ids > 0, other=infinite)
        # A tie goes to the next position, even if it costs more: as OpenAI's `dtw_cpu`.
        is_both = (both < token) & (both < now)
        is_token = (token < both) & (token < now)
        least = tl.where(is_both, both, tl.where(is_token, token, now))
        choice = tl.where(is_both, 0, tl.where(is_token, 1, 2))
        tl.store(choices + diagonal * SIZE + ids, choice.to(tl.int8), mask=inside)
        now = tl.where(inside, least + cost, infinite)
        both = token
    tl.debug_barrier()
    i = tokens - 1
    j = positions - 1
    for _ in range(tokens + positions - 2):
        active = i + j > 0
        choice = tl.load(choices + (i + j) * SIZE + i, mask=active, other=2).to(tl.int32)
        is_first = active & (choice < 2)
        tl.store(starts + row * count + i, j, mask=is_first)
        i -= tl.where(is_first, 1, 0)
        j -= tl.where(active & (choice != 1), 1, 0)
    tl.store(starts + row * count, 0)
