"""Rules give stock Transformers' scores, bit for bit, wherever the length is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as stock

from whisper_flash_attention.engine import logits_processors
from whisper_flash_attention.engine.logits_processors import (
    History,
    KernelProcessors,
    LogitsProcessors,
)
from whisper_flash_attention.errors import OptionError

VOCABULARY, STAMPS, EOS = 60, 40, 30
NO_STAMPS = STAMPS - 1
quick = settings(max_examples=60, deadline=None)


@st.composite
def situations(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scores [B, V] with ties and infinities, tokens [B, T] with many timestamps, a begin."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    begin = draw(st.integers(0, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scores = torch.randn(batch, VOCABULARY, generator=generator) * draw(st.floats(0.1, 8))
    if draw(st.booleans()):
        scores = (scores * 2).round() / 2
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -math.inf
    scores[:, STAMPS:] += draw(st.floats(-8, 8))
    choice = st.sampled_from([3, 5, 11, EOS, STAMPS, STAMPS + 2, STAMPS + 3, VOCABULARY - 1])
    rows = st.lists(choice, min_size=length, max_size=length)
    return scores, torch.tensor([draw(rows) for _ in range(batch)]), begin


def stock_timestamps(begin: int, max_initial: int | None, detect: bool) -> Any:
    options = SimpleNamespace(
        no_timestamps_token_id=NO_STAMPS,
        eos_token_id=EOS,
        bos_token_id=EOS,
        max_initial_timestamp_index=max_initial,
    )
    return stock.WhisperTimeStampLogitsProcessor(
        options, begin_index=begin, _detect_timestamp_from_logprob=detect
    )


def our_timestamps(
    begin: int, max_initial: int | None, detect: bool
) -> logits_processors.Timestamps:
    return logits_processors.Timestamps(STAMPS, begin, EOS, NO_STAMPS, max_initial, detect)


def check_equal(rule: Any, processor: Any, scores: torch.Tensor, tokens: torch.Tensor) -> None:
    """Equal with the length as an int, as a tensor, and as one of each slot, garbage beyond it."""
    expected = processor(tokens, scores.clone())
    before = scores.clone()
    batch, length = tokens.shape
    garbage = torch.full((batch, 4), STAMPS + 5)
    buffer = torch.cat([tokens, garbage], dim=1)
    for history in (
        History(tokens, length),
        History(buffer, length),
        History(buffer, torch.tensor(length)),
        History(buffer, torch.full((batch,), length, dtype=torch.int32)),
    ):
        torch.testing.assert_close(rule.apply(scores, history), expected, rtol=0, atol=0)
        assert torch.equal(scores, before)


@quick
@given(situations(), st.sampled_from([None, 0, 3, 50]), st.booleans())
def test_timestamps(
    situation: tuple[torch.Tensor, torch.Tensor, int], max_initial: int | None, detect: bool
) -> None:
    scores, tokens, begin = situation
    options = (begin, max_initial, detect)
    check_equal(our_timestamps(*options), stock_timestamps(*options), scores, tokens)


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ([], range(STAMPS, STAMPS + 4)),
        ([STAMPS], range(NO_STAMPS)),
        ([STAMPS, 3], [*range(NO_STAMPS), *range(STAMPS + 1, VOCABULARY)]),
        ([STAMPS, 3, STAMPS + 4], [*range(EOS, NO_STAMPS), *range(STAMPS + 4, VOCABULARY)]),
        ([STAMPS, 3, STAMPS + 4, STAMPS + 4], range(NO_STAMPS)),
        ([STAMPS, 3, STAMPS + 4, EOS], [*range(NO_STAMPS), *range(STAMPS + 5, VOCABULARY)]),
    ],
)
def test_the_grammar_step_by_step(answer: list[int], allowed: Any) -> None:
    tokens = torch.tensor([[1, STAMPS + 9, 2, *answer]])
    scores = our_timestamps(3, 3, False).apply(
        torch.zeros(1, VOCABULARY), History(tokens, tokens.shape[1])
    )
    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == list(allowed)


@pytest.mark.parametrize(("lead", "forced"), [(0.5, True), (1.5, False)])
def test_timestamps_win_by_their_sum(lead: float, forced: bool) -> None:
    tokens = torch.tensor([[1, STAMPS, 3]])
    scores = torch.full((1, VOCABULARY), -20.0)
    scores[0, STAMPS + 1 : STAMPS + 4] = 0.0
    scores[0, 7] = lead
    result = our_timestamps(1, None, True).apply(scores, History(tokens, 3))
    assert math.isinf(result[0, 7]) == forced


@quick
@given(situations(), st.lists(st.integers(-1, VOCABULARY + 5), max_size=8))
def test_suppressed_tokens(
    situation: tuple[torch.Tensor, torch.Tensor, int], ids: list[int]
) -> None:
    scores, tokens, begin = situation
    check_equal(
        logits_processors.Suppress(tuple(ids)),
        stock.SuppressTokensLogitsProcessor(ids),
        scores,
        tokens,
    )
    for begin_index in (begin, tokens.shape[1]):
        check_equal(
            logits_processors.SuppressAtBegin(tuple(ids), begin_index),
            stock.SuppressTokensAtBeginLogitsProcessor(ids, begin_index),
            scores,
            tokens,
        )


@quick
@given(situations(), st.integers(0, 12), st.sampled_from([(EOS,), (EOS, 3)]))
def test_minimum_length(
    situation: tuple[torch.Tensor, torch.Tensor, int], least: int, eos: tuple[int, ...]
) -> None:
    scores, tokens, begin = situation
    processor = stock.MinLengthLogitsProcessor(least, list(eos))
    check_equal(logits_processors.MinLength(least, eos), processor, scores, tokens)
    processor = stock.MinNewTokensLengthLogitsProcessor(begin, least, list(eos))
    check_equal(logits_processors.MinLength(begin + least, eos), processor, scores, tokens)


@quick
@given(situations(), st.sampled_from([0.7, 1.3, 2.0]), st.integers(1, 4))
def test_repetition(
    situation: tuple[torch.Tensor, torch.Tensor, int], penalty: float, size: int
) -> None:
    scores, tokens, begin = situation
    processor = stock.RepetitionPenaltyLogitsProcessor(penalty)
    check_equal(logits_processors.RepetitionPenalty(penalty), processor, scores, tokens)
    processor = stock.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=begin)
    check_equal(logits_processors.RepetitionPenalty(penalty, begin), processor, scores, tokens)
    cut = tuple((begin + row) % (tokens.shape[1] + 1) for row in range(len(tokens)))
    expected = torch.cat(
        [
            stock.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=begin)(row, score)
            for row, score, begin in zip(tokens[:, None], scores[:, None], cut, strict=True)
        ]
    )
    history = History(tokens, tokens.shape[1])
    assert torch.equal(
        logits_processors.RepetitionPenalty(penalty, cut).apply(scores, history), expected
    )
    check_equal(
        logits_processors.NoRepeatNgram(size),
        stock.NoRepeatNGramLogitsProcessor(size),
        scores,
        tokens,
    )
    if begin + size <= tokens.shape[1]:
        answer, history = tokens[:, begin:], History(tokens, tokens.shape[1])
        expected = stock.NoRepeatNGramLogitsProcessor(size)(answer, scores)
        assert torch.equal(
            logits_processors.NoRepeatNgram(size, begin).apply(scores, history), expected
        )


@quick
@given(
    situations(),
    st.sampled_from([0.2, 1.0, 1.7]),
    st.integers(1, VOCABULARY + 9),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(1, 3),
)
def test_warpers(
    situation: tuple[torch.Tensor, torch.Tensor, int],
    temperature: float,
    k: int,
    p: float,
    keep: int,
) -> None:
    scores, tokens, _ = situation
    for rule, processor in (
        (logits_processors.Temperature(temperature), stock.TemperatureLogitsWarper(temperature)),
        (logits_processors.TopK(k, keep), stock.TopKLogitsWarper(k, min_tokens_to_keep=keep)),
        (logits_processors.TopP(p, keep), stock.TopPLogitsWarper(p, min_tokens_to_keep=keep)),
        (logits_processors.TopK(k, keep, -9.0), stock.TopKLogitsWarper(k, -9.0, keep)),
        (logits_processors.TopP(p, keep, -9.0), stock.TopPLogitsWarper(p, -9.0, keep)),
        (logits_processors.Normalise(), stock.LogitNormalization()),
    ):
        check_equal(rule, processor, scores, tokens)


@quick
@given(situations(), st.booleans())
def test_all_in_stocks_order(
    situation: tuple[torch.Tensor, torch.Tensor, int], sampled: bool
) -> None:
    scores, tokens, begin = situation
    processors = [
        stock.RepetitionPenaltyLogitsProcessor(1.2),
        stock.NoRepeatNGramLogitsProcessor(3),
        stock.MinNewTokensLengthLogitsProcessor(begin, 4, EOS),
        stock.SuppressTokensAtBeginLogitsProcessor([3, EOS], begin),
        stock.SuppressTokensLogitsProcessor([5, 9]),
        stock_timestamps(begin, 3, True),
    ]
    ours: list[logits_processors.LogitsProcessor] = [
        logits_processors.RepetitionPenalty(1.2),
        logits_processors.NoRepeatNgram(3),
        logits_processors.MinLength(begin + 4, (EOS,)),
        logits_processors.SuppressAtBegin((3, EOS), begin),
        logits_processors.Suppress((5, 9)),
        our_timestamps(begin, 3, True),
    ]
    if sampled:
        processors += [stock.TemperatureLogitsWarper(0.6), stock.TopKLogitsWarper(20)]
        ours += [logits_processors.Temperature(0.6), logits_processors.TopK(20)]
    check_equal(
        LogitsProcessors(tuple(ours)), stock.LogitsProcessorList(processors), scores, tokens
    )


def test_each_slot_has_a_length_of_its_own() -> None:
    scores = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(3))
    tokens = torch.tensor(
        [[1, 2, STAMPS, 3, 4, STAMPS + 3], [1, 2, 5, 5, 5, 5], [1, 2, 9, 9, 9, 9]]
    )
    lengths = torch.tensor([6, 2, 4])
    chain = LogitsProcessors(
        (
            logits_processors.RepetitionPenalty(1.5),
            logits_processors.NoRepeatNgram(2),
            logits_processors.MinLength(4, (EOS,)),
            logits_processors.SuppressAtBegin((3, 7), 2),
            our_timestamps(2, 3, True),
        )
    )
    together = chain.apply(scores, History(tokens, lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = chain.apply(scores[row : row + 1], History(tokens[row : row + 1], length))
        assert torch.equal(together[row : row + 1], alone)


def test_nan_is_left_to_be_found() -> None:
    scores = torch.zeros(1, VOCABULARY)
    scores[0, 4] = math.nan
    chain = LogitsProcessors((logits_processors.Suppress((3,)), our_timestamps(1, None, True)))
    assert chain.apply(scores, History(torch.tensor([[1, STAMPS]]), 2))[0, 4].isnan()


def test_fused_takes_masks_and_then_the_grammar() -> None:
    grammar = our_timestamps(4, 3, True)
    chain = (
        logits_processors.MinLength(5, (EOS,)),
        logits_processors.MinLength(9, (EOS,)),
        logits_processors.SuppressAtBegin((3, EOS), 4),
        logits_processors.Suppress((5,)),
        logits_processors.Suppress((6, 99)),
    )
    assert LogitsProcessors((*chain, grammar)).kernel_processors == KernelProcessors(
        (5, 6, 99), (3, EOS), 4, (EOS,), 9, grammar
    )
    assert LogitsProcessors().kernel_processors == KernelProcessors()


@pytest.mark.parametrize(
    "chain",
    [
        (our_timestamps(4, 3, True), logits_processors.Suppress((5,))),
        (our_timestamps(4, 3, True), our_timestamps(4, 3, True)),
        (logits_processors.SuppressAtBegin((3,), 4), logits_processors.SuppressAtBegin((3,), 5)),
        (logits_processors.MinLength(3, (4,)), logits_processors.MinLength(3, (5,))),
        (logits_processors.RepetitionPenalty(1.2),),
        (logits_processors.NoRepeatNgram(2),),
        (logits_processors.Temperature(0.5),),
        (logits_processors.TopK(5),),
        (logits_processors.TopP(0.5),),
    ],
)
def test_fused_refuses_what_it_cannot_say(
    chain: tuple[logits_processors.LogitsProcessor, ...],
) -> None:
    assert LogitsProcessors(chain).kernel_processors is None


@quick
@given(
    situations(),
    st.sampled_from([None, 2]),
    st.integers(0, 8),
    st.integers(0, 8),
    st.booleans(),
)
def test_fused_data_forbids_what_the_rules_forbid(
    situation: tuple[torch.Tensor, torch.Tensor, int],
    max_initial: int | None,
    least: int,
    begin_index: int,
    stamps: bool,
) -> None:
    _, tokens, begin = situation
    chain: list[logits_processors.LogitsProcessor] = [
        logits_processors.Suppress((3, 8)),
        logits_processors.SuppressAtBegin((9, EOS), begin_index),
        logits_processors.MinLength(least, (EOS,)),
    ]
    if stamps:
        chain.append(our_timestamps(begin, max_initial, False))
    together = LogitsProcessors(tuple(chain))
    assert together.kernel_processors is not None
    length = tokens.shape[1]
    flags = together.kernel_processors.flags(VOCABULARY, (EOS,), tokens.device).long()
    limits = together.kernel_processors.limits(History(tokens, length), VOCABULARY)
    stamp_begin = together.kernel_processors.settings(VOCABULARY, 20)[6]
    assert limits.dtype == torch.int32 and limits.shape == (len(tokens), 4)
    forbid, text_from, stamp_from, stamp_end = limits.long().T[..., None]
    ids = torch.arange(VOCABULARY)
    allowed = (flags & forbid) == 0
    allowed &= ids >= text_from
    allowed &= (ids < stamp_begin) | ((ids >= stamp_from) & (ids < stamp_end))
    scores = together.apply(torch.zeros(len(tokens), VOCABULARY), History(tokens, length))
    assert torch.equal(allowed, torch.isfinite(scores))
    assert (flags & 16).nonzero().flatten().tolist() == [EOS]


@pytest.mark.parametrize(
    "make",
    [
        lambda: logits_processors.Suppress([3]),
        lambda: logits_processors.Suppress((3.5,)),
        lambda: logits_processors.SuppressAtBegin((3,), -1),
        lambda: logits_processors.MinLength(-1, (3,)),
        lambda: logits_processors.Timestamps(40, 3, 40, 39),
        lambda: logits_processors.Timestamps(40, 3, 0, 39),
        lambda: logits_processors.Timestamps(40, 3, 30, 39, -1),
        lambda: logits_processors.RepetitionPenalty(0.0),
        lambda: logits_processors.RepetitionPenalty(1.0, (1, -2)),
        lambda: logits_processors.NoRepeatNgram(0),
        lambda: logits_processors.Temperature(0.0),
        lambda: logits_processors.Temperature(math.nan),
        lambda: logits_processors.TopK(0),
        lambda: logits_processors.TopK(2, 0),
        lambda: logits_processors.TopP(1.1),
    ],
)
def test_impossible_options_are_named(make: Any) -> None:
    with pytest.raises(OptionError, match=r"give a"):
        make()
