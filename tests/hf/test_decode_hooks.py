"""Calls that go through Transformers' `generate`: the engine decodes, or a reason is given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import EncoderDecoderCache, LogitsProcessor, StoppingCriteria
from transformers import WhisperForConditionalGeneration as Stock
from transformers.modeling_outputs import BaseModelOutput

from tests.hf.conftest import (
    FIRST_TIMESTAMP,
    NO_SPEECH,
    SPECIAL,
    VOCABULARY,
    Agree,
    Counts,
    Twins,
    assert_same,
    make_twins,
)
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.hf.compat import CACHE
from whisper_flash_attention.hf.fallback import FallbackReason
from whisper_flash_attention.hf.kv_cache import RecomputedCache

STAMPED = {"return_timestamps": True, "suppress_tokens": [*SPECIAL, FIRST_TIMESTAMP]}


@pytest.fixture
def long_features() -> torch.Tensor:
    """Two clips of two and a half windows."""
    return torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(4))


def both(twins: Twins, *args: Any, **options: Any) -> tuple[Any, Any]:
    results = []
    for model in (twins.ours, twins.stock):
        torch.manual_seed(5)
        results.append(model.generate(*args, language="en", **options))
    return results[0], results[1]


def test_long_form_with_segments(agree: Agree, long_features, counts: Counts, logged) -> None:
    agree(
        long_features,
        language="en",
        attention_mask=torch.ones(2, 200, dtype=torch.int64),
        return_segments=True,
        max_new_tokens=6,
        **STAMPED,
    )
    assert counts.decodes >= 6
    assert not logged


@pytest.mark.parametrize(
    ("features_of", "stamps"), [("short", False), ("short", True), ("long", True)]
)
@pytest.mark.parametrize("language", ["en", None])
@pytest.mark.parametrize("silent", [True, False])
def test_temperature_fallback_with_silence(
    twins: Twins, features, long_features, counts, logged, features_of, language, stamps, silent
) -> None:
    """English-only models listen in the first scores, others inside the prompt."""
    if language is None:
        twins.configure(is_multilingual=False, lang_to_id=None, task_to_id=None)
        for model in (twins.stock, twins.ours):
            del model.generation_config.lang_to_id, model.generation_config.task_to_id
    options: dict[str, Any] = dict(STAMPED) if stamps else {}
    inputs = features[:1] if features_of == "short" else long_features[:1]
    results = []
    for model in (twins.ours, twins.stock):
        torch.manual_seed(5)
        results.append(
            model.generate(
                inputs,
                language=language,
                temperature=(0.0, 0.3, 0.9),
                logprob_threshold=0.0,
                compression_ratio_threshold=0.9,
                no_speech_threshold=0.0 if silent else 1.0,
                max_new_tokens=6,
                **options,
            )
        )
    assert_same(*results)
    assert counts.decodes >= (1 if silent else 3)
    assert not logged


def test_equal_features_are_encoded_once_per_call(twins: Twins, features, counts: Counts) -> None:
    """Language detection, and every temperature of the fallback."""
    twins.ours.generate(
        features[:1],
        temperature=(0.0, 0.4, 0.8),
        logprob_threshold=0.0,
        compression_ratio_threshold=0.1,
    )
    assert counts.decodes == 3
    assert counts.encodes == 1


def test_silence_is_what_stock_hears(twins: Twins, features, monkeypatch) -> None:
    from whisper_flash_attention.hf import compat

    captured: list[torch.Tensor] = []
    call = compat.WhisperNoSpeechDetection.__call__

    def note(self, input_ids, scores):
        answer = call(self, input_ids, scores)
        if input_ids.shape[1] == self.begin_index:
            captured.append(self.no_speech_prob)
        return answer

    monkeypatch.setattr(compat.WhisperNoSpeechDetection, "__call__", note)
    options = {"temperature": 0.0, "logprob_threshold": -9.0, "no_speech_threshold": 0.5}
    for more in ({}, {"language": "de"}, {"prompt_ids": torch.tensor([9, 10, 11])}):
        captured.clear()
        for model in (twins.ours, twins.stock):
            model.generate(features, max_new_tokens=3, **options, **more)
        torch.testing.assert_close(captured[0], captured[1], atol=1e-5, rtol=1e-4)
    assert NO_SPEECH < VOCABULARY


class Listener:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        assert tokens.device.type == "cpu"
        self.captured.append(tokens.tolist())

    def end(self) -> None:
        self.captured.append("end")


def test_streamers_hear_every_token(twins: Twins, features, counts: Counts) -> None:
    captured = []
    for model in (twins.ours, twins.stock):
        listener = Listener()
        model.generate(features, language="en", streamer=listener, max_new_tokens=5)
        captured.append(listener.captured)
    assert captured[0] == captured[1]
    assert captured[0][-1] == "end"
    assert counts.decodes == 1


def test_given_encoder_outputs(twins: Twins, features, counts: Counts) -> None:
    with torch.no_grad():
        states = twins.stock.model.encoder(features).last_hidden_state
    given = [
        {"encoder_outputs": BaseModelOutput(last_hidden_state=states.clone())} for _ in range(2)
    ]
    results = [
        model.generate(language="en", **options)
        for model, options in zip((twins.ours, twins.stock), given, strict=True)
    ]
    assert torch.equal(*results)
    assert (counts.decodes, counts.encodes) == (1, 0)


def test_the_inner_generate_takes_its_own_options(twins: Twins, features, counts) -> None:
    """`custom_generate` and rows per clip reach the seam without Whisper's own `generate`."""
    from transformers import GenerationMixin

    results = []
    for model in (twins.ours, twins.stock):
        torch.manual_seed(3)
        results.append(
            GenerationMixin.generate(
                model,
                features,
                decoder_input_ids=torch.tensor([[401, 402, 406, 409]] * 3),
                do_sample=True,
                num_return_sequences=2,
                max_new_tokens=5,
                return_dict_in_generate=True,
                output_scores=True,
            )
        )
    assert_same(*results)
    assert counts.decodes == 1


