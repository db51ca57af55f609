"""Linear layers by whichever routine: the numbers of PyTorch's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from whisper_flash_attention.engine.weights import FEW_ROWS, Linear, linear


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, FEW_ROWS + 2),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_pytorch(
    batch: int, rows: int, n: int, k: int, bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n * 71 + k)
    x = torch.randn(batch, rows, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    layer = Linear(weight, torch.randn(n, generator=generator).to(dtype) if bias else None)
    found, expected = linear(x, layer), F.linear(x, layer.weight, layer.bias)
    assert found.dtype == dtype
    assert found.shape == (batch, rows, n)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_input_that_is_not_contiguous() -> None:
    x = torch.randn(8, 5).t()
    layer = Linear(torch.randn(16, 8), torch.randn(16))
    torch.testing.assert_close(linear(x, layer), F.linear(x, layer.weight, layer.bias))
