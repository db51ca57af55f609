"""Products of many rows against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.launch import interpreted
from whisper_flash_attention.kernels.matmul import Config, choose, matmul

TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 3e-6}
HALF_DTYPES = [torch.float16, torch.bfloat16]
SMALL = Config(16, 16, 32, warps=1, stages=1)


def random(*shape, dtype, device, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def wanted(x, weights, biases, gelu=False, residual=None):
    parts = [
        F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for weight, bias in zip(weights, biases, strict=True)
    ]
    result = torch.cat(parts, -1)
    result = F.gelu(result) if gelu else result
    return result if residual is None else result + residual.double()


def assert_close(found, expected):
    assert torch.isfinite(found).all()
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[found.dtype]


def operands(rows, n, k, parts, dtype, device, clips=1):
    if interpreted() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    x = random(clips, rows, k, dtype=dtype, device=device)
    weights = [random(n, k, dtype=dtype, device=device, scale=k**-0.5) for _ in range(parts)]
    biases = [random(n, dtype=dtype, device=device) for _ in range(parts)]
    biases[1:2] = [None] * len(biases[1:2])
    return x, weights, biases


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("gelu", [False, True])
def test_equals_linear_layers(device, dtype, parts, gelu) -> None:
    x, weights, biases = operands(37, 48, 72, parts, dtype, device)
    out = torch.full((1, 37, 48 * parts), float("nan"), dtype=dtype, device=device)
    matmul(x, weights, biases, out, gelu=gelu, config=SMALL)
    assert_close(out, wanted(x, weights, biases, gelu))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_the_residual_may_be_the_result(device, dtype) -> None:
    x, weights, biases = operands(33, 32, 64, 1, dtype, device)
    out = random(1, 33, 32, dtype=dtype, device=device)
    expected = wanted(x, weights, biases, residual=out)
    matmul(x, weights, biases, out, residual=out, config=SMALL)
    assert_close(out, expected)


@pytest.mark.parametrize("clips", [1, 2])
def test_columns_apart_by_heads(device, clips) -> None:
    x, weights, biases = operands(37, 48, 72, 1, torch.float16, device, clips=clips)
    room = torch.full((clips, 3, 40, 16), 7.0, dtype=torch.float16, device=device)
    matmul(x, weights, biases, room[:, :, :37], config=SMALL)
    assert_close(room[:, :, :37].transpose(1, 2).flatten(2), wanted(x, weights, biases))
    assert (room[:, :, 37:] == 7.0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_a_product_of_overlapping_rows(device, stride) -> None:
    channels, times, dtype = 24, 41, torch.float16
    sound = random(3, times, channels, dtype=dtype, device=device)
    weight = random(40, channels, 3, dtype=dtype, device=device, scale=0.2)
    bias = random(40, dtype=dtype, device=device)
    rows = (times - 3) // stride + 1
    seen = sound.as_strided((3, rows, 3 * channels), (sound.stride(0), stride * channels, 1))
    places = random(rows, 40, dtype=dtype, device=device)
    room = torch.full((3, rows + 1, 40), 7.0, dtype=dtype, device=device)
    matmul(
        seen,
        [weight.transpose(1, 2).reshape(40, -1)],
        [bias],
        room[:, 1:],
        gelu=True,
        residual=places.expand(3, -1, -1),
        config=SMALL,
    )
    expected = F.conv1d(sound.double().mT, weight.double(), bias.double(), stride=stride).mT
    assert_close(room[:, 1:], F.gelu(expected) + places.double())
    assert (room[:, 0] == 7.0).all()


@settings(max_examples=15, deadline=None)
@given(
    clips=st.integers(1, 3),
    rows=st.integers(1, 40),
    n=st.integers(1, 5).map(lambda each: 8 * each),
    k=st.integers(1, 9).map(lambda each: 8 * each),
    parts=st.integers(1, 3),
    programs=st.sampled_from([0, 1, 3]),
    residual=st.booleans(),
)
def test_any_shape(clips, rows, n, k, parts, programs, residual) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weights, biases = operands(rows, n, k, parts, torch.float16, device, clips)
    out = torch.full((clips, rows, n * parts), float("nan"), device=device).half()
    added = random(clips, rows, n * parts, dtype=x.dtype, device=device) if residual else None
    config = Config(16, 16, 32, warps=1, stages=1, programs=programs)
    matmul(x, weights, biases, out, residual=added, config=config)
    assert_close(out, wanted(x, weights, biases, residual=added))


def test_gelu_is_exact_where_it_is_small_too(device) -> None:
    x = torch.linspace(-6, 6, 1024, device=device).view(1, 64, 16)
    weight, out = torch.eye(16, device=device), torch.empty(1, 64, 16, device=device)
    matmul(x, [weight], [None], out, gelu=True, config=SMALL)
    expected = F.gelu(x.double())
    assert (out - expected).abs().max() < 5e-7
    tail = (x < -1) & (x > -4)
    assert ((out - expected) / expected)[tail].abs().max() < 1e-3


def test_nothing_is_hidden(device) -> None:
    x, weights, biases = operands(20, 16, 32, 1, torch.float16, device)
    x[0, 3, 5], out = float("nan"), torch.zeros(1, 20, 16, device=device).half()
    matmul(x, weights, biases, out, config=SMALL)
    assert out[0, 3].isnan().all() and torch.isfinite(out[0, 4:]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("rows", [1, 100, 1500, 6001])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_whisper_sizes(width, rows, dtype) -> None:
    x, weights, biases = operands(rows, width, width, 3, dtype, "cuda")
    out = torch.full((1, rows, 3 * width), float("nan"), dtype=dtype, device="cuda")
    matmul(x, weights, biases, out)
    assert_close(out, wanted(x, weights, biases))
    x, weights, biases = operands(rows, 4 * width, width, 1, dtype, "cuda")
    out = torch.full((1, rows, 4 * width), float("nan"), dtype=dtype, device="cuda")
    matmul(x, weights, biases, out, gelu=True)
    assert_close(out, wanted(x, weights, biases, gelu=True))


def test_tiles_are_smaller_where_there_are_few() -> None:
    few, many = choose(1500, 384), choose(48000, 384)
    assert few.block_m * few.block_n < many.block_m * many.block_n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "0 weights"),
        ({"biases": [None, None]}, "2 biases"),
        ({"out": torch.zeros(1, 8, 24).half()}, "out must be"),
        ({"x": torch.zeros(1, 8, 16)}, "float32"),
        ({"x": torch.zeros(1, 16, 8).half().mT}, "dense last axis"),
        ({"x": torch.zeros(1, 8, 20).half()[:, :, :16]}, "16 bytes"),
        ({"residual": torch.zeros(1, 8, 8).half()}, "residual"),
    ],
)
def test_refuses_with_reasons(change, message) -> None:
    arguments = {
        "x": torch.zeros(1, 8, 16).half(),
        "weights": [torch.zeros(16, 16).half()],
        "biases": [None],
        "out": torch.zeros(1, 8, 16).half(),
    } | change
    with pytest.raises(KernelShapeError, match=message):
        matmul(**arguments)
