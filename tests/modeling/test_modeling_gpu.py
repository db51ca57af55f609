"""The model on a CUDA GPU: every back-end against stock Whisper with eager attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import WhisperForConditionalGeneration as Stock

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.settings import MODEL_SIZES
from whisper_flash_attention.errors import UnsupportedAttention
from whisper_flash_attention.flash_attention import backend_names

pytestmark = pytest.mark.gpu
LAYERS = 4


def model_of(kind: type, dtype: torch.dtype, attention: str) -> Stock:
    model = build_model(kind, MODEL_SIZES["base"], LAYERS, device="cuda", dtype=dtype)
    model.set_attn_implementation(attention)
    return model


def features_of(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(3, 80, 3000, generator=generator, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", backend_names())
def test_float32_ids_are_those_of_stock(backend: str) -> None:
    options = {"max_new_tokens": 40, "min_new_tokens": 40}
    features = features_of(torch.float32)
    expected = model_of(Stock, torch.float32, "eager").generate(features, **options)
    model = model_of(Ours, torch.float32, backend)
    try:
        found = model.generate(features, **options)
    except UnsupportedAttention as refusal:
        assert backend not in ("auto", "reference", "sdpa_efficient")
        pytest.skip(str(refusal))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backend_names())
def test_half_precision_logits_are_as_near_to_float32_as_stock_s(
    backend: str, dtype: torch.dtype
) -> None:
    ids = torch.randint(100, 50000, (3, 9), device="cuda")
    features = features_of(torch.float32)

    def logits(kind: type, dtype: torch.dtype, attention: str) -> torch.Tensor:
        model = model_of(kind, dtype, attention)
        with torch.no_grad():
            return model(features.to(dtype), decoder_input_ids=ids).logits.double()

    exact = logits(Stock, torch.float32, "eager")
    stock_error = (logits(Stock, dtype, "eager") - exact).norm() / exact.norm()
    try:
        found = logits(Ours, dtype, backend)
    except UnsupportedAttention as refusal:
        assert backend in ("xformers", "flash_attn")
        pytest.skip(str(refusal))
    assert (found - exact).norm() / exact.norm() <= 1.5 * stock_error
