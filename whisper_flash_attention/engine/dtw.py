"""From attention to times: which frames belong to which token, by dynamic time warping.

The arithmetic is that of OpenAI's `whisper/timing.py`, in the same order and, where sums tie, with
the same preference, so that the times agree: attention normalised over tokens, a median of 7
positions over time, the mean over heads, and the cheapest monotonic path through its negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
from torch.nn import functional as F

MEDIAN_WIDTH = 7
# Matrices aligned at a time.
MOST_MATRICES = 8

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

# A sorting network of 7 entries without what does not matter for the fourth (N. Devillard, "Fast
# median search: an ANSI C implementation", 1998): of each pair the lesser goes to the first place.
_MEDIAN_OF_7 = (
    (0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6), (2, 3), (3, 6), (4, 5), (1, 4), (1, 3),
    (3, 4),
)  # fmt: skip


def token_costs(attention: Tensor, first: int, end: int) -> Tensor:
    """What it costs to have each token at each position.

    Args:
        attention: [heads, L, P] float32, of all tokens: the normalisation takes all of them.
        first, end: the tokens wanted.

    Returns:
        [end - first, P] float32; less is better.
    """
    std, mean = torch.std_mean(attention, dim=1, keepdim=True, correction=0)
    # Where all tokens look alike, none is preferred.
    std = std.clamp(min=torch.finfo(torch.float32).tiny)
    normed = (attention[:, first:end] - mean) / std
    return -median_filter(normed).mean(dim=0)


def median_filter(x: Tensor) -> Tensor:
    """Median of 7 neighbours along the last axis of x [N, L, P], which is reflected at its ends.

    Fewer positions than can be reflected are left as they are.
    """
    half_width = MEDIAN_WIDTH // 2
    if x.shape[-1] <= half_width:
        return x
    padded = F.pad(x, (half_width, half_width), mode="reflect")
    entries = [padded[..., shift : shift + x.shape[-1]] for shift in range(MEDIAN_WIDTH)]
    for one, other in _MEDIAN_OF_7:
        less = torch.minimum(entries[one], entries[other])
        entries[other] = torch.maximum(entries[one], entries[other])
        entries[one] = less
    return entries[half_width]


def start_positions(costs: Sequence[Floats]) -> list[Indices]:
    """Where each token begins: [N] int64, ascending, for each matrix [N, P] of costs."""
    starts = []
    for begin in range(0, len(costs), MOST_MATRICES):
        for tokens, positions in dtw(costs[begin : begin + MOST_MATRICES]):
            starts.append(positions[np.diff(tokens, prepend=-1) > 0])
    return starts


def dtw(costs: Sequence[Floats]) -> list[tuple[Indices, Indices]]:
    """The cheapest path through each matrix, from its first entry to its last.

    A step goes to the next token, the next position, or both. Matrices may be of any shapes; all
    are computed together, one anti-diagonal after the other.

    Args:
        costs: matrices [N, P] float32, N and P at least 1; sums are in float32.

    Returns:
        For each, the tokens and the positions of its path, int64 of one length.
    """
    shapes = [matrix.shape for matrix in costs]
    tokens, positions = (max(sizes) for sizes in zip(*shapes, strict=True))
    padded = np.zeros((len(costs), tokens, positions), np.float32)
    for row, matrix in zip(padded, costs, strict=True):
        row[: matrix.shape[0], : matrix.shape[1]] = matrix
    diagonal, next_token = _choices(padded)
    return [
        _trace_back(diagonal[:, index], next_token[:, index], *shape)
        for index, shape in enumerate(shapes)
    ]


def _choices(costs: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether an entry is best reached from both before, or else from the token before.

    Args:
        costs: [B, N, P].

    Returns:
        Two of [N + P - 1, B, N]: the entry (i, j) stands at (i + j, b, i).
    """
    batch, tokens, positions = costs.shape
    last = tokens + positions - 1
    diagonal, next_token = (np.zeros((last, batch, tokens), np.bool_) for _ in range(2))
    item = costs.itemsize
    # Entry (i, j) of each matrix at (i + j, b, i); rows overlap others where j is out of range.
    strides = (item, tokens * positions * item, (positions - 1) * item)
    skewed = as_strided(costs, (last, batch, tokens), strides, writeable=False)
    # Totals of three anti-diagonals, after one token that is never reached.
    totals = [np.full((batch, tokens + 1), np.inf, np.float32) for _ in range(3)]
    spare = np.empty((batch, tokens), np.float32)
    totals[1][:, 1] = costs[:, 0, 0]
    for index in range(1, last):
        begin, end = max(0, index - positions + 1), min(tokens, index + 1)
        past, previous, now = totals
        both, token = past[:, begin:end], previous[:, begin:end]
        position, here = previous[:, begin + 1 : end + 1], now[:, begin + 1 : end + 1]
        least, is_both = spare[:, begin:end], diagonal[index, :, begin:end]
        is_token = next_token[index, :, begin:end]
        # A tie goes to the next position, even where that is dearer: as OpenAI's `dtw_cpu`.
        np.minimum(token, position, out=least)
        np.less(both, least, out=is_both)
        np.minimum(both, position, out=least)
        np.less(token, least, out=is_token)
        np.copyto(here, position)
        np.copyto(here, token, where=is_token)
        np.copyto(here, both, where=is_both)
        np.add(here, skewed[index, :, begin:end], out=here)
        totals = [previous, now, past]
    return diagonal, next_token


def _trace_back(
    diagonal: npt.NDArray[np.bool_], next_token: npt.NDArray[np.bool_], tokens: int, positions: int
) -> tuple[Indices, Indices]:
    """The path that ends at the last entry, by the choices [N + P - 1, N] of one matrix."""
    i, j = tokens - 1, positions - 1
    path = [(i, j)]
    while i or j:
        if not i:
            j -= 1
        elif not j:
            i -= 1
        elif diagonal[i + j, i]:
            i, j = i - 1, j - 1
        elif next_token[i + j, i]:
            i -= 1
        else:
            j -= 1
        path.append((i, j))
    found = np.array(path[::-1], np.int64)
    return found[:, 0], found[:, 1]
