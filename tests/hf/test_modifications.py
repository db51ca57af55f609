"""The engine runs only what it knows: whatever was done to a model, the ids are stock's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.conftest import Counts, Twins, make_twins
from tests.hf.modifications import FALLS_BACK, MODES, RUN, Modification
from whisper_flash_attention.hf.eligibility import engine_for
from whisper_flash_attention.hf.fallback import Fallback, FallbackReason

OPTIONS: dict[str, Any] = {"language": "en", "max_new_tokens": 8}
# These have stock compute the same ids: what they stand for need not.
SAME_IDS = {
    "activation_of_the_configuration_changed",
    "attention_with_a_configuration_of_its_own",
    "buffer_in_a_layer",
    "compiled_layer",
    "heads_of_the_configuration_changed",
    "layer_compiled_in_place",
    "module_as_dropout",
    "positions_of_another_dtype",
    "positions_of_the_configuration_changed",
    "an_attribute_that_nobody_reads",
    "backward_hook",
    "frozen_parameters",
    "resized_vocabulary",
    "weight_norm",
    "weight_norm_by_a_hook",
}


@pytest.fixture(scope="module")
def _unmodified() -> Twins:
    return make_twins()


@pytest.fixture
def twins(_unmodified: Twins) -> Twins:
    return copy.deepcopy(_unmodified)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(2, 80, 80, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def before(_unmodified: Twins, features: torch.Tensor) -> list[list[int]]:
    """What stock gives without a modification."""
    return generated(_unmodified.stock, features)


@pytest.fixture(autouse=True)
def not_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is compiled runs as it was, which takes seconds less."""
    stance = torch.compiler.set_stance if "compiled" in request.node.name else nullcontext
    with stance("force_eager"):
        yield


def generated(model: Any, features: torch.Tensor, **options: Any) -> list[list[int]]:
    return model.generate(features, **OPTIONS, **options).tolist()


@pytest.fixture
def changes(twins: Twins, features, before, monkeypatch) -> Callable[[Modification], bool]:
    """Modify both, compare their ids before and after, and return whether stock's changed.

    Ours runs twice before, so that the engine has run the model and the call is prepared.
    """

    def check(modification: Modification) -> bool:
        for _ in range(2):
            assert generated(twins.ours, features) == before
        for model in (twins.stock, twins.ours):
            modification(model, monkeypatch)
        for _ in range(2):
            after = generated(twins.stock, features)
            assert generated(twins.ours, features) == after
        return after != before

    return check


@pytest.mark.parametrize("name", FALLS_BACK)
def test_what_the_engine_does_not_know_falls_back(
    changes, counts: Counts, logged: list[str], name: str
) -> None:
    changed = changes(FALLS_BACK[name])
    assert counts.decodes == 2
    assert len(logged) == 1
    assert logged[0].startswith(FallbackReason.MODULES.value)
    assert changed or name in SAME_IDS


@pytest.mark.parametrize("name", RUN)
def test_what_the_engine_knows_it_runs(
    changes, counts: Counts, logged: list[str], name: str
) -> None:
    changed = changes(RUN[name])
    assert counts.decodes == 4
    assert not logged
    assert changed or name in SAME_IDS


@pytest.mark.parametrize("name", FALLS_BACK | RUN)
def test_modified_before_the_first_call(twins: Twins, monkeypatch, name: str) -> None:
    (FALLS_BACK | RUN)[name](twins.ours, monkeypatch)
    found = engine_for(twins.ours)
    assert isinstance(found, Fallback) == (name in FALLS_BACK)


@pytest.mark.parametrize("name", MODES)
def test_modes_see_every_operation(
    twins: Twins, features, counts: Counts, logged: list[str], name: str
) -> None:
    before = generated(twins.ours, features)
    with MODES[name]():
        expected = generated(twins.stock, features)
        for _ in range(2):
            assert generated(twins.ours, features) == expected
    assert counts.decodes == 1
    assert len(logged) == 1
    assert generated(twins.ours, features) == before


def test_a_default_device_is_no_reason(twins: Twins, features, counts: Counts) -> None:
    with torch.device("cpu"):
        generated(twins.ours, features)
    assert counts.decodes == 1


def test_it_is_undone(twins: Twins, features, counts: Counts) -> None:
    """The engine runs again as soon as a modification is gone."""
    attention = twins.ours.model.decoder.layers[0].self_attn
    expected = generated(twins.ours, features)
    attention.scaling = 1.0
    assert generated(twins.ours, features) != expected
    attention.scaling = 64**-0.5
    assert generated(twins.ours, features) == expected
    assert counts.decodes == 2


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def drop_values(model: Any) -> None:
    model.model.decoder.layers[0].fc1.to("meta")


