"""Greedy choice of the next token, and a slot's state for its next step.

One program per slot merges the blocks of `logits`, decides between text and timestamps, stores the
best token, advances the slot, updates which tokens are allowed next, and writes the next step's
input row. Everything that differs between slots or calls is data.

Timestamps win over text where the log of their summed probability exceeds the best text token's
(`ApplyTimestampRules` in OpenAI's whisper/decoding.py). The grammar's state lies in `limits`: a
first text id equal to the grammar's eos means that the last token opened a pair.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from whisper_flash_attention.kernels._checks import check_greedy_sample
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait
from whisper_flash_attention.kernels.logits import LIMITS, NOWHERE, SETTINGS, Partials

# Bits of a token's flags.
SUPPRESSED = tl.constexpr(1)
SUPPRESSED_AT_BEGIN = tl.constexpr(2)
WAITS_FOR_LENGTH = tl.constexpr(4)
NO_TIMESTAMPS = tl.constexpr(8)
ENDS = tl.constexpr(16)


def greedy_sample(
    partials: Partials,
    flags: torch.Tensor,
    limits: torch.Tensor,
    settings: torch.Tensor,
    *,
    tokens: torch.Tensor,
    output: torch.Tensor,
    positions: torch.Tensor,
    finished: torch.Tensor,
    failed: torch.Tensor,
    sum_logprobs: torch.Tensor,
    embedding: torch.Tensor,
    position_embedding: torch.Tensor,
    x: torch.Tensor,
    pad: int,
    tokens_per_slot: int = 1,
) -> None:
    """Choose one token per slot and prepare the next step.

    A slot ends with a token that has the flag ENDS, or at its maximum length. An ended slot gets
    `pad` until that length, and its position stops there. The choice is that of `torch.argmax` of
    the processed scores: the lowest of equal ids, 0 if all are forbidden.

    Args:
        partials: of `logits`.
        flags [V] uint8, limits [B, 4] int32, settings [B, 8] int32: as for `logits`; `limits` is
            updated. The columns of `settings`: length at which tokens are suppressed
            at the beginning, minimum length, maximum length, length at which the timestamp
            grammar begins (-1: none), end of the first timestamp's ids, the grammar's eos, first
            timestamp id, whether timestamps are detected by probability.
        tokens: [B] int64, written.
        output: [B, T] int64, prompt included; the token is appended.
        positions: [B] int32, of the first of the tokens_per_slot tokens that this step processed;
            afterwards of the new token, which is the next step's input.
        finished: [B] bool, updated.
        failed: [B] bool, set where an allowed logit of a slot that had not ended is NaN or plus
            infinity; never cleared.
        sum_logprobs: [B] float32; the token's log-probability under the processed scores is added,
            also that of an end token.
        embedding, position_embedding: [V, D] and [positions, D].
        x: [B, D], written: their sum at the new token, rounded once to its dtype.
        pad: the token of ended slots.

    Raises:
        KernelShapeError: shapes do not fit together.
    """
    slots, blocks = partials.values.shape[1:]
    width = embedding.shape[1]
    check_greedy_sample(x, output, embedding, slots, pad)
    launch(_greedy_sample, (slots,))(
        partials.values,
        partials.ids,
        flags,
        limits,
        settings,
        tokens,
        output,
        positions,
        finished,
        failed,
        sum_logprobs,
        embedding,
        position_embedding,
        x,
        slots,
        blocks,
        flags.shape[0],
        output.shape[1],
        position_embedding.shape[0],
        output.stride(0),
        embedding.stride(0),
        position_embedding.stride(0),
        x.stride(0),
        pad,
        tokens_per_slot,
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=8 if blocks > 1024 else 4,
        **pdl(x.device),
    )


@triton.jit
def _greedy_sample(
    values,
    ids,
    flags,
    limits,
    settings,
    tokens,
    output,
    positions,
    finished,
    failed,
    sum_logprobs,
    embedding,
    position_embedding,
    x,
    slots,
    blocks,
    vocabulary,
    capacity,
    position_rows,
    output_stride,
    embedding_stride,
    position_stride,
    x_stride,
    pad,
    tokens_per_slot,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    slot = tl.program_id(0)
    release(PDL)
    wait(PDL)
    # Each warp reads a slot's state; one of them writes it, after the barrier.
    row = settings + slot * SETTINGS
    max_length = tl.load(row + 2)
    begin = tl.load(row + 6)
    detect = tl.load(row + 7) != 0
    setting = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        begin,
    )
    limit = limits + slot * LIMITS
    now = (tl.load(limit + 1), tl.load(limit + 2), tl.load(limit + 3))
    had_finished = tl.load(finished + slot) != 0
    had_failed = tl.load(failed + slot) != 0
    logprobs = tl.load(sum_logprobs + slot)
    position = tl.load(positions + slot) + tokens_per_slot
    end = tl.minimum(max_length, capacity)
    written = position < end
    sequence = output + slot * output_stride
    before = tl.load(sequence + position - 1, mask=written, other=0).to(tl.int32)

    plane = slots * blocks
    start = slot * blocks
    text, text_sum, text_id = _merge_blocks(values + start, ids + start, plane, blocks, BLOCKS)
    stamp, stamp_sum, stamp_id = _merge_blocks(
        values + 2 * plane + start, ids + plane + start, plane, blocks, BLOCKS
    )
    stamps_win = tl.where(detect, stamp + _log(stamp_sum) > text, stamp > text)
    best = tl.where(stamps_win, stamp, text)
    nothing = best == float("-inf")
    top = tl.maximum(text, stamp)
    shift = tl.where(top == float("-inf"), 0.0, top)
    stamp_part = stamp_sum * tl.exp(stamp - shift)
    text_part = text_sum * tl.exp(text - shift)
    # Where timestamps win by their sum, text is forbidden and does not count.
    total = tl.where(stamps_win & detect, 0.0, text_part) + stamp_part
    logprob = best - shift - tl.where(nothing, 0.0, _log(total))
    not_finite = text_part + stamp_part != text_part + stamp_part

    token = tl.where(nothing, 0, tl.where(stamps_win, stamp_id, text_id))
    token = tl.where(had_finished, pad, token)
    ends = (tl.load(flags + token).to(tl.int32) & ENDS) != 0
    length = position + 1
    forbid, text_from, stamp_from, stamp_end = _next_limits(
        now, setting, token, before, length, vocabulary
    )
    tl.debug_barrier()
    release_late(PDL)
    tl.store(limit, forbid)
    tl.store(limit + 1, text_from)
    tl.store(limit + 2, stamp_from)
    tl.store(limit + 3, stamp_end)
    tl.store(tokens + slot, token.to(tl.int64))
    tl.store(sequence + position, token.to(tl.int64), mask=written)
    tl.store(finished + slot, had_finished | ends | (length >= end))
    tl.store(failed + slot, had_failed | (not_finite & (had_finished == 0)))
    tl.store(sum_logprobs + slot, tl.where(had_finished, logprobs, logprobs + logprob))
    position = tl.maximum(tl.minimum(position, end - 1), 0)
    tl.store(positions + slot, position)

    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    position = tl.minimum(position, position_rows - 1)
    token_row = tl.load(embedding + token * embedding_stride + columns, mask=inside, other=0.0)
    position_row = tl.load(
        position_embedding + position * position_stride + columns, mask=inside, other=0.0
    )
    hidden = token_row.to(tl.float32) + position_row.to(tl.float32)
    tl.store(x + slot * x_stride + columns, hidden.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _merge_blocks(values, ids, plane, blocks, BLOCKS: tl.constexpr):
    """The largest score of all blocks, the sum of exponentials relative to it, its lowest id."""
    block = tl.arange(0, BLOCKS)
    known = block < blocks
    tops = tl.load(values + block, mask=known, other=float("-inf"))
    sums = tl.load(values + plane + block, mask=known, other=0.0)
    at = tl.load(ids + block, mask=known, other=NOWHERE)
    top = tl.max(tops, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(tops - shift), axis=0)
    return top, total, tl.min(tl.where(tops == top, at, NOWHERE), axis=0)


@triton.jit
def _log(total):
    """The logarithm of a sum of exponentials; minus infinity of none, NaN of NaN."""
    return tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _next_limits(now, setting, token, before, length, vocabulary):
    """The limits after `token`, which follows `before`; there are `length` tokens then."""
    text_from, stamp_from, stamp_end = now
    begin_length, min_length, grammar, initial_end, eos, begin = setting
    has_grammar = grammar >= 0
    generated = length - grammar
    last = (generated >= 1) & (token >= begin)
    pair = last & ((generated < 2) | (before >= begin))
    opening = last & (generated >= 2) & (before < begin)
    first = generated == 0
    # Timestamps do not decrease; only the one that closes a pair may repeat the one before.
    stamp_from = tl.where(text_from == eos, stamp_from + 1, stamp_from)
    stamp_from = tl.where(last, tl.where(opening, token, token + 1), stamp_from)
    stamp_from = tl.where(generated < 1, begin, stamp_from)
    stamp_end = tl.where(first, initial_end, tl.where(pair, begin, vocabulary))
    text_from = tl.where(first, begin, tl.where(opening, eos, 0))
    forbid = SUPPRESSED + tl.where(length == begin_length, SUPPRESSED_AT_BEGIN, 0)
    forbid += tl.where(length < min_length, WAITS_FOR_LENGTH, 0) + tl.where(
        has_grammar, NO_TIMESTAMPS, 0
    )
    text_from = tl.where(has_grammar, text_from, 0)
    stamp_from = tl.where(has_grammar, stamp_from, vocabulary)
    stamp_end = tl.where(has_grammar, stamp_end, vocabulary)
    return forbid, text_from, stamp_from, stamp_end
