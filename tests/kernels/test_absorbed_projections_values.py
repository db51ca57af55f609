from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.absorbed_attention import absorbed_attention, workspace_shapes
from whisper_flash_attention.kernels.absorbed_projections import (
    absorb_query,
    choose_values_config,
    project_values,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make(splits, rows, d, dtype, device="cpu"):
    """Parts, statistics (very different maxima), W_v, b_v."""
    torch.manual_seed(splits * 100 + rows + d)
    parts = torch.randn(splits, rows, d // 64, d, device=device) + 0.2
    stats = torch.rand(splits, rows, d // 64, 2, device=device) * 4 + 0.5
    stats[..., 0] -= 40
    weight = torch.randn(d, d, device=device) * d**-0.5
    bias = torch.randn(d, device=device)
    return [parts.to(dtype), stats, weight.to(dtype), bias.to(dtype)]


def wanted(parts, stats, weight, bias):
    highest, total = stats.double().unbind(-1)
    shares = torch.where(total > 0, total * torch.exp2(highest - highest.amax(0)), 0.0)
    shares = shares / shares.sum(0)
    mean = (shares[..., None] * parts.double()).sum(0)
    rows, heads, d = mean.shape
    value = torch.einsum("rhd,hcd->rhc", mean, weight.double().view(heads, 64, d)).reshape(rows, d)
    return value if bias is None else value + bias.double()


def run(inputs, **options):
    _, rows, _, d = inputs[0].shape
    out = torch.full((rows, d), float("nan"), dtype=inputs[0].dtype, device=inputs[0].device)
    project_values(*inputs, out, **options)
    return out


def assert_close(out, expected):
    assert out.isfinite().all()
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("splits", "rows", "d"), [(1, 1, 128), (3, 5, 192), (8, 17, 64)])
def test_combines_parts_and_projects(device, splits, rows, d, dtype) -> None:
    inputs = make(splits, rows, d, dtype, device)
    assert_close(run(inputs), wanted(*inputs))


def test_without_a_bias(device) -> None:
    inputs = make(2, 3, 128, torch.float16, device)
    inputs[3] = None
    assert_close(run(inputs), wanted(*inputs))


def test_parts_without_keys_do_not_count(device) -> None:
    inputs = make(3, 2, 128, torch.float16, device)
    inputs[1][1, ..., 0] = -torch.inf
    inputs[1][1, ..., 1] = 0
    inputs[0][1] = 0
    assert_close(run(inputs), wanted(*inputs))


def test_finished_slots_give_zeros_and_are_not_read(device) -> None:
    inputs = make(2, 6, 128, torch.float16, device)
    inputs[0][:, 2:4] = float("nan")
    inputs[1][:, 2:4] = float("nan")
    finished = torch.tensor([False, True, False], device=device)
    out = run(inputs, finished=finished, tokens_per_slot=2)
    assert (out[2:4] == 0).all()
    keep = torch.tensor([0, 1, 4, 5], device=device)
    assert_close(out[keep], wanted(*inputs)[keep])


@settings(max_examples=4, deadline=None)
@given(splits=st.integers(1, 8), rows=st.integers(1, 35), d=st.sampled_from((64, 128)))
def test_any_rows_and_splits(splits, rows, d) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make(splits, rows, d, torch.float16, device)
    assert_close(run(inputs), wanted(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 64, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whisper_sizes(rows, d, dtype) -> None:
    inputs = make(3, rows, d, dtype, "cuda")
    assert_close(run(inputs), wanted(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_three_kernels_equal_projected_cross_attention(device, dtype) -> None:
    """Query, attention and values together against keys and values that are really projected."""
    torch.manual_seed(5)
    rows, d, keys, splits = 3, 128, 50, 2
    heads = d // 64

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    x, states = random(rows, d), random(rows, keys, d)
    gain, shift, q_bias, v_bias = random(d), random(d), random(d), random(d)
    q_weight, k_weight, v_weight = (random(d, d, scale=d**-0.5) for _ in range(3))

    absorbed = torch.empty(rows, heads, d, dtype=dtype, device=device)
    absorb_query(x, gain, shift, q_weight, q_bias, k_weight, absorbed, scale=64**-0.5)
    shapes = workspace_shapes(rows, heads, d, splits)
    parts = torch.empty(shapes[0], dtype=dtype, device=device)
    stats = torch.empty(shapes[1], device=device)
    absorbed_attention(absorbed, states, parts, stats, splits=splits)
    out = run([parts, stats, v_weight, v_bias])

    linear = torch.nn.functional.linear
    normed = torch.nn.functional.layer_norm(x.double(), (d,), gain.double(), shift.double())
    query = linear(normed, q_weight.double(), q_bias.double()).view(rows, 1, heads, 64)
    key = linear(states.double(), k_weight.double()).view(rows, keys, heads, 64)
    value = linear(states.double(), v_weight.double(), v_bias.double()).view(rows, keys, heads, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    assert_close(out, expected.transpose(1, 2).reshape(rows, d))


def test_chosen_chunks_divide_the_width_and_the_warps() -> None:
    for d in (64, 192, 384, 512, 768, 1024, 1280):
        for rows in (1, 48, 256):
            for dtype in TOLERANCE:
                config = choose_values_config(rows, d, dtype)
                assert d % config.chunk == 0
                assert config.chunk >= 16 * config.warps


def test_refuses_shapes_that_do_not_fit() -> None:
    parts, stats, weight, bias = make(2, 3, 128, torch.float32)
    with pytest.raises(KernelShapeError, match="out"):
        project_values(parts, stats, weight, bias, torch.zeros(2, 128))
    with pytest.raises(KernelShapeError, match="weight"):
        project_values(parts, stats, weight[:64], bias, torch.zeros(3, 128))
