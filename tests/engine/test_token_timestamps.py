"""Token times by kernels are those of one window after the other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine import alignment
from whisper_flash_attention.engine.alignment import AlignmentInput, token_timestamps
from whisper_flash_attention.engine.weights import collect_weights
from whisper_flash_attention.errors import NotFinite
from whisper_flash_attention.kernels.launch import interpreted

HEADS = ((0, 1), (1, 0), (1, 1))
TEXT = 200


def alignment_inputs(
    generator: torch.Generator, texts: list[int], frames: list[int]
) -> list[AlignmentInput]:
    rows = []
    for count, length in zip(texts, frames, strict=True):
        text = torch.randint(0, TEXT, (count,), generator=generator).tolist()
        states = torch.randn(40, 128, generator=generator)
        rows.append(AlignmentInput(states, (298, 299, *text, 290), length))
    return rows


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_agree_with_one_window_after_the_other(
    small_model: WhisperForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "cpu" and not interpreted():
        pytest.skip("needs Triton's interpreter")
    weights = collect_weights(small_model).decoder
    generator = torch.Generator().manual_seed(0)
    rows = alignment_inputs(generator, [7, 1, 12], [80, 60, 7])
    wanted = token_timestamps(weights, rows, HEADS, first=2, text_tokens=TEXT)()
    if device == "cpu":
        monkeypatch.setattr(alignment, "has_kernels", lambda device: True)
    else:
        weights = collect_weights(copy.deepcopy(small_model).to(device)).decoder
        rows = [AlignmentInput(row.states.to(device), row.tokens, row.frames) for row in rows]
    found = token_timestamps(weights, rows, HEADS, first=2, text_tokens=TEXT)()
    for one, other, row in zip(found, wanted, rows, strict=True):
        assert one.starts.tolist() == other.starts.tolist()
        assert len(one.starts) == len(row.tokens) - 2
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert len(one.probabilities) == len(row.tokens) - 3


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_is_an_error(
    small_model: WhisperForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    if kernels and not interpreted():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(alignment, "has_kernels", lambda device: kernels)
    [row] = alignment_inputs(torch.Generator().manual_seed(0), [3], [20])
    row.states[2, 5] = torch.nan
    with pytest.raises(NotFinite, match="while words were aligned"):
        token_timestamps(
            collect_weights(small_model).decoder, [row], HEADS, first=2, text_tokens=TEXT
        )()


def test_nothing_said_has_no_times(small_model: WhisperForConditionalGeneration) -> None:
    weights = collect_weights(small_model).decoder
    assert token_timestamps(weights, [], HEADS, first=2, text_tokens=TEXT)() == []
