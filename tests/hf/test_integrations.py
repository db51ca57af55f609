"""Models that other packages modified: PEFT, torchao, and Transformers' trainer around ours.

They run where the packages are installed: `pip install peft torchao accelerate`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.conftest import END, START, Counts, Twins, make_twins
from whisper_flash_attention.hf.fallback import FallbackReason

OPTIONS: dict[str, Any] = {"language": "en", "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    """Other packages' warnings, of which each release has its own, are not this test's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def twins() -> Twins:
    return make_twins()


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")


def same_ids(twins: Twins, features: torch.Tensor, counts: Counts, logged: list[str]) -> None:
    """Both give the same ids on Transformers' own loop, which is logged once."""
    expected = twins.stock.generate(features, **OPTIONS)
    for _ in range(2):
        assert torch.equal(twins.ours.generate(features, **OPTIONS), expected)
    assert len(logged) == 1
    assert logged[0].startswith(FallbackReason.MODULES.value)


@pytest.mark.parametrize("kind", ["LoraConfig", "LNTuningConfig", "IA3Config"])
@pytest.mark.parametrize("seen_before", [True, False])
def test_adapters_of_peft(twins: Twins, features, counts, logged, kind: str, seen_before) -> None:
    needs("peft")
    import peft

    before = twins.stock.generate(features, **OPTIONS)
    if seen_before:
        for _ in range(2):
            assert torch.equal(twins.ours.generate(features, **OPTIONS), before)
    modules = {
        "LoraConfig": {"target_modules": ["q_proj", "v_proj"]},
        "LNTuningConfig": {"target_modules": ["final_layer_norm", "self_attn_layer_norm"]},
        "IA3Config": {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]},
    }[kind]
    wrapped = []
    for model in (twins.stock, twins.ours):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, getattr(peft, kind)(**modules))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)
        wrapped.append(adapted.eval())
    expected = wrapped[0].generate(input_features=features, **OPTIONS)
    assert not torch.equal(expected, before)
    assert torch.equal(wrapped[1].generate(input_features=features, **OPTIONS), expected)
    same_ids(twins, features, counts, logged)
    if kind == "LoraConfig":
        merged = [each.merge_and_unload() for each in wrapped]
        decodes = counts.decodes
        assert torch.equal(merged[1].generate(features, **OPTIONS), expected)
        assert counts.decodes == decodes + 1


def weight_only() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


@pytest.mark.parametrize("config", [weight_only, dynamic])
def test_weights_of_torchao(
    twins: Twins, features, counts: Counts, logged, config: Callable[[], Any]
) -> None:
    needs("torchao")
    from torchao.quantization import quantize_

    for _ in range(2):
        twins.ours.generate(features, **OPTIONS)
    for model in (twins.stock, twins.ours):
        quantize_(model, config())
    decodes = counts.decodes
    same_ids(twins, features, counts, logged)
    assert counts.decodes == decodes


def test_loading_with_a_torchao_config(
    twins: Twins, features, counts, logged, tmp_path: Path
) -> None:
    needs("torchao", "accelerate")
    from transformers import TorchAoConfig

    twins.ours.save_pretrained(tmp_path)
    loaded = [
        type(model).from_pretrained(tmp_path, quantization_config=TorchAoConfig(weight_only()))
        for model in (twins.stock, twins.ours)
    ]
    quantised = Twins(*loaded)
    quantised.configure()
    quantised.stock.set_attn_implementation("eager")
    same_ids(quantised, features, counts, logged)
    assert counts.decodes == 0


def test_a_trainer_that_predicts_with_generate(
    twins: Twins, features, counts: Counts, logged: list[str], tmp_path: Path
) -> None:
    needs("accelerate")
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    labels = torch.tensor([[START, 5, 6, END], [START, 7, 8, END], [START, 9, END, -100]])
    rows = [
        {"input_features": clip, "labels": row} for clip, row in zip(features, labels, strict=True)
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=12,
        per_device_eval_batch_size=3,
        report_to=[],
        use_cpu=True,
    )
    predicted = []
    for model in (twins.stock, twins.ours):
        trainer = Seq2SeqTrainer(model=copy.deepcopy(model), args=arguments, eval_dataset=rows)
        predicted.append(trainer.predict(rows).predictions.tolist())
    assert predicted[0] == predicted[1]
    assert counts.decodes == 1
    assert not logged
