"""The survey that `doctor` prints."""

from __future__ import annotations

import pytest
import torch

from whisper_flash_attention.flash_attention import backend_names, survey


def test_it_covers_the_four_kinds_of_attention_on_a_cpu() -> None:
    rows = survey("cpu", torch.float32)
    assert [row.case for row in rows] == [
        "encoder self-attention",
        "decoder self-attention, prompt",
        "decoder self-attention, one token",
        "cross-attention, one token",
    ]
    for row in rows:
        assert row.picked == "sdpa_flash"
        assert tuple(row.reasons) == backend_names()[1:]
        assert row.reasons[row.picked] == []
        assert row.reasons["sdpa_cudnn"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 1)])
def test_a_missing_gpu_is_explained(device: torch.device | str) -> None:
    row, *_ = survey(device, torch.float16, heads=20, batch=32)
    assert row.picked == "reference"
    assert row.reasons["sdpa_flash"] == [
        f"there is no cuda:{0 if device == 'cuda' else 1} on this machine"
    ]
