"""The engine's encoder against Transformers' own, with the same weights."""

from __future__ import annotations

import copy
import wave

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention.engine import encoder
from whisper_flash_attention.engine import weights as engine_weights
from whisper_flash_attention.engine.encoder import encode, temporary_bytes
from whisper_flash_attention.engine.weights import EncoderWeights, collect_weights

POSITIONS = 100

NEEDS_ONEDNN = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN"
)


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    config = small_whisper_config(vocab_size=64, pad_token_id=0, max_source_positions=POSITIONS)
    config._attn_implementation = "eager"
    return perturbed(WhisperForConditionalGeneration(config))


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(5, 80, 2 * POSITIONS, generator=torch.Generator().manual_seed(1))


def stock(model: WhisperForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model.encoder(features).last_hidden_state


def weights_of(model: WhisperForConditionalGeneration) -> EncoderWeights:
    return collect_weights(model).encoder


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.dtype.is_floating_point and found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.double().norm())


def test_the_formula_is_that_of_stock(model, features) -> None:
    double = copy.deepcopy(model).double()
    found = encode(weights_of(double), features.double())
    assert error(found, stock(double, features.double())) < 1e-13


@pytest.mark.parametrize("has_onednn", [pytest.param(True, marks=NEEDS_ONEDNN), False])
def test_float32(model, features, monkeypatch, has_onednn) -> None:
    monkeypatch.setattr(engine_weights, "_by_onednn", lambda x: has_onednn)
    found = encode(weights_of(model), features)
    assert found.dtype is torch.float32 and not found.requires_grad
    assert error(found, stock(model, features)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_exact_as_stock(model, features, dtype) -> None:
    half = copy.deepcopy(model).to(dtype)
    rounded = features.to(dtype)
    exact = stock(copy.deepcopy(half).double(), rounded.double())
    found = encode(weights_of(half), rounded)
    assert found.dtype is dtype
    assert error(found, exact) < 1.2 * error(stock(half, rounded), exact)


def test_float16_is_clamped_where_it_overflows(model, features) -> None:
    half = copy.deepcopy(model).half()
    half.model.encoder.layers[0].fc2.bias.data[3] = 65000.0
    half.model.encoder.layers[1].fc2.bias.data[3] = 65000.0
    found, wanted = encode(weights_of(half), features.half()), stock(half, features.half())
    assert torch.isfinite(wanted).all()
    assert error(found, wanted) < 1e-3


def test_parts_are_the_same_as_single_clips(model, features, monkeypatch) -> None:
    weights = weights_of(model)
    sizes = []
    part = encoder._encode_part
    monkeypatch.setattr(
        encoder, "_encode_part", lambda w, x, out: (sizes.append(len(x)), part(w, x, out))
    )
    found = encode(weights, features, budget_bytes=2 * temporary_bytes(weights) + 1)
    assert sizes == [2, 2, 1]
    assert error(found, stock(model, features)) < 3e-6
    sizes.clear()
    found = encode(weights, features, budget_bytes=0)
    assert sizes == [1] * 5
    assert torch.equal(found[3:4], encode(weights, features[3:4]))


def test_out_may_be_slots_of_a_larger_buffer(model, features) -> None:
    weights = weights_of(model)
    buffer = torch.full((4, POSITIONS + 7, 128), 5.0)
    slots = buffer[1:3, :POSITIONS]
    assert encode(weights, features[:2], slots) is slots
    assert torch.equal(slots, encode(weights, features[:2]))
    rest = buffer.clone()
    rest[1:3, :POSITIONS] = 5.0
    assert (rest == 5.0).all()


def test_neither_features_nor_weights_change(model, features) -> None:
    before, state = features.clone(), copy.deepcopy(model.state_dict())
    encode(weights_of(model), features)
    assert torch.equal(features, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_real_weights_on_real_speech(tiny_en, bundled_recordings) -> None:
    from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
    from whisper_flash_attention.weights import load_processor

    model = Ours.from_pretrained(tiny_en, attn_implementation="eager").eval()
    with wave.open(str(bundled_recordings[0].path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
    inputs = load_processor(tiny_en)(samples, sampling_rate=16000, return_tensors="pt")
    found = encode(weights_of(model), inputs.input_features)
    assert found.shape == (1, 1500, 384)
    assert error(found, stock(model, inputs.input_features)) < 1e-5


@NEEDS_ONEDNN
def test_pytorch_keeps_the_operator_that_linear_calls() -> None:
    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    assert schema == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
        "str? algorithm) -> Tensor Y"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(model, features, dtype) -> None:
    moved = copy.deepcopy(model).to("cuda", dtype)
    inputs = features.to("cuda", dtype)
    exact = stock(copy.deepcopy(moved).double(), inputs.double())
    bound = 1.3 * error(stock(moved, inputs), exact)
    assert error(encode(weights_of(moved), inputs), exact) < max(bound, 2e-6)


@pytest.mark.gpu
def test_a_graph_replays_on_new_features(model, features) -> None:
    moved = copy.deepcopy(model).to("cuda", torch.float16)
    weights = weights_of(moved)
    inputs, out = features[:2].to("cuda", torch.float16), torch.empty(2, POSITIONS, 128).cuda()
    out = out.half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        encode(weights, inputs, out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode(weights, inputs, out)
    inputs.copy_(features[2:4])
    wanted = encode(weights, inputs)
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.gpu
def test_temporaries_stay_within_the_budget() -> None:
    config = small_whisper_config(
        vocab_size=64,
        pad_token_id=0,
        max_source_positions=1500,
        d_model=512,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
    )
    moved = WhisperForConditionalGeneration(config).to("cuda", torch.float16)
    weights = weights_of(moved)
    inputs = torch.randn(8, 80, 3000, device="cuda").half()
    out = torch.empty(8, 1500, 512, device="cuda", dtype=torch.float16)
    encode(weights, inputs[:1], out[:1])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = 3 * temporary_bytes(weights)
    encode(weights, inputs, out, budget_bytes=budget)
    # The weight of a convolution, reordered, and what attention kernels keep aside.
    aside = 8 * 2**20
    assert torch.cuda.max_memory_allocated() - before < budget + aside
