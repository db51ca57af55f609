"""`model.plan`: the memory that a call of a model takes."""

from __future__ import annotations

import pytest
import torch

from tests.random_whisper import small_whisper_config
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.errors import OptionError


@pytest.fixture
def model() -> Ours:
    return Ours(small_whisper_config(vocab_size=300, pad_token_id=299)).eval()


def test_a_plan_is_for_the_model_where_it_is(model: Ours) -> None:
    plan = model.plan(batch_size=2, max_new_tokens=20)
    assert (plan.device, plan.dtype) == (torch.device("cpu"), torch.float32)
    assert plan.weights == sum(4 * parameter.numel() for parameter in model.parameters())
    assert model.half().plan(batch_size=2, max_new_tokens=20).weights == plan.weights // 2


def test_the_batch_that_fits_is_planned(model: Ours) -> None:
    total = model.plan(batch_size=37, max_new_tokens=20).total
    found = model.plan(memory_gb=(total + 1) / 1e9, max_new_tokens=20)
    assert found.total <= total + 1
    assert found.batch_size >= 37


def test_the_form_is_the_models(model: Ours) -> None:
    for form in ("projected", "absorbed"):
        model.cross_attention = form
        assert model.plan(batch_size=2).cross_attention == form
    model.cross_attention = "auto"
    assert model.plan(batch_size=100, device="cuda:99").cross_attention == "absorbed"
    assert model.plan(batch_size=100).cross_attention == "projected"


def test_a_model_without_weights_is_planned_like_one_with_them(model: Ours) -> None:
    with torch.device("meta"):
        empty = Ours(small_whisper_config(vocab_size=300, pad_token_id=299))
    for device in ("cuda:99", "cpu"):
        wanted = {"batch_size": 3, "device": device, "dtype": torch.float16, "num_beams": 2}
        assert empty.plan(**wanted) == model.plan(**wanted)
    with pytest.raises(OptionError, match=r"^the model is on the meta device: give the device"):
        empty.plan(batch_size=1)


def test_a_model_that_the_engine_cannot_run_is_not_planned(model: Ours) -> None:
    model.proj_out = torch.nn.Sequential(model.proj_out)
    with pytest.raises(OptionError, match=r"^the engine cannot run this model: proj_out is a Seq"):
        model.plan(batch_size=1)


def test_one_of_batch_and_budget_is_asked_for(model: Ours) -> None:
    for wanted in ({}, {"batch_size": 1, "memory_gb": 1}):
        with pytest.raises(OptionError, match=r"^give either batch_size, or memory_gb"):
            model.plan(**wanted)
