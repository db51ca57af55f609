"""From scores of cross-attention to smooth attention, and how sharp it is, for many heads.

`engine/character_alignment` does the same in PyTorch, which reads and writes the scores of all
heads many times; this does so once. Rows are parts of texts, of one length in memory:

    scores [R, H, L, P] float32    row r: seen[r] positions count, and tokens where counted[r]
    squares [R, H, P] float32
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.kernels._checks import check_dtw
from whisper_flash_attention.kernels.launch import launch

BLOCK, LEAST_SIZE = 128, 1024


def smooth_attention(scores: Tensor, counted: Tensor, seen: Tensor, squares: Tensor) -> None:
    """Make scores attention: a median of 3 positions, of which the first and the last are as they
    were, and their softmax.

    Args:
        scores: [R, H, L, P] float32, contiguous; written: attention, 0 where nothing counts.
        counted: int8 [R, L], contiguous: tokens that count.
        seen: int32 [R]: positions that count, at least one.
        squares: [R, H, P] float32, contiguous, written: the sum over tokens of squared attention.
    """
    check_dtw(scores, counted, squares)
    rows, heads, tokens, positions = scores.shape
    # Few sizes, each of which is compiled.
    size = triton.next_power_of_2(max(positions, LEAST_SIZE))
    launch(_smooth, (rows * heads * tokens,))(
        *(scores, counted, seen, heads, tokens, positions),
        SIZE=size,
        num_warps=8,
    )
    launch(_squares, (rows * heads, triton.cdiv(positions, BLOCK)))(
        scores, squares, tokens, positions, BLOCK=BLOCK
    )


@triton.jit(do_not_specialize=["heads", "tokens", "positions"])
def _smooth(scores, counted, seen, heads, tokens, positions, SIZE: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    row = line // tokens // heads
    end = tl.load(seen + row)
    is_counted = tl.load(counted + row * tokens + line % tokens) != 0
    columns = tl.arange(0, SIZE)
    inside = columns < end
    line_scores = scores + line * positions
    infinite = float("inf")
    here = tl.load(line_scores + columns, mask=inside, other=-infinite)
    before = tl.load(line_scores + columns - 1, mask=inside & (columns > 0), other=-infinite)
    after = tl.load(line_scores + columns + 1, mask=columns + 1 < end, other=-infinite)
    median = tl.maximum(tl.minimum(before, here), tl.minimum(tl.maximum(before, here), after))
    smooth = tl.where((columns == 0) | (columns == end - 1), here, median)
    smooth = tl.where(inside, smooth, -infinite)
    powers = tl.exp(smooth - tl.max(smooth, axis=0))
    attention = tl.where(is_counted, powers / tl.sum(powers, axis=0), 0.0)
    tl.store(line_scores + columns, attention, mask=columns < positions)


@triton.jit(do_not_specialize=["tokens", "positions"])
def _squares(attention, squares, tokens, positions, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < positions
    lines = attention + plane * tokens * positions + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(tokens):
        weight = tl.load(lines + token * positions, mask=inside, other=0.0)
        total += weight * weight
    tl.store(squares + plane * positions + columns, total, mask=inside)
