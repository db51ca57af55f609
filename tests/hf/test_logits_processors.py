"""Translation of processors and criteria, by exact type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from whisper_flash_attention.engine import logits_processors
from whisper_flash_attention.hf import compat
from whisper_flash_attention.hf.fallback import Fallback, FallbackReason
from whisper_flash_attention.hf.logits_processors import (
    translate,
    translate_limits,
    translate_processors,
)

ENDS = torch.tensor([40, 41])
WHISPER = SimpleNamespace(
    no_timestamps_token_id=60, eos_token_id=40, bos_token_id=40, max_initial_timestamp_index=5
)
PROCESSORS = {
    compat.SuppressTokensLogitsProcessor([3, 4]): logits_processors.Suppress((3, 4)),
    compat.SuppressTokensAtBeginLogitsProcessor([5], 2): logits_processors.SuppressAtBegin((5,), 2),
    compat.WhisperTimeStampLogitsProcessor(WHISPER, begin_index=3): logits_processors.Timestamps(
        timestamp_begin=61, begin_index=3, eos=40, no_timestamps=60, max_initial=5
    ),
    compat.MinLengthLogitsProcessor(7, ENDS): logits_processors.MinLength(7, (40, 41)),
    compat.MinNewTokensLengthLogitsProcessor(4, 5, ENDS): logits_processors.MinLength(9, (40, 41)),
    compat.RepetitionPenaltyLogitsProcessor(1.5): logits_processors.RepetitionPenalty(1.5),
    compat.RepetitionPenaltyLogitsProcessor(
        1.5, prompt_ignore_length=2
    ): logits_processors.RepetitionPenalty(1.5, 2),
    compat.NoRepeatNGramLogitsProcessor(3): logits_processors.NoRepeatNgram(3),
    compat.TemperatureLogitsWarper(0.5): logits_processors.Temperature(0.5),
    compat.TopKLogitsWarper(2, min_tokens_to_keep=3): logits_processors.TopK(3, 3),
    compat.TopPLogitsWarper(0.8, filter_value=-5.0): logits_processors.TopP(0.8, 1, -5.0),
}


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda each: type(each).__name__)
def test_each_processor_has_its_rule(processor) -> None:
    assert translate_processors([processor]) == logits_processors.LogitsProcessors(
        (PROCESSORS[processor],)
    )


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda each: type(each).__name__)
def test_a_rule_does_what_its_processor_does(processor) -> None:
    generator = torch.Generator().manual_seed(1)
    translated = translate_processors([processor])
    assert isinstance(translated, logits_processors.LogitsProcessors)
    for length in range(2, 12):
        tokens = torch.randint(0, 80, (2, length), generator=generator)
        scores = torch.randn(2, 80, generator=generator)
        expected = processor(tokens, scores.clone())
        assert torch.equal(
            translated.apply(scores, logits_processors.History(tokens, length)), expected
        )


def test_order_is_kept_and_silence_left_out() -> None:
    listed = [
        compat.TopKLogitsWarper(4),
        compat.WhisperNoSpeechDetection(59, begin_index=1),
        compat.TemperatureLogitsWarper(2.0),
    ]
    assert translate_processors(listed) == logits_processors.LogitsProcessors(
        (logits_processors.TopK(4), logits_processors.Temperature(2.0))
    )


def test_a_subclass_is_not_its_parent() -> None:
    class Hotter(compat.TemperatureLogitsWarper):
        pass

    assert translate_processors([Hotter(2.0)]) == Fallback(FallbackReason.PROCESSOR, "Hotter")


def test_a_grammar_that_makes_no_sense_falls_back() -> None:
    strange = SimpleNamespace(
        no_timestamps_token_id=20, eos_token_id=40, bos_token_id=40, max_initial_timestamp_index=5
    )
    found = translate_processors([compat.WhisperTimeStampLogitsProcessor(strange, begin_index=3)])
    assert isinstance(found, Fallback)
    assert "WhisperTimeStampLogitsProcessor" in found.detail


def test_criteria_become_limits() -> None:
    lengths = [compat.MaxLengthCriteria(9), compat.MaxLengthCriteria(7)]
    assert translate_limits([*lengths, compat.EosTokenCriteria([5, 6])]) == (7, (5, 6))
    assert translate_limits(lengths) == (7, ())
    assert translate_limits([]) == Fallback(FallbackReason.CRITERION, "no largest length")

    class Longer(compat.MaxLengthCriteria):
        pass

    assert translate_limits([Longer(9)]) == Fallback(FallbackReason.CRITERION, "Longer")


@pytest.mark.parametrize("dictionary", [True, False])
def test_scores_are_wanted_in_a_dictionary_only(dictionary: bool) -> None:
    config = SimpleNamespace(
        return_dict_in_generate=dictionary,
        output_scores=True,
        output_logits=None,
        do_sample=True,
        _pad_token_tensor=torch.tensor(3),
    )
    request = translate([], [compat.MaxLengthCriteria(9)], config, cross_attention="absorbed")
    assert not isinstance(request, Fallback)
    assert (request.want_scores, request.want_logits, request.sample) == (dictionary, False, True)
    assert (request.pad, request.max_length, request.cross_attention) == (3, 9, "absorbed")
