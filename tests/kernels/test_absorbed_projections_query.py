from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.absorbed_projections import (
    QueryConfig,
    absorb_query,
    choose_query_config,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SCALE = 0.3


def make(rows, d, dtype, device="cpu"):
    """x, norm weight and bias, W_q, b_q, W_k: none of them at a default, x with outliers."""
    torch.manual_seed(rows + d)
    x = torch.randn(rows, d, device=device) * 2 + 0.5
    x[:, 3] += 20
    vectors = [torch.randn(d, device=device) * 0.2 + shift for shift in (1.0, 0.1, 0.2)]
    weights = [torch.randn(d, d, device=device) * d**-0.5 for _ in range(2)]
    gain, shift, bias = vectors
    return [t.to(dtype) for t in (x, gain, shift, weights[0], bias, weights[1])]


def wanted(x, gain, shift, q_weight, q_bias, k_weight, eps=1e-5):
    """[R, H, D] in float64."""
    x, gain, shift, q_weight, k_weight = (t.double() for t in (x, gain, shift, q_weight, k_weight))
    bias = None if q_bias is None else q_bias.double()
    normed = functional.layer_norm(x, x.shape[-1:], gain, shift, eps)
    query = functional.linear(normed, q_weight, bias) * SCALE
    heads = x.shape[1] // 64
    return torch.einsum(
        "rhc,hcd->rhd", query.view(-1, heads, 64), k_weight.view(heads, 64, x.shape[1])
    )


def check(inputs, **options):
    x = inputs[0]
    rows, d = x.shape
    out = torch.full((rows, d // 64, d), float("nan"), dtype=x.dtype, device=x.device)
    absorb_query(*inputs, out, scale=SCALE, **options)
    expected = wanted(*inputs, eps=options.get("eps", 1e-5))
    assert out.isfinite().all()
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "d"), [(1, 128), (5, 192), (17, 128)])
def test_equals_layer_norm_and_two_projections(device, rows, d, dtype) -> None:
    check(make(rows, d, dtype, device))


def test_without_a_bias(device) -> None:
    inputs = make(3, 128, torch.float16, device)
    inputs[4] = None
    check(inputs)


def test_eps_is_used(device) -> None:
    inputs = make(3, 128, torch.float32, device)
    inputs[0] *= 1e-3
    check(inputs, eps=1e-2)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 20),
    d=st.sampled_from((64, 128, 192, 320)),
    tall=st.sampled_from((16, 32)),
)
def test_any_rows_and_widths(rows, d, tall) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(make(rows, d, torch.float16, device), config=QueryConfig(rows=tall, columns=64, chunk=64))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 64, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whisper_sizes(rows, d, dtype) -> None:
    check(make(rows, d, dtype, "cuda"))


def test_chosen_tiles_divide_the_width() -> None:
    for d in (64, 320, 384, 512, 768, 1024, 1280):
        for dtype in TOLERANCE:
            config = choose_query_config(16, d, dtype)
            assert d % config.columns == 0
            assert d % config.chunk == 0


def test_refuses_shapes_that_do_not_fit() -> None:
    inputs = make(2, 128, torch.float32)
    with pytest.raises(KernelShapeError, match=r"need out \(2, 2, 128\)"):
        absorb_query(*inputs, torch.zeros(2, 2, 64), scale=1.0)
    inputs[5] = inputs[5][:64]
    with pytest.raises(KernelShapeError, match="square"):
        absorb_query(*inputs, torch.zeros(2, 2, 128), scale=1.0)
