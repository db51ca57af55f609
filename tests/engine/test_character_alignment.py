"""Where characters begin, against the same rules one window and one head after the other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine import character_alignment
from whisper_flash_attention.engine.alignment import AlignmentInput, align_batches, dtw
from whisper_flash_attention.engine.character_alignment import (
    HEADS,
    OWN,
    QUIET,
    SHARPER,
    SLOPE,
    SOFT,
    CharacterInput,
    character_starts,
)
from whisper_flash_attention.engine.weights import DecoderWeights, collect_weights
from whisper_flash_attention.errors import NotFinite
from whisper_flash_attention.kernels.launch import interpreted

PROMPT, TEXT, END = (298, 299), 200, 290


def character_inputs(
    generator: torch.Generator, parts: list[list[int]], frames: list[int]
) -> list[CharacterInput]:
    rows = []
    for counts, length in zip(parts, frames, strict=True):
        texts = tuple(
            tuple(torch.randint(0, TEXT, (count,), generator=generator).tolist())
            for count in counts
        )
        silent = torch.rand(sum(counts), generator=generator) < 0.3
        rows.append(
            CharacterInput(
                torch.randn(40, 128, generator=generator),
                PROMPT,
                texts,
                tuple(silent.tolist()),
                length,
                60 * torch.rand(80, generator=generator) - 70,
            )
        )
    return rows


def attention_of(weights: DecoderWeights, row: CharacterInput) -> torch.Tensor:
    """[heads, L, P]: of the prompt once, the characters, and the end once."""
    heads = [(i, j) for i in range(len(weights.layers)) for j in range(weights.heads)]
    found = []
    for number, part in enumerate(row.parts):
        given = AlignmentInput(row.states, (*row.prompt, *part, END), row.frames)
        [batch] = align_batches(weights, [given], heads, text_tokens=TEXT)
        [alignment] = batch.alignments()
        first = len(row.prompt) if number else 0
        last = None if part is row.parts[-1] else -1
        found.append(alignment.attention[:, first:last])
    return torch.cat(found, dim=1)


def expected_starts(weights: DecoderWeights, row: CharacterInput) -> npt.NDArray[np.int64]:
    logs = attention_of(weights, row).log().numpy()
    heads, tokens, positions = logs.shape
    smooth = logs.copy()
    for position in range(1, positions - 1):
        smooth[..., position] = np.median(logs[..., position - 1 : position + 2], axis=-1)
    powers = np.exp(SHARPER * smooth)
    attention = powers / powers.sum(axis=-1, keepdims=True)
    sharpness = [np.linalg.norm(attention[head], axis=0).sum() for head in range(heads)]
    kept = attention[np.argsort(sharpness)[::-1][:HEADS]]
    shares = (kept / kept.sum(axis=1, keepdims=True)).mean(axis=0)
    first = len(row.prompt)
    gains = (1 - OWN) * shares[first - 1 : -1] + OWN * shares[first:]
    levels = row.levels.numpy()[: row.frames]
    levels = levels[: levels.size // 2 * 2].reshape(-1, 2).mean(axis=1)[:positions]
    quiet = np.clip((levels.max() - levels - SOFT) / SLOPE, -1, 1) / 2 + 0.5 if levels.size else 0
    for place, is_silent in enumerate((*row.is_silent, True)):
        gains[place] += QUIET * (quiet if is_silent else -quiet)
    assert gains.shape == (row.count, positions) and tokens == first + row.count
    [(path, places)] = dtw([-gains.astype(np.float32)])
    return places[np.diff(path, prepend=-1) > 0]


WINDOWS: tuple[list[list[int]], list[int]] = ([[7], [1], [5, 4, 6], [12]], [80, 60, 71, 5])


@pytest.mark.parametrize("budget", [None, 1])
def test_characters_are_where_the_rules_have_them(
    small_model: WhisperForConditionalGeneration, budget: int | None
) -> None:
    weights = collect_weights(small_model).decoder
    rows = character_inputs(torch.Generator().manual_seed(0), *WINDOWS)
    found = character_starts(weights, rows, end=END, budget_bytes=budget)()
    for starts, row in zip(found, rows, strict=True):
        assert len(starts) == row.count
        assert starts.tolist() == expected_starts(weights, row).tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_agree_with_one_window_after_the_other(
    small_model: WhisperForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "cpu" and not interpreted():
        pytest.skip("needs Triton's interpreter")
    weights = collect_weights(small_model).decoder
    rows = character_inputs(torch.Generator().manual_seed(1), *WINDOWS)
    wanted = character_starts(weights, rows, end=END)()
    if device == "cpu":
        monkeypatch.setattr(character_alignment, "has_kernels", lambda device: True)
    else:
        weights = collect_weights(copy.deepcopy(small_model).to(device)).decoder
        rows = [
            replace(row, states=row.states.to(device), levels=row.levels.to(device)) for row in rows
        ]
    found = character_starts(weights, rows, end=END)()
    assert [each.tolist() for each in found] == [each.tolist() for each in wanted]


@pytest.mark.parametrize("frames", [0, 1, 2, 4, 6])
def test_a_snippet_has_all_characters(
    small_model: WhisperForConditionalGeneration, frames: int
) -> None:
    weights = collect_weights(small_model).decoder
    rows = character_inputs(torch.Generator().manual_seed(2), [[9], [3]], [frames, 80])
    found, other = character_starts(weights, rows, end=END)()
    assert found.tolist() == expected_starts(weights, rows[0]).tolist()
    assert max(found) < rows[0].positions and len(found) == 10
    assert other.tolist() == expected_starts(weights, rows[1]).tolist()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_is_an_error(
    small_model: WhisperForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    if kernels and not interpreted():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(character_alignment, "has_kernels", lambda device: kernels)
    [row] = character_inputs(torch.Generator().manual_seed(0), [[3]], [20])
    row.states[2, 5] = torch.nan
    with pytest.raises(NotFinite, match="while words were aligned"):
        character_starts(collect_weights(small_model).decoder, [row], end=END)()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_in_the_last_layer_is_an_error(
    small_model: WhisperForConditionalGeneration,
) -> None:
    weights = collect_weights(small_model).decoder
    [row] = character_inputs(torch.Generator().manual_seed(0), [[3]], [20])
    row.states[2, 5] = torch.nan
    with pytest.raises(NotFinite):
        character_starts(replace(weights, layers=weights.layers[:1]), [row], end=END)()


def test_no_windows_have_no_characters(small_model: WhisperForConditionalGeneration) -> None:
    assert character_starts(collect_weights(small_model).decoder, [], end=END)() == []
