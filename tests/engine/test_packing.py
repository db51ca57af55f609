"""Weights laid out for a CPU: the same float32 results, and 8 bits close to them."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine import packing
from whisper_flash_attention.engine.alignment import AlignmentInput, align_batches
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import LogitsProcessors
from whisper_flash_attention.engine.packing import has_fbgemm, pack, quantised
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.engine.weights import (
    Linear,
    PackedLinear,
    Weights,
    collect_weights,
    linear,
)
from whisper_flash_attention.errors import OptionError

needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="PyTorch without FBGEMM")
FEATURES = torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(small_model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """A float32 model whose weights float16 holds exactly."""
    found = copy.deepcopy(small_model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(parameter.half().float())
    return found


@pytest.fixture(scope="module")
def plain(model: WhisperForConditionalGeneration) -> Weights:
    return collect_weights(model)


def decode(engine: Engine, cross_attention: str = "auto") -> DecodeOutput:
    request = Request(
        LogitsProcessors(),
        max_length=12,
        eos=(299,),
        pad=299,
        want_logits=True,
        cross_attention=cross_attention,
    )
    prompt = torch.tensor([[298, 5]] * 2)
    return engine.decode(engine.encode(FEATURES), prompt, request)


def last_logits(decoded: DecodeOutput) -> torch.Tensor:
    assert decoded.logits is not None
    return decoded.logits[-1]


@pytest.mark.parametrize("cross_attention", ["projected", "absorbed"])
def test_float32_gives_the_same_tokens_and_logits(plain, cross_attention) -> None:
    found = decode(Engine(pack(plain, "float32")), cross_attention)
    wanted = decode(Engine(plain), cross_attention)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(last_logits(found), last_logits(wanted), rtol=0, atol=1e-4)


def test_weights_that_are_stored_in_float16_compute_in_float32(model, plain) -> None:
    stored = collect_weights(copy.deepcopy(model).half())
    engine = Engine(pack(stored, "float32"))
    assert engine.weights.dtype is torch.float32
    found = decode(engine)
    torch.testing.assert_close(
        last_logits(found), last_logits(decode(Engine(plain))), rtol=0, atol=1e-4
    )


@needs_fbgemm
def test_weights_that_float16_would_round_stay_in_float32(plain) -> None:
    packed = pack(plain, "float32").decoder
    assert isinstance(packed.projection, PackedLinear)
    assert packed.projection.nbytes == 2 * plain.decoder.embedding.numel()
    rounded = Linear(torch.full((8, 4), 1 + 2**-20), None)
    large = Linear(torch.full((8, 4), 1e6), None)
    for layer in (rounded, large):
        found = packing.exact(layer)
        assert not isinstance(found, PackedLinear)
        assert torch.equal(found.weight, layer.weight)


@needs_fbgemm
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_large_projection_is_laid_out_in_parts(plain, precision, monkeypatch) -> None:
    whole = pack(plain, precision)
    # 300 rows in parts of 130.
    monkeypatch.setattr(packing, "PART_VALUES", 130 * plain.decoder.width)
    parts = pack(plain, precision)
    wanted, found = whole.decoder.projection, parts.decoder.projection
    assert isinstance(wanted, PackedLinear) and isinstance(found, PackedLinear)
    assert (found.weight.shape, found.nbytes) == (wanted.weight.shape, wanted.nbytes)
    torch.testing.assert_close(
        last_logits(decode(Engine(parts))), last_logits(decode(Engine(whole))), rtol=0, atol=1e-4
    )


@needs_fbgemm
def test_a_projection_of_which_a_part_is_not_exact_stays_in_float32(plain, monkeypatch) -> None:
    monkeypatch.setattr(packing, "PART_VALUES", 130 * plain.decoder.width)
    weight = plain.decoder.projection.weight.clone()
    weight[299, 0] = 1 + 2**-20
    decoder = replace(plain.decoder, projection=Linear(weight, None))
    packed = pack(replace(plain, decoder=decoder), "float32").decoder.projection
    assert not isinstance(packed, PackedLinear)
    assert torch.equal(packed.weight, weight)


def test_without_fbgemm_weights_stay_as_they_are(plain, monkeypatch) -> None:
    monkeypatch.setattr(packing, "has_fbgemm", lambda: False)
    packed = pack(plain, "float32")
    assert not isinstance(packed.decoder.projection, PackedLinear)
    found = decode(Engine(packed))
    assert torch.equal(found.sequences, decode(Engine(plain)).sequences)


@needs_fbgemm
def test_8_bits_are_close(plain) -> None:
    # After the prompt, where both have seen the same tokens.
    found, wanted = (decode(Engine(weights)).logits[0] for weights in (pack(plain, "int8"), plain))
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.99


@needs_fbgemm
def test_a_row_is_quantised_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(torch.randn(40, 64, generator=generator), torch.randn(40, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = quantised(layer)
        rows = torch.randn(3, 64, generator=generator)
        alone = linear(rows[:1], packed)
        loud = linear(torch.cat([rows[:1], 1000 * rows[1:]]), packed)
        silent = linear(torch.zeros(2, 64), packed)
    assert (loud[:1] - alone).norm() < 0.03 * alone.norm()
    torch.testing.assert_close(silent, layer.bias.expand(2, -1))
    exact = linear(rows, layer)
    assert (linear(rows, packed) - exact).norm() < 0.03 * exact.norm()


@needs_fbgemm
def test_weights_of_8_bits_keep_their_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-127, 128, (30, 50), generator=generator, dtype=torch.int8)
    stored[:, 7] = 127
    scales = torch.rand(30, 1, generator=generator) * 100 + 1
    layer = Linear(stored.float() / scales, None)
    numbers, found = packing.integers(layer.weight)
    assert torch.equal(numbers, stored)
    torch.testing.assert_close(found, 1 / scales[:, 0])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_alignment_runs_on_packed_weights(plain, precision) -> None:
    if precision == "int8" and not has_fbgemm():
        pytest.skip("PyTorch without FBGEMM")
    states = torch.randn(100, 128, generator=torch.Generator().manual_seed(2))
    rows = [AlignmentInput(states, (298, 5, 6, 7, 299), 150)]
    heads = [(0, 1), (1, 0)]

    def aligned(weights: Weights) -> Iterator[torch.Tensor]:
        [batch] = align_batches(weights.decoder, rows, heads, text_tokens=290)
        [found] = batch.alignments()
        return iter((found.attention, found.probabilities))

    tolerance = 1e-5 if precision == "float32" else 0.05
    for found, wanted in zip(aligned(pack(plain, precision)), aligned(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_int8_without_a_routine_is_refused(plain, monkeypatch) -> None:
    monkeypatch.setattr(packing, "has_int8", lambda: False)
    with pytest.raises(OptionError, match="give float32"):
        pack(plain, "int8")
    assert packing.describe_layouts().endswith("int8 cannot run here")


def test_engines_on_a_cpu_take_turns(plain) -> None:
    engines = [Engine(pack(plain, "float32")), Engine(plain)]
    inside, most = 0, 0

    def enter(tokens: torch.Tensor) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1

    request = Request(LogitsProcessors(), max_length=8, eos=(), pad=299, on_token=enter)
    prompt = torch.tensor([[298, 5]] * 2)

    def decode_once(engine: Engine) -> torch.Tensor:
        return engine.decode(engine.encode(FEATURES), prompt, request).sequences

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(decode_once, engines)
    assert most == 1
    assert torch.equal(one, other)
