"""The encoder on kernels against Transformers' own, with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention.engine import layout, triton_encoder
from whisper_flash_attention.engine.cuda_graphs import GraphRecorder
from whisper_flash_attention.engine.encoder import Encoder, TorchEncoder
from whisper_flash_attention.engine.engine import encoder_for
from whisper_flash_attention.engine.layout import Arena, SharedArena
from whisper_flash_attention.engine.triton_encoder import (
    MOST_PARTS,
    EncoderPass,
    TritonEncoder,
    clips_per_part,
    space_bytes,
)
from whisper_flash_attention.engine.weights import EncoderWeights, collect_weights
from whisper_flash_attention.kernels.launch import interpreted

POSITIONS = 40
HALF_DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, where kernels are interpreted, or the GPU."""
    if (request.param == "cpu") != interpreted():
        pytest.skip("kernels are either interpreted or compiled, not both in one process")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    config = small_whisper_config(vocab_size=64, pad_token_id=0, max_source_positions=POSITIONS)
    config._attn_implementation = "eager"
    return perturbed(WhisperForConditionalGeneration(config))


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(3, 80, 2 * POSITIONS, generator=torch.Generator().manual_seed(1))


def stock(model: WhisperForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model.encoder(features).last_hidden_state


def weights_of(model: WhisperForConditionalGeneration) -> EncoderWeights:
    return collect_weights(model).encoder


def runner_of(model: WhisperForConditionalGeneration) -> Encoder:
    weights = weights_of(model)
    return encoder_for(weights, GraphRecorder(), SharedArena(weights.positions.device))


def encode(weights: EncoderWeights, features: torch.Tensor) -> torch.Tensor:
    """One pass over all clips, into poisoned states and out of a poisoned space."""
    clips = len(features)
    space = Arena(features.device, space_bytes(weights, clips))
    space.take((space.capacity // 2,), torch.float16).fill_(float("nan"))
    space.restart()
    states = features.new_full((clips, *weights.positions.shape), float("nan"))
    part = EncoderPass(weights, clips, space)
    with torch.no_grad():
        part.load(features)
        part.layers()
        part.store(states)
        part.load(features)
        part.run()
    assert torch.equal(part.states.nan_to_num(7), states.nan_to_num(7))
    return states


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.dtype.is_floating_point and found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("few", [True, False], ids=["few clips", "many clips"])
def test_it_is_more_exact_than_stock(model, features, device, monkeypatch, dtype, few) -> None:
    if interpreted() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    if few:
        monkeypatch.setattr(torch.Tensor, "addmm_", None)  # cuBLAS
    else:
        monkeypatch.setattr(layout, "OWN_PRODUCT_CLIPS", 0)
        monkeypatch.setattr(layout, "OWN_PRODUCT_WIDTH", 0)
        monkeypatch.setattr(triton_encoder, "ONE_PRODUCT_WIDTH", 0)
        monkeypatch.setattr(triton_encoder, "ONE_PRODUCT_ROWS", 0)
    half = copy.deepcopy(model).to(device, dtype)
    rounded = features[: 1 if interpreted() else None].to(device, dtype)
    exact = stock(copy.deepcopy(half).double(), rounded.double())
    assert error(encode(weights_of(half), rounded), exact) < error(stock(half, rounded), exact)


def test_float16_is_clamped_where_it_overflows(model, features, device) -> None:
    half = copy.deepcopy(model).half().to(device)
    half.model.encoder.layers[0].fc2.bias.data[3] = 65000.0
    half.model.encoder.layers[1].fc2.bias.data[3] = 65000.0
    rounded = features[:1].half().to(device)
    found, wanted = encode(weights_of(half), rounded), stock(half, rounded)
    assert torch.isfinite(wanted).all()
    assert error(found, wanted) < 1e-3


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
def test_nan_is_not_hidden(model, features, device) -> None:
    half = copy.deepcopy(model).half().to(device)
    rounded = features[:2].half().to(device)
    rounded[0, 7, 9] = float("nan")
    found = encode(weights_of(half), rounded)
    assert found[0].isnan().any() and torch.isfinite(found[1]).all()


def test_linear_layers_may_lack_biases(model, features, device) -> None:
    bare = copy.deepcopy(model).half().to(device)
    for layer in bare.model.encoder.layers:
        layer.fc2.bias = None
        layer.self_attn.out_proj.bias = None
    rounded = features[:1].half().to(device)
    assert error(encode(weights_of(bare), rounded), stock(bare, rounded)) < 3e-3


@pytest.mark.parametrize("budget", [0, 2.5, 4, 100])
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_parts_are_equal_and_within_the_budget(model, budget, batch) -> None:
    weights = weights_of(model)
    one, two = space_bytes(weights, 1), space_bytes(weights, 2)
    limit = int(one + (budget - 1) * (two - one)) if budget else 0
    clips = clips_per_part(weights, batch, limit)
    parts = -(-batch // clips)
    assert clips == 1 or space_bytes(weights, clips) <= limit
    # One part less would need larger ones than the budget allows.
    assert parts == 1 or space_bytes(weights, -(-batch // (parts - 1))) > limit
    assert clips == -(-batch // parts)


def test_plain_operations_run_where_the_kernels_do_not(model) -> None:
    assert isinstance(runner_of(model), TorchEncoder)


@pytest.mark.gpu
def test_many_sizes_share_one_space(model, features) -> None:
    half = copy.deepcopy(model).half().to("cuda")
    runner = runner_of(half)
    assert isinstance(runner, TritonEncoder)
    for batch in (2, 1, 3, 1, 2, *range(1, MOST_PARTS + 4), 2, 1):
        clips = torch.randn(batch, *features.shape[1:], device="cuda").half()
        wanted = stock(half, clips)
        assert error(runner.run(clips), wanted) < 2e-3, batch
        assert error(runner.run(clips), wanted) < 2e-3, batch
    assert len(runner._parts) <= MOST_PARTS


@pytest.mark.gpu
def test_large_batches_go_in_parts(model, features, monkeypatch) -> None:
    monkeypatch.setattr(triton_encoder, "clips_per_part", lambda weights, batch: min(batch, 2))
    half = copy.deepcopy(model).half().to("cuda")
    runner = runner_of(half)
    clips = torch.randn(5, *features.shape[1:], device="cuda").half()
    whole = runner.run(clips)
    assert error(whole, stock(half, clips)) < 2e-3
    assert torch.equal(whole[4:], runner.run(clips[4:]))


@pytest.mark.gpu
def test_a_first_part_of_another_size_leaves_those_before_it_alone(monkeypatch) -> None:
    """Preparing a size must not touch the space while parts of another are computed in it."""
    monkeypatch.setattr(triton_encoder, "clips_per_part", lambda weights, batch: min(batch, 16))
    config = small_whisper_config(max_source_positions=1500, encoder_layers=12)
    half = perturbed(WhisperForConditionalGeneration(config)).half().to("cuda")
    clips = torch.randn(90, config.num_mel_bins, 3000, device="cuda").half()
    for _ in range(4):
        runner = runner_of(half)
        assert torch.equal(runner.run(clips), runner.run(clips))


@pytest.mark.gpu
def test_new_weights_in_place_are_seen(model, features) -> None:
    half = copy.deepcopy(model).half().to("cuda")
    runner = runner_of(half)
    clips = features.half().cuda()
    runner.run(clips)
    with torch.no_grad():
        for parameter in half.model.encoder.parameters():
            parameter.mul_(0.9).add_(0.003)
    assert error(runner.run(clips), stock(half, clips)) < 2e-3
