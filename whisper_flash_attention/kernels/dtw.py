"""From the alignment heads' attention to where each token begins, for many windows at a time.

The arithmetic and the preference among ties are those of OpenAI's `whisper/timing.py`: attention
normalised over the tokens, a median of 7 over positions that are reflected at their ends, the mean
over heads, and the cheapest monotonic path. `engine/dtw.py` is the same for one window in NumPy.

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

from whisper_flash_attention.kernels.launch import launch

BLOCK = 128


def token_costs(
    attention: Tensor, lengths: Tensor, seen: Tensor, first: int, moments: Tensor, costs: Tensor
) -> None:
    """Write what it costs to have each token at each position; less is better.

    Args:
        attention: [B, H, L, P] float32, contiguous.
        lengths, seen: int32 [B]: tokens and positions of every row.
        first: the first token that is wanted; the last one is the last but one.
        moments: [2, B, H, P] float32, written: mean and standard deviation over tokens.
        costs: [B, N, P'] float32, contiguous, P' >= P; written where a row has anything.
    """
    rows, heads, tokens, positions = attention.shape
    assert attention.is_contiguous() and costs.is_contiguous() and moments.is_contiguous()
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
        starts: int32 [B, N], written as far as a row has tokens.
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
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = places < positions
    length = tl.load(lengths + plane // heads)
    rows = attention + plane * tokens * positions + places
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(length):
        total += tl.load(rows + token * positions, mask=there, other=0.0)
    mean = total / length
    squares = tl.zeros((BLOCK,), tl.float32)
    for token in range(length):
        apart = tl.load(rows + token * positions, mask=there, other=0.0) - mean
        squares += apart * apart
    # Where all tokens look alike, none is preferred.
    deviation = tl.maximum(tl.sqrt(squares / length), 1.1754943508222875e-38)
    tl.store(moments + plane * positions + places, mean, mask=there)
    tl.store(moments + (planes + plane) * positions + places, deviation, mask=there)


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
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(seen + row)
    there = places < tl.where(first + token < tl.load(lengths + row) - 1, end, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(heads):
        plane = row * heads + head
        looks = attention + (plane * tokens + first + token) * positions
        means = moments + plane * positions
        deviations = moments + (planes + plane) * positions
        a = _normed(looks, means, deviations, places - 3, end, there)
        b = _normed(looks, means, deviations, places - 2, end, there)
        c = _normed(looks, means, deviations, places - 1, end, there)
        d = _normed(looks, means, deviations, places, end, there)
        e = _normed(looks, means, deviations, places + 1, end, there)
        f = _normed(looks, means, deviations, places + 2, end, there)
        g = _normed(looks, means, deviations, places + 3, end, there)
        # Fewer positions than can be reflected are left as they are.
        total += tl.where(end > 3, _median(a, b, c, d, e, f, g), d)
    tl.store(costs + (row * count + token) * width + places, -(total / heads), mask=there)


@triton.jit
def _normed(looks, means, deviations, places, end, there):
    """Normalised attention at places that are reflected at 0 and at the last position."""
    places = tl.where(places < 0, -places, places)
    places = tl.where(places >= end, 2 * (end - 1) - places, places)
    places = tl.minimum(tl.maximum(places, 0), end - 1)
    look = tl.load(looks + places, mask=there, other=0.0)
    mean = tl.load(means + places, mask=there, other=0.0)
    return (look - mean) / tl.load(deviations + places, mask=there, other=1.0)


@triton.jit
def _median(a, b, c, d, e, f, g):
    """A sorting network of 7 without what does not matter for the fourth (Devillard, 1998)."""
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
        # The threads of a program hand their totals to one another through memory, in turns.
        places = diagonal - ids
        inside = (ids < tokens) & (places >= 0) & (places < positions)
        cost = tl.load(costs + ids * width + places, mask=inside, other=0.0)
        buffer = totals + (diagonal & 1) * SIZE
        tl.store(buffer + ids, now)
        tl.debug_barrier()
        token = tl.load(buffer + ids - 1, mask=ids > 0, other=infinite)
        # A tie goes to the next position, even where that is dearer: as OpenAI's `dtw_cpu`.
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
        goes_on = i + j > 0
        choice = tl.load(choices + (i + j) * SIZE + i, mask=goes_on, other=2).to(tl.int32)
        is_first = goes_on & (choice < 2)
        tl.store(starts + row * count + i, j, mask=is_first)
        i -= tl.where(is_first, 1, 0)
        j -= tl.where(goes_on & (choice != 1), 1, 0)
    tl.store(starts + row * count, 0)
