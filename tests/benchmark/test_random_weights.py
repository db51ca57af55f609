"""Random weights that are the same for every system and on which every part of Whisper matters."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.benchmark.random_weights import (
    build_model,
    keep_to_text_,
    perturb_,
)
from whisper_flash_attention.benchmark.settings import ModelSize
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)

SIZE = ModelSize(d_model=128, heads=2, encoder_layers=2, decoder_layers=2, ffn=256)
TOKENS = 8


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return build_model(WhisperForConditionalGeneration, SIZE, 2)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(1))


def ids(model: WhisperForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        features, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )
    return out


def test_stock_and_flash_get_the_same_weights_state_by_state(
    model: WhisperForConditionalGeneration,
) -> None:
    flash = build_model(WhisperFlashAttentionForConditionalGeneration, SIZE, 2).state_dict()
    stock = model.state_dict()
    assert flash.keys() == stock.keys()
    for name, weight in stock.items():
        assert torch.equal(weight, flash[name]), name


def test_another_seed_gives_other_weights(model: WhisperForConditionalGeneration) -> None:
    other = build_model(WhisperForConditionalGeneration, SIZE, 2, seed=1)
    for name, weight in other.named_parameters():
        if "encoder.embed_positions" not in name:
            assert not torch.equal(weight, model.get_parameter(name)), name


def test_half_precision_weights_are_the_float32_ones_rounded(
    model: WhisperForConditionalGeneration,
) -> None:
    half = build_model(WhisperForConditionalGeneration, SIZE, 2, dtype=torch.float16)
    for name, weight in half.named_parameters():
        assert torch.equal(weight, model.get_parameter(name).half()), name


def test_no_bias_is_zero_and_no_norm_is_one(model: WhisperForConditionalGeneration) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert weight.abs().mean() > 0.05, name
        elif "layer_norm" in name:
            assert 0.1 < weight.std() < 0.4, name
            assert abs(weight.mean() - 1) < 0.1, name


def test_attention_picks_few_keys(
    model: WhisperForConditionalGeneration, features: torch.Tensor
) -> None:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(
            input_features=features,
            decoder_input_ids=torch.tensor([[50258, 50259, 50359, 50363]] * 2),
            output_attentions=True,
        )
    for weights in (*out.encoder_attentions, *out.cross_attentions):
        # The inverse of the sum of squares is the number of keys that share the weight.
        shared_by = 1 / weights.square().sum(-1)
        assert shared_by.median() < 1500 / 10


def test_generation_gives_exactly_the_requested_tokens_and_no_special_ones(
    model: WhisperForConditionalGeneration, features: torch.Tensor
) -> None:
    out = ids(model, features)
    assert out.shape == (2, TOKENS)
    assert out.max() < 50257


def test_tokens_vary_and_depend_on_the_audio(
    model: WhisperForConditionalGeneration, features: torch.Tensor
) -> None:
    out = ids(model, features)
    assert all(len(set(row.tolist())) > 2 for row in out)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out, ids(model, torch.zeros_like(features)))


@pytest.mark.parametrize(
    "part",
    [
        "model.decoder.layers.0.self_attn.v_proj.weight",
        "model.decoder.layers.1.encoder_attn.q_proj.weight",
        "model.encoder.layers.1.self_attn.k_proj.weight",
        "model.decoder.layers.1.fc1.bias",
        "model.decoder.embed_positions.weight",
    ],
)
def test_tokens_depend_on_every_part(
    part: str, model: WhisperForConditionalGeneration, features: torch.Tensor
) -> None:
    before = ids(model, features)
    weight = model.get_parameter(part)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        after = ids(model, features)
        weight.copy_(kept)
    assert not torch.equal(before, after)


def test_perturbing_keeps_the_sinusoids_of_the_encoder() -> None:
    model = build_model(WhisperForConditionalGeneration, SIZE, 2)
    positions = model.model.encoder.embed_positions.weight.clone()
    perturb_(model, seed=5)
    assert torch.equal(positions, model.model.encoder.embed_positions.weight)


def test_a_model_that_keeps_to_text_needs_nothing_suppressed(features: torch.Tensor) -> None:
    model = build_model(WhisperForConditionalGeneration, SIZE, 2)
    keep_to_text_(model)
    prompt = torch.tensor([[50258, 50259, 50359, 50363]] * 2)
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=prompt).logits
    text, beyond = logits[..., :50257], logits[..., 50257:]
    assert (beyond.amax(-1) < text.amin(-1)).all()
    assert text.std() > 0.3
    # Where timestamps are asked for, the only one is the first: <|0.00|>.
    assert (logits[..., 50364:].argmax(-1) == 0).all()
    model.generation_config.suppress_tokens = None
    assert ids(model, features).max() < 50257
