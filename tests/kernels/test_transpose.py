"""Features turned over."""

from __future__ import annotations

import pytest
import torch

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.transpose import transpose


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "times", "rows"), [(80, 200, 202), (5, 63, 65), (128, 7, 8)])
def test_rows_are_times_between_zeros(device, dtype, channels, times, rows) -> None:
    features = torch.randn(3, channels, times + 2, device=device).to(dtype)[:, :, 1:-1]
    out = torch.full((3, rows, channels), float("nan"), dtype=dtype, device=device)
    transpose(features, out)
    assert torch.equal(out[:, 1 : 1 + times], features.mT)
    assert (out[:, 0] == 0).all() and (out[:, 1 + times :] == 0).all()


@pytest.mark.parametrize(
    ("features", "out", "message"),
    [
        (torch.zeros(2, 4, 6), torch.zeros(2, 6, 4), "more than 6"),
        (torch.zeros(2, 6, 4).mT, torch.zeros(2, 8, 4), "dense over time"),
        (torch.zeros(2, 4, 6), torch.zeros(2, 8, 4).half(), "float16"),
    ],
)
def test_refuses_with_reasons(features, out, message) -> None:
    with pytest.raises(KernelShapeError, match=message):
        transpose(features, out)
