"""What becomes of sequences, without a model."""

from __future__ import annotations

import pytest
import torch

from whisper_flash_attention.engine.request import DecodeOutput
from whisper_flash_attention.hf.fast_path import OutputFormat

END, PAD, STAMP = 9, 9, 20


def finish(*rows: list[int], pad: int = PAD, one_window: bool = False) -> list[list[int]] | None:
    """Finish rows of a prompt of one token."""
    sequences = torch.tensor([[0, *row] for row in rows])
    found = OutputFormat(1, END, pad, STAMP, one_window).sequences(DecodeOutput(sequences))
    return None if found is None else found.tolist()


def test_ends_and_padding_are_cut_to_the_longest_row() -> None:
    assert finish([1, 2, END, PAD], [3, END, PAD, PAD]) == [[1, 2], [3, PAD]]
    assert finish([1, 2, 3, 4], [3, END, PAD, PAD]) == [[1, 2, 3, 4], [3, PAD, PAD, PAD]]
    assert finish([END], [END]) == [[], []]


def test_another_padding_replaces_ends() -> None:
    assert finish([1, 2, 3, END], [4, END, 5, 5], pad=5) == [[1, 2, 3], [4, 5, 5]]


def test_one_window_is_returned_as_it_is() -> None:
    assert finish([1, END, PAD], one_window=True) == [[0, 1, END, PAD]]


@pytest.mark.parametrize(
    ("row", "is_last"),
    [
        ([1, 21, 2, 22], True),
        ([21, 1, 22, 22, 2, 23, END], True),
        ([21, 1, 22, 22, END], False),
        ([22, 22, 1], False),
        ([22, 22], False),
        ([1, 2, 22], True),
    ],
)
def test_pairs_of_timestamps_ask_for_another_window(row: list[int], is_last: bool) -> None:
    assert (finish(row) is not None) == is_last


def test_rows_of_padding_only_are_left_to_stock() -> None:
    assert finish([5, 5], pad=5) is None