def empty_parameters(model: Any) -> None:
    for parameter in model.model.decoder.layers[0].fc1.parameters():
        parameter.data = torch.empty(0)


def mix_dtypes(model: Any) -> None:
    model.model.decoder.layers[0].fc1.double()


def remove_a_norm(model: Any) -> None:
    del model.model.encoder.layers[0].final_layer_norm


def cut_positions(model: Any) -> None:
    positions = model.model.decoder.embed_positions
    positions.weight.data = positions.weight.data[:3]


@pytest.mark.parametrize(
    "modification", [drop_values, empty_parameters, mix_dtypes, remove_a_norm, cut_positions]
)
@pytest.mark.parametrize("seen_before", [True, False])
def test_what_cannot_run_fails_as_in_stock(
    twins: Twins, features, modification, seen_before
) -> None:
    if seen_before:
        generated(twins.ours, features)
    for model in (twins.stock, twins.ours):
        modification(model)
    expected = outcome(lambda: generated(twins.stock, features))
    assert isinstance(expected, tuple)
    assert outcome(lambda: generated(twins.ours, features)) == expected


@pytest.mark.parametrize("rate", ["dropout", "activation_dropout"])
def test_dropout_that_the_configuration_does_not_have(
    twins: Twins, features, logged: list[str], rate: str
) -> None:
    outcomes = []
    for model in (twins.stock, twins.ours):
        model.train()
        setattr(model.model.decoder.layers[0], rate, 0.5)
        torch.manual_seed(2)
        outcomes.append(generated(model, features))
    assert outcomes[0] == outcomes[1]
    assert logged == [f"{FallbackReason.TRAINING.value} ({rate})"]


def test_gradient_checkpointing_in_training(twins: Twins, features, counts, logged) -> None:
    """Layers run without their caches then, of which stock warns."""
    for model in (twins.stock, twins.ours):
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    assert generated(twins.ours, features) == generated(twins.stock, features)
    assert counts.decodes == 1
    for model in (twins.stock, twins.ours):
        model.train()
    for _ in range(2):
        assert generated(twins.ours, features) == generated(twins.stock, features)
    assert counts.decodes == 1
    assert logged == [f"{FallbackReason.TRAINING.value} (gradient checkpointing)"]


def test_a_patched_method_ends_the_short_way(twins: Twins, features, counts, monkeypatch) -> None:
    """A prepared call runs none of the methods that prepared it; it is discarded and dropped."""
    for _ in range(2):
        generated(twins.ours, features)
    assert counts.short == 1
    kind = type(twins.stock)
    original = kind._retrieve_init_tokens

    def german(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = original(self, *args, **kwargs).clone()
        tokens[:, 1] += 1
        return tokens

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_retrieve_init_tokens", german)
        expected = generated(twins.stock, features)
        for _ in range(3):
            assert generated(twins.ours, features) == expected
    assert counts.short == 2
    original_ids = generated(twins.stock, features)
    for _ in range(2):
        assert generated(twins.ours, features) == original_ids
    assert counts.short == 3
    twins.ours._retrieve_init_tokens = german.__get__(twins.ours)
    for _ in range(3):
        assert generated(twins.ours, features) == expected
    assert counts.short == 4
    del twins.ours._retrieve_init_tokens
    for _ in range(2):
        assert generated(twins.ours, features) == original_ids
    assert counts.short == 5


def test_labels_of_a_trainer_are_taken(twins: Twins, features, counts, logged) -> None:
    """`Seq2SeqTrainer` with `predict_with_generate` passes its whole batch to `generate`."""
    inputs = {
        "input_features": features,
        "labels": torch.tensor([[404, 5, 6, 400], [404, 7, 400, -100]]),
    }
    for more in ({}, {"num_beams": 2}, {"synced_gpus": False, "max_length": 12}):
        expected = twins.stock.generate(**inputs, language="en", **more)
        for _ in range(2):
            assert torch.equal(twins.ours.generate(**inputs, language="en", **more), expected)
    assert (counts.decodes, counts.short) == (6, 3)
    assert not logged


def test_a_method_patched_before_the_import(tmp_path: Path) -> None:
    """Whose code lies in another package, even one whose name begins as PyTorch's."""
    folder = tmp_path / "torchother"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from torch import nn\n"
        "forward = nn.Linear.forward\n"
        "nn.Linear.forward = lambda self, x: forward(self, x) * 2\n"
    )
    program = (
        "import torchother\n"
        "from whisper_flash_attention.hf.stock_modules import patched_function\n"
        "print(patched_function())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "Linear.forward"