def test_dictionaries_of_segments_hold_stock_s_caches(twins: Twins, features, counts) -> None:
    found, expected = both(
        twins,
        features,
        return_dict_in_generate=True,
        output_scores=True,
        return_segments=True,
        max_new_tokens=4,
        **STAMPED,
    )
    cache = found["segments"][0][0]["result"][CACHE]
    assert isinstance(cache, RecomputedCache)
    assert "self_attention_cache" not in vars(cache)
    assert_same(found, expected)


def test_the_cache_in_a_dictionary_goes_on(twins: Twins, features) -> None:
    """A returned cache continues a decode in the model's own forward pass."""
    outputs = twins.ours.generate(
        features, language="en", return_dict_in_generate=True, max_new_tokens=4
    )
    with torch.no_grad():
        states = twins.stock.model.encoder(features)
        whole = twins.stock(encoder_outputs=states, decoder_input_ids=outputs.sequences).logits
        step = twins.ours(
            encoder_outputs=states,
            decoder_input_ids=outputs.sequences[:, -1:],
            **{CACHE: outputs[CACHE]},
        ).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], atol=1e-3, rtol=1e-3)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_attentions": True, "return_dict_in_generate": True}, FallbackReason.INTERNALS),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, FallbackReason.INTERNALS),
        ({"use_cache": False}, FallbackReason.NO_CACHE),
        ({"cache_implementation": "static"}, FallbackReason.CACHE),
        ({"logits_processor": [Nothing()]}, FallbackReason.PROCESSOR),
        ({"bad_words_ids": [[3, 4]]}, FallbackReason.PROCESSOR),
        ({"stopping_criteria": [Never()]}, FallbackReason.CRITERION),
        ({"max_time": 60.0}, FallbackReason.CRITERION),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value.name.lower(),
)
def test_what_the_engine_cannot_do_falls_back(features, logged, counts, options, reason) -> None:
    twins = make_twins()
    found, expected = both(twins, features, max_new_tokens=4, **copy.copy(options))
    ids = [
        each if isinstance(each, torch.Tensor) else each["sequences"] for each in (found, expected)
    ]
    assert torch.equal(*ids)
    assert type(found) is type(expected)
    if not isinstance(found, torch.Tensor):
        assert found.keys() == expected.keys()
    assert counts.decodes == 0
    assert len(logged) == 1
    assert logged[0].startswith(reason.value)


def test_attentions_once_do_not_switch_the_engine_off(features, counts) -> None:
    """Transformers leaves the hooks behind with which it records attentions, idle."""
    twins = make_twins()
    for options in ({"output_attentions": True, "return_dict_in_generate": True}, {}):
        twins.ours.generate(features, language="en", max_new_tokens=3, **options)
    assert counts.decodes == 1


