"""Calls that leave the engine although nothing asks for it: a warning, once, with the reason."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, LogitsProcessor

from tests.hf.conftest import Twins
from whisper_flash_attention.errors import EngineBypassed
from whisper_flash_attention.hf import compat, eligibility
from whisper_flash_attention.hf.fallback import Fallback, FallbackReason


class Unknown(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "_warned", set())


def assert_warned(twins: Twins, features: torch.Tensor, reason: str, **options: Any) -> None:
    """Two calls warn once with this reason, and give stock's ids."""
    options = {"language": "en", "max_new_tokens": 4, **options}
    with pytest.warns(EngineBypassed) as caught:
        found = twins.ours.generate(features, **options)
        twins.ours.generate(features, **options)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert f"supported: {compat.SUPPORTED}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, twins.stock.generate(features, **options))


def test_a_decode_loop_of_another_name(
    twins: Twins, features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a release does that renames `_sample`."""
    from transformers.generation import utils

    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return GenerationMixin._sample(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_renamed", renamed, raising=False)
    mapping = dict.fromkeys(utils.GENERATION_MODES_MAPPING, "_renamed")
    monkeypatch.setattr(utils, "GENERATION_MODES_MAPPING", mapping)
    assert_warned(twins, features, "none of _sample, _beam_search")


def test_a_cache_of_another_kind(twins: Twins, features, monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect of 5.24: our cache is passed under another name than the one that is checked."""
    monkeypatch.setattr("whisper_flash_attention.hf.eligibility.CACHE", "of_another_name")
    assert_warned(twins, features, FallbackReason.CACHE.value)


def test_an_input_that_nobody_gave(twins: Twins, features, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = type(twins.ours)._sample, GenerationMixin._sample

    def with_another(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs, added=0)

    def without(self: Any, *args: Any, added: int | None = None, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(twins.ours), "_sample", with_another)
    monkeypatch.setattr(GenerationMixin, "_sample", without)
    assert_warned(twins, features, f"{FallbackReason.INPUT.value} (added)")


def test_a_processor_that_no_option_made(
    twins: Twins, features, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GenerationMixin._get_logits_processor

    def with_another(self: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(self, *args, **kwargs)
        processors.append(Unknown())
        return processors

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", with_another)
    assert_warned(twins, features, f"{FallbackReason.PROCESSOR.value} (Unknown)")


def test_an_encoder_step_of_another_name(
    twins: Twins, features, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in compat.ENCODER_STEPS:
        if hasattr(GenerationMixin, name):
            monkeypatch.setattr(type(twins.ours), name, getattr(GenerationMixin, name))
    assert_warned(twins, features, "the encoder ran outside the engine")


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [Unknown()]},
        {"bad_words_ids": [[3, 4]]},
        {"max_time": 60.0},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"typical_p": 0.9, "do_sample": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_need_transformers_loop_warn_of_nothing(
    twins: Twins, features, options
) -> None:
    twins.ours.generate(features, language="en", max_new_tokens=3, **options)  # warnings are errors


def test_an_assistant_is_named(twins: Twins, features, logged) -> None:
    twins.ours.generate(features[:1], language="en", max_new_tokens=3, assistant_model=twins.ours)
    assert str(Fallback(FallbackReason.LOOP, "assistant_model")) in logged


def test_processors_that_transformers_makes_of_options_are_known() -> None:
    """A processor that a release adds has to be looked at, and put into one of the two lists."""
    from transformers.generation import logits_process
    from transformers.generation.utils import GenerationMixin as Mixin

    from whisper_flash_attention.hf.logits_processors import PROCESSOR_TRANSLATIONS

    names = Mixin._get_logits_processor.__code__.co_names
    made = {name for name in names if isinstance(getattr(logits_process, name, None), type)}
    made = {n for n in made if issubclass(getattr(logits_process, n), LogitsProcessor)}
    translated = {kind.__name__ for kind in PROCESSOR_TRANSLATIONS}
    assert made - translated <= eligibility.PROCESSORS_OF_OPTIONS
