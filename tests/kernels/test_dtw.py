"""Costs of tokens and where they start, against the same for one window in NumPy and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from whisper_flash_attention.engine import alignment
from whisper_flash_attention.kernels.dtw import token_costs, token_starts


@pytest.mark.parametrize(
    ("lengths", "seen"),
    [((9, 4, 7), (150, 3, 131)), ((6, 6), (20, 20)), ((5,), (1,)), ((5, 4), (4, 2))],
)
def test_costs_are_those_of_each_window_alone(device, lengths, seen) -> None:
    rows, heads, first = len(lengths), 3, 1
    torch.manual_seed(0)
    attention = torch.randn(rows, heads, max(lengths), max(seen), device=device).softmax(dim=-1)
    count, width = max(lengths) - 1 - first, max(seen) + 2
    moments = torch.full((2, rows, heads, max(seen)), float("nan"), device=device)
    costs = torch.full((rows, count, width), float("nan"), device=device)
    # What does not count must not matter.
    for row, (length, end) in enumerate(zip(lengths, seen, strict=True)):
        attention[row, :, length:] = float("nan")
        attention[row, :, :, end:] = float("nan")
    numbers = [torch.tensor(each, dtype=torch.int32, device=device) for each in (lengths, seen)]
    token_costs(attention, *numbers, first, moments, costs)
    for row, (length, end) in enumerate(zip(lengths, seen, strict=True)):
        wanted = alignment.token_costs(attention[row, :, :length, :end], first, length - 1)
        found = costs[row, : length - 1 - first, :end]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(
    ("counts", "seen"), [((6, 1, 9), (12, 9, 3)), ((1, 2), (1, 1)), ((40,), (70,))]
)
def test_starts_are_those_of_each_window_alone(device, counts, seen, ties) -> None:
    rng = np.random.default_rng(len(counts))
    shape = (len(counts), max(counts), max(seen))
    values = rng.integers(-2, 3, shape) if ties else rng.standard_normal(shape)
    costs = torch.from_numpy(values.astype(np.float32))
    first = 2
    wanted = alignment.start_positions(
        [
            costs[row, :count, :end].numpy()
            for row, (count, end) in enumerate(zip(counts, seen, strict=True))
        ]
    )
    size = 1 << (max(counts) - 1).bit_length()
    lengths = torch.tensor([count + first + 1 for count in counts], dtype=torch.int32)
    audio = torch.tensor(seen, dtype=torch.int32)
    choices = torch.full((len(counts), sum(shape[1:]), size), 7, dtype=torch.int8)
    starts = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    placed = [each.to(device) for each in (costs, lengths, audio)]
    outputs = [each.to(device) for each in (choices, starts)]
    token_starts(*placed, first, *outputs)
    for found, expected in zip(outputs[1].cpu().numpy(), wanted, strict=True):
        assert found[: len(expected)].tolist() == expected.tolist()


@pytest.mark.gpu
def test_long_windows_have_the_same_starts(device) -> None:
    generator = torch.Generator().manual_seed(1)
    costs = torch.randn(5, 230, 1500, generator=generator).cumsum(2)
    wanted = alignment.start_positions([row.numpy() for row in costs])
    lengths = torch.full((5,), 230 + 4, dtype=torch.int32, device=device)
    seen = torch.full((5,), 1500, dtype=torch.int32, device=device)
    choices = torch.empty(5, 1730, 256, dtype=torch.int8, device=device)
    starts = torch.zeros(5, 230, dtype=torch.int32, device=device)
    token_starts(costs.to(device), lengths, seen, 3, choices, starts)
    for found, expected in zip(starts.cpu().numpy(), wanted, strict=True):
        assert found.tolist() == expected.tolist()