@pytest.mark.parametrize("padded", [True, False])
def test_padded_prompts_fall_back(twins: Twins, features, logged, counts, padded) -> None:
    from transformers import GenerationMixin

    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, :2] = 0 if padded else 1
    results = [
        GenerationMixin.generate(
            model,
            features,
            decoder_input_ids=torch.tensor([[400, 12, 401, 402, 409]] * 3),
            decoder_attention_mask=mask.clone(),
            max_new_tokens=5,
        )
        for model in (twins.ours, twins.stock)
    ]
    assert torch.equal(*results)
    assert logged == ([FallbackReason.MASK.value] if padded else [])
    assert counts.decodes == (0 if padded else 1)


def test_a_mask_that_is_no_tensor_falls_back(twins: Twins, features, logged) -> None:
    """Whisper's `generate` compares prompts with None where there is no padding token: True."""
    from transformers import GenerationMixin

    options = {"decoder_input_ids": torch.tensor([[400, 12]] * 3), "decoder_attention_mask": True}
    with pytest.raises(AttributeError, match="'bool' object has no attribute"):
        GenerationMixin.generate(twins.stock, features, **options, max_new_tokens=2)
    with pytest.raises(AttributeError, match="'bool' object has no attribute"):
        GenerationMixin.generate(twins.ours, features, **options, max_new_tokens=2)
    assert logged == [FallbackReason.MASK.value]


def test_conditioning_on_earlier_windows(agree: Agree, long_features) -> None:
    agree(
        long_features,
        language="en",
        attention_mask=torch.tensor([[1] * 200, [1] * 120 + [0] * 80]),
        condition_on_prev_tokens=True,
        temperature=0.0,
        max_new_tokens=6,
        **STAMPED,
    )


def test_a_passed_cache_falls_back(twins: Twins, features, logged) -> None:
    from transformers import DynamicCache

    found, expected = (
        model.generate(
            features,
            language="en",
            max_new_tokens=4,
            **{CACHE: EncoderDecoderCache(DynamicCache(), DynamicCache())},
        )
        for model in (twins.ours, twins.stock)
    )
    assert torch.equal(found, expected)
    assert logged == [FallbackReason.CACHE.value]


def test_output_longer_than_the_positions_falls_back(twins: Twins, features, logged) -> None:
    from transformers import GenerationMixin

    with pytest.raises(Exception):  # noqa: B017
        GenerationMixin.generate(twins.stock, features, max_new_tokens=100)
    with pytest.raises(Exception):  # noqa: B017
        GenerationMixin.generate(twins.ours, features, max_new_tokens=100)
    assert logged == [FallbackReason.LENGTH.value]


def test_word_timestamps_are_stock_s(features, logged) -> None:
    twins = make_twins()
    for model in (twins.ours, twins.stock):
        model.generation_config.alignment_heads = [[0, 0], [1, 1]]
        model.generation_config.median_filter_width = 3
    twins.ours.config.median_filter_width = twins.stock.config.median_filter_width = 3
    found, expected = both(
        twins, features, return_token_timestamps=True, max_new_tokens=4, **STAMPED
    )
    assert_same(found, expected)
    assert twins.ours.attention_backend == "auto"
    assert logged == [FallbackReason.INTERNALS.value]


def test_a_decode_outside_generate_is_stock_s(twins: Twins, features) -> None:
    """`detect_language` alone, and with states that are there."""
    assert torch.equal(twins.ours.detect_language(features), twins.stock.detect_language(features))
    states = BaseModelOutput(last_hidden_state=torch.randn(3, 40, 128))
    assert torch.equal(
        twins.ours.detect_language(encoder_outputs=states),
        twins.stock.detect_language(encoder_outputs=states),
    )
    with pytest.raises(ValueError, match="You have to specify either"):
        twins.ours.detect_language()
    assert isinstance(twins.ours, Stock)


@pytest.mark.parametrize("choice", ["projected", "absorbed"])
def test_both_kinds_of_cross_attention(twins: Twins, agree, features, counts, choice) -> None:
    twins.ours.cross_attention = choice
    assert twins.ours.cross_attention == choice
    agree(features, language="en")
    assert counts.decodes == 2
    with pytest.raises(OptionError, match="give auto, projected or absorbed"):
        twins.ours.cross_attention = "sideways"
    assert twins.ours.cross_attention == choice
