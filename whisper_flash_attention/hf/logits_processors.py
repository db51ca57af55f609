"""Transformers' processors and criteria as the engine's rules and limits.

Types are matched exactly: a subclass may do anything, so it is handed over, as is whatever has no
counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import (
    LogitsProcessor,
    LogitsProcessors,
    MinLength,
    NoRepeatNgram,
    RepetitionPenalty,
    Suppress,
    SuppressAtBegin,
    Temperature,
    Timestamps,
    TopK,
    TopP,
)
from whisper_flash_attention.engine.request import Beams, Request
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.hf import Handover, Reason
from whisper_flash_attention.hf.compat import (
    SORTS_SAMPLED_BEAMS,
    BaseModelOutput,
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WhisperNoSpeechDetection,
    WhisperTimeStampLogitsProcessor,
)


def _tokens(ids: torch.Tensor) -> tuple[int, ...]:
    return tuple(ids.tolist())


def _ignored(prompt: int | torch.Tensor | None) -> int | tuple[int, ...]:
    if isinstance(prompt, torch.Tensor):
        return _tokens(prompt)
    return prompt or 0


RULES: dict[type, Callable[[Any], LogitsProcessor]] = {
    SuppressTokensLogitsProcessor: lambda p: Suppress(_tokens(p.suppress_tokens)),
    SuppressTokensAtBeginLogitsProcessor: lambda p: SuppressAtBegin(
        _tokens(p.begin_suppress_tokens), p.begin_index
    ),
    WhisperTimeStampLogitsProcessor: lambda p: Timestamps(
        timestamp_begin=p.timestamp_begin,
        begin_index=p.begin_index,
        eos=p.eos_token_id,
        no_timestamps=p.no_timestamps_token_id,
        max_initial=p.max_initial_timestamp_index,
        detect=p._detect_timestamp_from_logprob,
    ),
    MinLengthLogitsProcessor: lambda p: MinLength(p.min_length, _tokens(p.eos_token_id)),
    MinNewTokensLengthLogitsProcessor: lambda p: MinLength(
        p.prompt_length_to_skip + p.min_new_tokens, _tokens(p.eos_token_id)
    ),
    RepetitionPenaltyLogitsProcessor: lambda p: RepetitionPenalty(
        p.penalty, _ignored(p.prompt_ignore_length)
    ),
    NoRepeatNGramLogitsProcessor: lambda p: NoRepeatNgram(p.ngram_size),
    TemperatureLogitsWarper: lambda p: Temperature(p.temperature),
    TopKLogitsWarper: lambda p: TopK(p.top_k, p.min_tokens_to_keep, p.filter_value),
    TopPLogitsWarper: lambda p: TopP(p.top_p, p.min_tokens_to_keep, p.filter_value),
}


def translate_rules(processors: Iterable[Any]) -> LogitsProcessors | Handover:
    """The rules that do what these processors do, in their order.

    `WhisperNoSpeechDetection` changes no score and is left out; `listen` runs it.
    """
    rules = []
    for processor in processors:
        kind = type(processor)
        if kind is WhisperNoSpeechDetection:
            continue
        if kind not in RULES:
            return Handover(Reason.PROCESSOR, kind.__name__)
        try:
            rules.append(RULES[kind](processor))
        except OptionError as error:
            return Handover(Reason.PROCESSOR, f"{kind.__name__}: {error}")
    return LogitsProcessors(tuple(rules))


def translate_limits(criteria: Iterable[Any]) -> tuple[int, tuple[int, ...]] | Handover:
    """The largest length, prompt included, and the tokens that end a row, of stopping criteria."""
    lengths: list[int] = []
    ends: list[int] = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends += criterion.eos_token_id.tolist()
        else:
            return Handover(Reason.CRITERION, type(criterion).__name__)
    if not lengths:
        return Handover(Reason.CRITERION, "no largest length")
    return min(lengths), tuple(ends)


def translate_beams(config: Any) -> Beams:
    """The search that Transformers' `_beam_search` makes of a `GenerationConfig`."""
    ends = config._eos_token_tensor
    kept = max(2, 1 + (0 if ends is None else len(ends)))
    return Beams(
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        candidates=kept * config.num_beams,
        sort_sampled=SORTS_SAMPLED_BEAMS,
    )


def translate(
    processors: Iterable[Any],
    criteria: Iterable[Any],
    config: Any,
    *,
    by_beams: bool = False,
    **more: Any,
) -> Request | Handover:
    """The engine's request for what Transformers' `_sample` or `_beam_search` was asked for.

    Args:
        processors, criteria: the lists that these get.
        config: their `GenerationConfig`.
        by_beams: it was `_beam_search`.
        **more: further fields of the request.
    """
    rules = translate_rules(processors)
    if isinstance(rules, Handover):
        return rules
    limits = translate_limits(criteria)
    if isinstance(limits, Handover):
        return limits
    max_length, eos = limits
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    if by_beams and not pad and eos:
        # Transformers takes a padding of 0 for none there.
        pad = eos[0]
    wants_dictionary = bool(config.return_dict_in_generate)
    return Request(
        processors=rules,
        max_length=max_length,
        eos=eos,
        pad=pad,
        sample=bool(config.do_sample),
        beams=translate_beams(config) if by_beams else None,
        want_scores=wants_dictionary and bool(config.output_scores),
        want_logits=wants_dictionary and bool(config.output_logits),
        **more,
    )


def detects_silence(processors: list[Any]) -> bool:
    """Whether any of the processors listens for silence."""
    return any(type(processor) is WhisperNoSpeechDetection for processor in processors)


def listen(
    processors: list[Any],
    engine: Engine,
    states: torch.Tensor,
    prompt: torch.Tensor,
    request: Request,
) -> None:
    """Have every `WhisperNoSpeechDetection` among the processors note what it notes.

    Args:
        states: the encoder's output `[clips, S, D]`.
        prompt: `[B, P]` int64.
        request: what is about to be decoded.
    """
    for index, processor in enumerate(processors):
        if type(processor) is not WhisperNoSpeechDetection:
            continue
        if processor.start_of_trans_offset > 1:
            _listen_in_the_prompt(processor, states, prompt)
        else:
            scores = _first_logits(engine, states, prompt, request)
            for earlier in processors[:index]:
                scores = earlier(prompt, scores)
            processor(prompt, scores)


def _listen_in_the_prompt(processor: Any, states: torch.Tensor, prompt: torch.Tensor) -> None:
    """Stock runs the whole model on the inputs of the first temperature: give it the states.

    After a fallback of some rows only, those inputs belong to more rows than `states` does; stock
    looks at all of them, and so does this.
    """
    inputs = processor.inputs
    if inputs is not None and inputs["input_features"].shape[0] == states.shape[0]:
        known = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        processor.inputs = {k: v for k, v in inputs.items() if k != "input_features"} | known
    try:
        processor(prompt, prompt.new_empty(0))
    finally:
        processor.inputs = inputs


def _first_logits(
    engine: Engine, states: torch.Tensor, prompt: torch.Tensor, request: Request
) -> torch.Tensor:
    """The model's logits `[B, V]` after the prompt, float32."""
    one_step = replace(
        request,
        processors=LogitsProcessors(),
        max_length=prompt.shape[1] + 1,
        sample=False,
        beams=None,
        want_scores=False,
        want_logits=True,
        on_token=None,
    )
    logits = engine.decode(states, prompt, one_step).logits
    assert logits is not None
    return logits[0]
