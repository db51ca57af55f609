"""Translation of Transformers' logits processors and stopping criteria to an engine request.

Types are matched exactly: subclasses, and types without a counterpart, make the call fall back.
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
from whisper_flash_attention.hf.fallback import Fallback, FallbackReason


def _tokens(ids: torch.Tensor) -> tuple[int, ...]:
    return tuple(ids.tolist())


def _ignored_prompt(prompt: int | torch.Tensor | None) -> int | tuple[int, ...]:
    if isinstance(prompt, torch.Tensor):
        return _tokens(prompt)
    return prompt or 0


PROCESSOR_TRANSLATIONS: dict[type, Callable[[Any], LogitsProcessor]] = {
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
        p.penalty, _ignored_prompt(p.prompt_ignore_length)
    ),
    NoRepeatNGramLogitsProcessor: lambda p: NoRepeatNgram(p.ngram_size),
    TemperatureLogitsWarper: lambda p: Temperature(p.temperature),
    TopKLogitsWarper: lambda p: TopK(p.top_k, p.min_tokens_to_keep, p.filter_value),
    TopPLogitsWarper: lambda p: TopP(p.top_p, p.min_tokens_to_keep, p.filter_value),
}


def translate_processors(processors: Iterable[Any]) -> LogitsProcessors | Fallback:
    """The engine's counterparts of these processors, in their order.

    `WhisperNoSpeechDetection` changes no score and is left out; `detect_no_speech` runs it.
    """
    translated: list[LogitsProcessor] = []
    for processor in processors:
        kind = type(processor)
        if kind is WhisperNoSpeechDetection:
            continue
        if kind not in PROCESSOR_TRANSLATIONS:
            return Fallback(FallbackReason.PROCESSOR, kind.__name__)
        try:
            translated.append(PROCESSOR_TRANSLATIONS[kind](processor))
        except OptionError as error:
            return Fallback(FallbackReason.PROCESSOR, f"{kind.__name__}: {error}")
    return LogitsProcessors(tuple(translated))


def translate_limits(criteria: Iterable[Any]) -> tuple[int, tuple[int, ...]] | Fallback:
    """The largest length, prompt included, and the tokens that end a row, of stopping criteria."""
    lengths: list[int] = []
    ends: list[int] = []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends += criterion.eos_token_id.tolist()
        else:
            return Fallback(FallbackReason.CRITERION, type(criterion).__name__)
    if not lengths:
        return Fallback(FallbackReason.CRITERION, "no largest length")
    return min(lengths), tuple(ends)


def translate_beams(config: Any) -> Beams:
    """The parameters of the search that `_beam_search` runs with a `GenerationConfig`."""
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
) -> Request | Fallback:
    """The engine request that corresponds to a call of Transformers' `_sample` or `_beam_search`.

    Args:
        processors, criteria: the lists that Transformers passes to them.
        config: their `GenerationConfig`.
        by_beams: for `_beam_search`.
        **more: further fields of the request.
    """
    logits_processors = translate_processors(processors)
    if isinstance(logits_processors, Fallback):
        return logits_processors
    limits = translate_limits(criteria)
    if isinstance(limits, Fallback):
        return limits
    max_length, eos = limits
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    if by_beams and not pad and eos:
        # Transformers' beam search treats padding token 0 as not set.
        pad = eos[0]
    wants_dictionary = bool(config.return_dict_in_generate)
    return Request(
        processors=logits_processors,
        max_length=max_length,
        eos=eos,
        pad=pad,
        sample=bool(config.do_sample),
        beams=translate_beams(config) if by_beams else None,
        want_scores=wants_dictionary and bool(config.output_scores),
        want_logits=wants_dictionary and bool(config.output_logits),
        **more,
    )


def detect_no_speech(
    processors: list[Any],
    engine: Engine,
    states: torch.Tensor,
    prompt: torch.Tensor,
    request: Request,
) -> None:
    """Call every `WhisperNoSpeechDetection` among the processors, as stock's first step does.

    Args:
        states: the encoder's output `[clips, S, D]`.
        prompt: `[B, P]` int64.
        request: the decode that follows.
    """
    for index, processor in enumerate(processors):
        if type(processor) is not WhisperNoSpeechDetection:
            continue
        if processor.start_of_trans_offset > 1:
            _detect_at_prompt_token(processor, states, prompt)
        else:
            scores = _first_logits(engine, states, prompt, request)
            for earlier in processors[:index]:
                scores = earlier(prompt, scores)
            processor(prompt, scores)


def _detect_at_prompt_token(processor: Any, states: torch.Tensor, prompt: torch.Tensor) -> None:
    """Let the processor run the decoder on `states`, where stock runs the whole model.

    Its inputs are those of the first temperature. After temperature fallback of some rows they have
    more rows than `states`; then the encoder runs on all of them, as in stock.
    """
    inputs = processor.inputs
    if inputs is not None and inputs["input_features"].shape[0] == states.shape[0]:
        encoded = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        processor.inputs = {k: v for k, v in inputs.items() if k != "input_features"} | encoded
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
