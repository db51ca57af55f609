"""Smooth attention and its sharpness, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from whisper_flash_attention.kernels.character_attention import smooth_attention
from whisper_flash_attention.kernels.launch import interpreted


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("positions", [1, 2, 3, 40, 150])
def test_attention_is_the_softmax_of_medians(device: str, positions: int) -> None:
    if device == "cpu" and not interpreted():
        pytest.skip("needs Triton's interpreter")
    generator = torch.Generator().manual_seed(positions)
    scores = 4 * torch.randn(3, 2, 5, positions, generator=generator)
    seen = torch.tensor([positions, max(1, positions - 3), 1], dtype=torch.int32)
    counted = torch.rand(3, 5, generator=generator) < 0.7
    expected = torch.zeros_like(scores)
    for row in range(3):
        some = scores[row, ..., : seen[row]]
        smooth = some.clone()
        for place in range(1, int(seen[row]) - 1):
            smooth[..., place] = some[..., place - 1 : place + 2].median(dim=-1).values
        expected[row, ..., : seen[row]] = smooth.softmax(-1) * counted[row, None, :, None]
    found, squares = scores.to(device), torch.empty(3, 2, positions, device=device)
    smooth_attention(found, counted.to(device, torch.int8), seen.to(device), squares)
    torch.testing.assert_close(found.cpu(), expected)
    torch.testing.assert_close(squares.cpu(), expected.square().sum(dim=2))
