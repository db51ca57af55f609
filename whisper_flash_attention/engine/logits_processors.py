"""Logits processors: transform the scores of the next token before one is chosen.

Every class corresponds to one logits processor of Transformers and does the same float32
operations, so that scores are identical bit for bit, but without `.tolist()`, `.item()` and shapes
that depend on data. Tables of tokens are made once per vocabulary and device, at the first call:
run once before capturing a CUDA graph. Sources: Transformers'
generation/logits_process.py; for the grammar `ApplyTimestampRules` in OpenAI's decoding.py.

`LogitsProcessors` is an ordered tuple of them. If it holds only masks and Whisper's timestamp
grammar, `LogitsProcessors.kernel_processors` describes it as small tensors for the kernels `logits`
and `greedy_sample`, so that one captured graph serves all such processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from whisper_flash_attention.engine.cuda_graphs import to_device
from whisper_flash_attention.errors import OptionError

# Bits of a token in `KernelProcessors.flags`; `KernelProcessors.limits` selects the active ones.
SUPPRESSED = 1
SUPPRESSED_AT_BEGIN = 2
WAITS_FOR_LENGTH = 4
NO_TIMESTAMPS = 8
ENDS = 16


@dataclass(frozen=True)
class History:
    """Tokens so far, prompt included, as processors see them.

    Args:
        tokens: [B, T] int64; a buffer of fixed capacity, of which only `length` tokens are valid.
        length: number of tokens: an int (equal for all slots, known on the host), or an integer
            tensor [] or [B] on the tokens' device, which is never read on the host.
    """

    tokens: Tensor
    length: int | Tensor

    @property
    def lengths(self) -> Tensor:
        """`length` as an int64 tensor, [1, 1] or [B, 1]."""
        if isinstance(self.length, int):
            return torch.full((1, 1), self.length, device=self.tokens.device)
        return self.length.reshape(-1, 1).long()

    @property
    def known(self) -> Tensor:
        """The tokens, cut to the length if the host knows it."""
        return self.tokens[:, : self.length] if isinstance(self.length, int) else self.tokens

    def is_at(self, length: int) -> bool | Tensor:
        """Whether there are `length` tokens: a bool, or a bool tensor [1, 1] or [B, 1]."""
        return self.length == length if isinstance(self.length, int) else self.lengths == length

    def is_below(self, length: int) -> bool | Tensor:
        """Whether there are fewer tokens than that, as `is_at`."""
        return self.length < length if isinstance(self.length, int) else self.lengths < length

    def last(self, back: int) -> Tensor:
        """The token `back` places from the end (1: the last one), [B, 1]; else the first one."""
        return self.tokens.gather(1, self._rows(self.lengths - back).clamp(min=0))

    def since(self, begin: int | Tensor) -> Tensor:
        """Which positions of `known` are `begin` or later and hold a token, bool [1 or B, T]."""
        places = torch.arange(self.known.shape[1], device=self.tokens.device)
        return (places >= begin) & (places < self.lengths)

    def _rows(self, places: Tensor) -> Tensor:
        return places.expand(self.tokens.shape[0], -1)


class LogitsProcessor(Protocol):
    """One transformation of the scores of the next token."""

    def apply(self, scores: Tensor, history: History) -> Tensor:
        """New scores [B, V] float32; `scores` is not changed."""


@dataclass(frozen=True)
class Suppress:
    """Forbid tokens (`SuppressTokensLogitsProcessor`); unknown ids are ignored."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        check_tokens("tokens", self.tokens)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        return _mask_scores(scores, _token_mask(self.tokens, scores.shape[-1], scores.device), True)


@dataclass(frozen=True)
class SuppressAtBegin:
    """Forbid tokens at position `begin_index` (`SuppressTokensAtBeginLogitsProcessor`)."""

    tokens: tuple[int, ...]
    begin_index: int

    def __post_init__(self) -> None:
        check_tokens("tokens", self.tokens)
        check_whole("begin_index", self.begin_index, 0)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        mask = _token_mask(self.tokens, scores.shape[-1], scores.device)
        return _mask_scores(scores, mask, history.is_at(self.begin_index))


