"""Dynamic time warping and what precedes it, against plain programs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from whisper_flash_attention.engine.alignment import (
    dtw,
    median_filter,
    start_positions,
    token_costs,
)

Floats = npt.NDArray[np.float32]


def plain_path(costs: Floats) -> list[tuple[int, int]]:
    """Entry by entry, with the preference of OpenAI's `dtw_cpu` where totals tie."""
    tokens, positions = costs.shape
    infinity = np.float32(np.inf)
    total: dict[tuple[int, int], np.float32] = {(-1, -1): np.float32(0)}
    come_from = {}
    for j in range(positions):
        for i in range(tokens):
            ways = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            both, token, position = (total.get(way, infinity) for way in ways)
            if both < token and both < position:
                choice = 0
            elif token < both and token < position:
                choice = 1
            else:
                choice = 2
            come_from[i, j] = ways[choice]
            total[i, j] = costs[i, j] + (both, token, position)[choice]
    path = [(tokens - 1, positions - 1)]
    while path[-1] != (0, 0):
        path.append(come_from[path[-1]])
    return path[::-1]


def as_pairs(path: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> list[tuple[int, int]]:
    return list(zip(*(each.tolist() for each in path), strict=True))


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Floats]:
    return arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=elements)


# Few values, so that many totals tie; and any, so that sums are rounded.
ties = st.integers(-2, 2).map(float)
anything = st.floats(-8, 8, width=32)


@given(st.lists(matrices(ties) | matrices(anything), min_size=1, max_size=4))
def test_paths_are_those_of_the_plain_program(costs: list[Floats]) -> None:
    for matrix, path in zip(costs, dtw(costs), strict=True):
        assert as_pairs(path) == plain_path(matrix)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (60, 1), (120, 40), (30, 400)])
def test_paths_of_larger_matrices_are_those_of_the_plain_program(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    smooth = rng.standard_normal(shape).cumsum(axis=1).astype(np.float32)
    [path] = dtw([smooth])
    assert as_pairs(path) == plain_path(smooth)


@given(st.lists(matrices(anything), min_size=1, max_size=20))
def test_a_token_starts_where_the_path_first_meets_it(costs: list[Floats]) -> None:
    for matrix, starts in zip(costs, start_positions(costs), strict=True):
        path = plain_path(matrix)
        assert starts.tolist() == [
            min(j for i, j in path if i == token) for token in range(len(matrix))
        ]


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=3, max_dims=3, max_side=20),
        elements=st.floats(-4, 4, width=32),
    )
)
def test_the_median_is_that_of_sorted_neighbours(values: Floats) -> None:
    expected = values
    if values.shape[-1] > 3:
        padded = np.pad(values, ((0, 0), (0, 0), (3, 3)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 7, axis=-1)
        expected = np.sort(windows, axis=-1)[..., 3]
    np.testing.assert_array_equal(median_filter(torch.from_numpy(values)).numpy(), expected)


def test_costs_are_those_of_openai() -> None:
    attention = torch.rand(3, 12, 50, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    values = attention.double().numpy()
    normed = (values - values.mean(axis=1, keepdims=True)) / values.std(axis=1, keepdims=True)
    expected = -median_filter(torch.from_numpy(normed)).numpy().mean(axis=0)[4:-1]
    found = token_costs(attention, 4, 11).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_position_that_all_tokens_look_at_alike_prefers_none() -> None:
    costs = token_costs(torch.ones(2, 5, 1), 1, 4)
    assert costs.tolist() == [[0.0]] * 3
    assert start_positions([costs.numpy()])[0].tolist() == [0, 0, 0]
