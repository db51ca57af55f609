"""The engine stands in for plain Whisper only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.hf.conftest import Twins, make_twins
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.hf.eligibility import engine_for
from whisper_flash_attention.hf.fallback import Fallback, FallbackReason


@pytest.fixture
def twins() -> Twins:
    return make_twins(dropout=0.1)


def reason_of(model: Any) -> FallbackReason | None:
    found = engine_for(model)
    return found.reason if isinstance(found, Fallback) else None


def test_a_plain_model_has_one_engine(twins: Twins) -> None:
    engine = engine_for(twins.ours)
    assert isinstance(engine, Engine)
    assert engine_for(twins.ours) is engine


class Adapter(nn.Module):
    """As adapters do it: the layer inside, something added outside."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1.5


def adapt(model: Any) -> None:
    attention = model.model.decoder.layers[1].encoder_attn
    attention.q_proj = Adapter(attention.q_proj)


def hook(model: Any) -> None:
    model.model.encoder.layers[0].register_forward_hook(lambda *_: None)


def replace_forward(model: Any) -> None:
    layer = model.model.decoder.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def hide_weight(model: Any) -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model.model.decoder.layers[0].fc1 = Bare()


@pytest.mark.parametrize("change", [adapt, hook, replace_forward, hide_weight])
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_changed_model_is_noticed(twins: Twins, change, seen_before: bool) -> None:
    if seen_before:
        assert reason_of(twins.ours) is None
    change(twins.ours)
    assert reason_of(twins.ours) is FallbackReason.MODULES
    assert reason_of(twins.ours) is FallbackReason.MODULES


def test_an_adapter_is_not_skipped(twins: Twins) -> None:
    features = torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(8))
    for _ in range(2):
        twins.ours.generate(features, language="en")
    for model in (twins.ours, twins.stock):
        adapt(model)
    expected = twins.stock.generate(features, language="en")
    assert torch.equal(twins.ours.generate(features, language="en"), expected)


def test_a_hook_that_is_gone_lets_the_engine_back(twins: Twins) -> None:
    handle = twins.ours.model.decoder.register_forward_hook(lambda *_: None)
    assert reason_of(twins.ours) is FallbackReason.MODULES
    handle.remove()
    assert reason_of(twins.ours) is None


def test_dropout_counts_in_training_only(twins: Twins) -> None:
    twins.ours.train()
    assert reason_of(twins.ours) is FallbackReason.TRAINING
    twins.ours.eval()
    assert reason_of(twins.ours) is None
    twins.ours.model.decoder.layers[1].train()
    assert reason_of(twins.ours) is FallbackReason.TRAINING
    for module in twins.ours.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    assert reason_of(twins.ours) is None


def test_autocast_and_named_attention(twins: Twins) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reason_of(twins.ours) is FallbackReason.AUTOCAST
    for name in ("eager", "sdpa", "reference"):
        twins.ours.set_attn_implementation(name)
        assert reason_of(twins.ours) is FallbackReason.ATTENTION
    twins.ours.set_attn_implementation("auto")
    assert reason_of(twins.ours) is None


def test_a_forward_of_a_subclass_is_not_skipped(twins: Twins) -> None:
    class Louder(type(twins.ours)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    twins.ours.__class__ = Louder
    assert reason_of(twins.ours) is FallbackReason.MODULES