@dataclass(frozen=True)
class MinLength:
    """Forbid the end before `length` tokens, prompt included.

    `MinLengthLogitsProcessor`, and `MinNewTokensLengthLogitsProcessor` with the sum of prompt and
    new tokens.
    """

    length: int
    eos: tuple[int, ...]

    def __post_init__(self) -> None:
        check_whole("length", self.length, 0)
        check_tokens("eos", self.eos)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        mask = _token_mask(self.eos, scores.shape[-1], scores.device)
        return _mask_scores(scores, mask, history.is_below(self.length))


@dataclass(frozen=True)
class Timestamps:
    """Whisper's timestamp grammar (`WhisperTimeStampLogitsProcessor`).

    Timestamps come in pairs except directly before the end, do not decrease, and come first. With
    `detect`, text is forbidden where all timestamps together are likelier than any text token.

    Args:
        timestamp_begin: the first timestamp's id; all ids from there on are timestamps.
        begin_index: position of the first generated token, the prompt's length.
        eos: the end's id; ids below it are plain text.
        no_timestamps: the id of <|notimestamps|>, which is forbidden.
        max_initial: largest first timestamp, counted from the first timestamp's id.
        detect: forbid text where timestamps are likelier.
    """

    timestamp_begin: int
    begin_index: int
    eos: int
    no_timestamps: int
    max_initial: int | None = None
    detect: bool = True

    def __post_init__(self) -> None:
        check_whole("begin_index", self.begin_index, 0)
        check_whole("no_timestamps", self.no_timestamps, 0)
        check_whole("eos", self.eos, 1)
        check_whole("timestamp_begin", self.timestamp_begin, self.eos + 1)
        if self.max_initial is not None:
            check_whole("max_initial", self.max_initial, 0)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        begin = self.timestamp_begin
        text_from, stamp_from, stamp_end = self.limits(history, scores.shape[-1])
        ids = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.clone()
        scores[:, self.no_timestamps] = -math.inf
        text, stamps, stamp_ids = scores[:, :begin], scores[:, begin:], ids[begin:]
        text.masked_fill_(ids[:begin] < text_from, -math.inf)
        stamps.masked_fill_((stamp_ids < stamp_from) | (stamp_ids >= stamp_end), -math.inf)
        if self.detect:
            logprobs = torch.nn.functional.log_softmax(scores.float(), dim=-1)
            stamp_logprob = logprobs[:, begin:].logsumexp(dim=-1)
            best_text = logprobs[:, :begin].max(dim=-1).values
            text.masked_fill_((stamp_logprob > best_text).unsqueeze(-1), -math.inf)
        return scores

    def limits(self, history: History, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that the grammar allows next.

        Returns:
            The first text id, the first timestamp id and the end of the timestamp ids, int64
            [B, 1] each.
        """
        begin = self.timestamp_begin
        tokens = history.known
        generated = history.lengths - self.begin_index
        last_is_stamp = (generated >= 1) & (history.last(1) >= begin)
        pair = last_is_stamp & ((generated < 2) | (history.last(2) >= begin))
        opening = last_is_stamp & ~pair
        first = generated == 0
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        stamps = history.since(self.begin_index) & (tokens >= begin)
        place = torch.where(stamps, places, 0).amax(dim=-1, keepdim=True)
        latest = tokens.gather(1, (place - 1).clamp(min=0))
        stamp_from = torch.where(place > 0, latest + (~opening).long(), begin)
        text_from = torch.where(first, begin, torch.where(opening, self.eos, 0))
        initial_end = self.initial_end(vocabulary)
        stamp_end = torch.where(first, initial_end, torch.where(pair, begin, vocabulary))
        return text_from, stamp_from, stamp_end

    def next_limits(self, tokens: Sequence[int], vocabulary: int) -> tuple[int, int, int]:
        """As `limits`, of one row whose tokens the host knows."""
        begin, generated = self.timestamp_begin, tokens[self.begin_index :]
        latest = next((token for token in reversed(generated) if token >= begin), None)
        if not generated:
            return begin, begin, self.initial_end(vocabulary)
        if generated[-1] < begin:
            return 0, begin if latest is None else latest + 1, vocabulary
        assert latest is not None
        if len(generated) == 1 or generated[-2] >= begin:
            return 0, latest + 1, begin
        return self.eos, latest, vocabulary

    def initial_end(self, vocabulary: int) -> int:
        """The end of the ids that may be the first timestamp."""
        if self.max_initial is None:
            return vocabulary
        return min(vocabulary, self.timestamp_begin + self.max_initial + 1)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide positive scores of tokens that occurred by `penalty`, multiply negative ones.

    `RepetitionPenaltyLogitsProcessor`. The first `ignore` positions, one number for all slots or
    one for each, do not count.
    """

    penalty: float
    ignore: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        check_positive("penalty", self.penalty)
        for number in self.ignore if isinstance(self.ignore, tuple) else (self.ignore,):
            check_whole("ignore", number, 0)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        vocabulary = scores.shape[-1]
        begin: int | Tensor
        if isinstance(self.ignore, int):
            begin = self.ignore
        else:
            begin = _token_tensor(self.ignore, scores.device).unsqueeze(-1)
        # Positions that do not count point at a spare column after the vocabulary.
        ids = history.known.clamp(max=vocabulary).where(history.since(begin), vocabulary)
        padded = torch.nn.functional.pad(scores, (0, 1))
        score = padded.gather(1, ids)
        score = torch.where(score < 0, score * self.penalty, score / self.penalty)
        return padded.scatter(1, ids, score)[:, :vocabulary]


@dataclass(frozen=True)
class NoRepeatNgram:
    """Forbid repeating an n-gram of `size` after the first `ignore` tokens (`NoRepeatNGram...`)."""

    size: int
    ignore: int = 0

    def __post_init__(self) -> None:
        check_whole("size", self.size, 1)
        check_whole("ignore", self.ignore, 0)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        tokens, vocabulary = history.known, scores.shape[-1]
        if tokens.shape[1] < self.size:
            return scores
        windows = tokens.unfold(1, self.size, 1)
        ends = torch.arange(windows.shape[1], device=tokens.device) + self.size
        places = history.lengths + torch.arange(1 - self.size, 0, device=tokens.device)
        prefix = tokens.gather(1, places.expand(tokens.shape[0], -1).clamp(min=0))
        same = (windows[..., :-1] == prefix.unsqueeze(1)).all(dim=-1)
        same = same & (ends <= history.lengths) & (ends >= self.ignore + self.size)
        banned = scores.new_zeros((scores.shape[0], vocabulary + 1), dtype=torch.bool)
        banned.scatter_(1, windows[..., -1].clamp(max=vocabulary).where(same, vocabulary), True)
        return scores.masked_fill(banned[:, :vocabulary], -math.inf)


@dataclass(frozen=True)
class Temperature:
    """Divide scores by `value` (`TemperatureLogitsWarper`)."""

    value: float

    def __post_init__(self) -> None:
        check_positive("value", self.value)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        return scores / self.value


@dataclass(frozen=True)
class TopK:
    """Keep the `k` best tokens, and those that tie with the last (`TopKLogitsWarper`).

    At least `keep` tokens remain; the others get the score `fill`.
    """

    k: int
    keep: int = 1
    fill: float = -math.inf

    def __post_init__(self) -> None:
        check_whole("k", self.k, 1)
        check_whole("keep", self.keep, 1)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        count = min(max(self.k, self.keep), scores.shape[-1])
        worst = torch.topk(scores, count)[0][..., -1, None]
        return scores.masked_fill(scores < worst, self.fill)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest tokens whose probabilities sum up to `p` or more (`TopPLogitsWarper`).

    At least `keep` tokens remain; the others get the score `fill`.
    """

    p: float
    keep: int = 1
    fill: float = -math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise OptionError(f"p is {self.p!r}: give a number from 0 to 1")
        check_whole("keep", self.keep, 1)

    def apply(self, scores: Tensor, history: History) -> Tensor:
        ordered, order = torch.sort(scores, descending=False)
        remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - self.p)
        remove[..., -self.keep :] = False
        return scores.masked_fill(remove.scatter(1, order, remove), self.fill)


@dataclass(frozen=True)
class Normalise:
    """Normalise scores to log-probabilities (`LogitNormalization`)."""

    def apply(self, scores: Tensor, history: History) -> Tensor:
        return torch.log_softmax(scores, dim=-1)


@dataclass(frozen=True)
class LogitsProcessors:
    """Processors in the order in which they are applied."""

    steps: tuple[LogitsProcessor, ...] = ()

    def apply(self, scores: Tensor, history: History) -> Tensor:
        """Scores [B, V] float32 after all processors; the argument is unchanged."""
        for step in self.steps:
            scores = step.apply(scores, history)
        return scores

    @cached_property
    def kernel_processors(self) -> KernelProcessors | None:
        """The processors as data for the greedy kernels; None if they are not supported.

        Supported are `Suppress`, `SuppressAtBegin` and `MinLength` in any order (they commute),
        then `Timestamps` at most once.
        """
        last = self.steps[-1] if self.steps else None
        timestamps = last if isinstance(last, Timestamps) else None
        masks = self.steps[:-1] if timestamps else self.steps
        suppress = [step for step in masks if isinstance(step, Suppress)]
        at_begin = [step for step in masks if isinstance(step, SuppressAtBegin)]
        waiting = [step for step in masks if isinstance(step, MinLength)]
        if len(suppress) + len(at_begin) + len(waiting) < len(masks):
            return None
        if len({step.begin_index for step in at_begin}) > 1 or len({r.eos for r in waiting}) > 1:
            return None
        return KernelProcessors(
            suppress=sum((step.tokens for step in suppress), ()),
            suppress_at_begin=sum((step.tokens for step in at_begin), ()),
            begin_index=at_begin[0].begin_index if at_begin else -1,
            waiting=waiting[0].eos if waiting else (),
            min_length=max((step.length for step in waiting), default=0),
            timestamps=timestamps,
        )


def _mask_scores(scores: Tensor, mask: Tensor, condition: bool | Tensor) -> Tensor:
    """Minus infinity where `mask` [V] and the condition (of all slots, or [B, 1]) hold."""
    if isinstance(condition, bool):
        return scores.masked_fill(mask, -math.inf) if condition else scores
    return scores.masked_fill(mask & condition, -math.inf)


@lru_cache(maxsize=64)
def _token_mask(tokens: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """Which ids of the vocabulary are among the tokens, bool [V]."""
    with torch.inference_mode(False):
        wanted = torch.tensor(tokens, dtype=torch.int64, device=device)
        return torch.isin(torch.arange(vocabulary, device=device), wanted)


@lru_cache(maxsize=64)
def _token_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class KernelProcessors:
    """Processors that only forbid tokens, as data for the kernels `logits` and `greedy_sample`.

    Args:
        suppress, suppress_at_begin, waiting: token ids that are forbidden always, at position
            `begin_index`, and below `min_length` tokens.
        timestamps: the timestamp grammar, applied after them.
    """

    suppress: tuple[int, ...] = ()
    suppress_at_begin: tuple[int, ...] = ()
    begin_index: int = -1
    waiting: tuple[int, ...] = ()
    min_length: int = 0
    timestamps: Timestamps | None = None

    def token_bits(self, eos: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Each bit of `flags` with the tokens that have it."""
        stamps = (self.timestamps.no_timestamps,) if self.timestamps else ()
        return (
            (SUPPRESSED, self.suppress),
            (SUPPRESSED_AT_BEGIN, self.suppress_at_begin),
            (WAITS_FOR_LENGTH, self.waiting),
            (NO_TIMESTAMPS, stamps),
            (ENDS, eos),
        )

    def flags(self, vocabulary: int, eos: tuple[int, ...], device: torch.device) -> Tensor:
        """Per token the bits SUPPRESSED ... ENDS, uint8 [V]; the ids in `eos` end a slot."""
        flags = np.zeros(vocabulary, np.uint8)
        for bit, tokens in self.token_bits(eos):
            flags[[token for token in tokens if 0 <= token < vocabulary]] |= bit
        return to_device(flags, device)

    def settings(self, vocabulary: int, max_length: int) -> tuple[int, ...]:
        """One slot's row of the kernels' `settings` [B, 8] int32.

        In order: the length at which SUPPRESSED_AT_BEGIN forbids, the minimum and the maximum
        length, the length at which the grammar begins (-1: no grammar), the end of the ids allowed
        as first timestamp, the grammar's eos, the first timestamp's id (the vocabulary's size
        without grammar: all is text), and whether timestamps are detected by their probability.
        """
        grammar = self.timestamps
        if grammar is None:
            tail = (-1, vocabulary, 0, vocabulary, 0)
        else:
            tail = (
                grammar.begin_index,
                grammar.initial_end(vocabulary),
                grammar.eos,
                grammar.timestamp_begin,
                int(grammar.detect),
            )
        return (self.begin_index, self.min_length, max_length, *tail)

    def limits(self, history: History, vocabulary: int) -> Tensor:
        """The tokens allowed next, int32 [B, 4].

        Per slot: the bits of `flags` that forbid a token now, the first text id, the first
        timestamp id and the end of the timestamp ids. `greedy_sample` updates them from then on.
        """
        batch, lengths = history.tokens.shape[0], history.lengths
        forbid = SUPPRESSED + (lengths == self.begin_index) * SUPPRESSED_AT_BEGIN
        forbid = forbid + (lengths < self.min_length) * WAITS_FOR_LENGTH
        if self.timestamps is None:
            row = (torch.zeros_like(lengths), *(torch.full_like(lengths, vocabulary),) * 2)
        else:
            forbid = forbid + NO_TIMESTAMPS
            row = self.timestamps.limits(history, vocabulary)
        return torch.cat([column.expand(batch, 1) for column in (forbid, *row)], dim=1).int()

    def next_limits(self, tokens: Sequence[int], vocabulary: int) -> tuple[int, int, int, int]:
        """As `limits`, of one row whose tokens the host knows."""
        forbid = SUPPRESSED + (len(tokens) == self.begin_index) * SUPPRESSED_AT_BEGIN
        forbid += (len(tokens) < self.min_length) * WAITS_FOR_LENGTH
        if self.timestamps is None:
            return forbid, 0, vocabulary, vocabulary
        return forbid + NO_TIMESTAMPS, *self.timestamps.next_limits(tokens, vocabulary)


def check_whole(name: str, value: int, least: int) -> None:
    """Raise `OptionError` unless it is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}: give a whole number, {least} or more")


def check_positive(name: str, value: float) -> None:
    """Raise `OptionError` unless it is a number above 0."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionError(f"{name} is {value!r}: give a number above 0")


def check_tokens(name: str, tokens: tuple[int, ...]) -> None:
    """Raise `OptionError` unless it is a tuple of whole numbers."""
    if not isinstance(tokens, tuple) or not all(isinstance(token, int) for token in tokens):
        raise OptionError(f"{name} is {tokens!r}: give a tuple of token ids")
