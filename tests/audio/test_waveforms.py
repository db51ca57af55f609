"""Sound of any kind as mono float32 at one rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from whisper_flash_attention.audio.waveforms import mono_samples, mono_tensor
from whisper_flash_attention.errors import AudioError


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> npt.NDArray[np.float32]:
    time = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def test_whole_numbers_are_scaled_by_the_range_of_their_type() -> None:
    for kind in (np.int8, np.int16, np.int32):
        lowest = np.iinfo(kind).min
        found = mono_samples(np.array([lowest, 0, lowest // 2], kind), 16_000)
        assert found.tolist() == [-1.0, 0.0, -0.5]
        assert found.dtype == np.float32


def test_channels_are_averaged_whichever_way_they_lie() -> None:
    left, right = tone(16_000), tone(16_000, hertz=700)
    wanted = (left + right) / 2
    for clip in (np.stack([left, right]), np.stack([left, right], axis=1)):
        np.testing.assert_allclose(mono_samples(clip, 16_000), wanted, atol=1e-6)
        np.testing.assert_allclose(mono_samples(torch.from_numpy(clip), 16_000), wanted, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    found, wanted = mono_samples(tone(rate), rate), tone(16_000)
    assert abs(len(found) - len(wanted)) <= 40
    middle = slice(1000, 7000)
    assert np.corrcoef(found[middle], wanted[middle])[0, 1] > 0.999


def test_half_precision_tensors_and_lists() -> None:
    samples = tone(16_000)
    bf16 = torch.from_numpy(samples).bfloat16()
    np.testing.assert_allclose(mono_samples(bf16, 16_000), samples, atol=4e-3)
    assert mono_samples([0.5, -0.5], 16_000).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("clip", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "no sound in 0 samples"),
        (np.array([0.0, np.nan]), 16_000, "not finite"),
        (np.zeros((100, 100), np.float32), 16_000, r"shape \[100, 100\]"),
        (np.zeros((2, 2), np.float32), 16_000, r"shape \[2, 2\]"),
        (np.zeros((2, 3, 400), np.float32), 16_000, "give several clips as a list"),
        (np.zeros(10, np.uint8), 16_000, "but are uint8"),
        (["a", "b"], 16_000, "but are"),
        ([[1.0], [1.0, 2.0]], 16_000, "not of one length"),
        (np.zeros(10, np.float32), 0, "sampling rate 0"),
    ],
)
def test_what_is_not_sound_is_refused(clip: Any, rate: int, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        mono_samples(clip, rate)


@pytest.mark.parametrize(
    "clip",
    [
        torch.from_numpy(tone(16_000)),
        torch.from_numpy(tone(16_000)).double(),
        torch.from_numpy(tone(16_000)).bfloat16(),
        (torch.from_numpy(tone(16_000)) * 32_767).to(torch.int16),
        torch.from_numpy(np.stack([tone(16_000), tone(16_000, hertz=700)])),
        torch.from_numpy(np.stack([tone(16_000), tone(16_000, hertz=700)], axis=1)),
    ],
)
def test_tensors_give_the_same_where_they_are(clip: torch.Tensor) -> None:
    found = mono_tensor(clip)
    assert found.dtype is torch.float32
    np.testing.assert_allclose(found.numpy(), mono_samples(clip, 16_000), atol=1e-7)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(0), "no sound in 0 samples"),
        (torch.zeros(10, dtype=torch.uint8), "but are torch.uint8"),
        (torch.zeros(10, dtype=torch.bool), "but are torch.bool"),
        (torch.zeros(2, 3, 400), "give several clips as a list"),
        (torch.zeros(100, 100), r"shape \[100, 100\]"),
    ],
)
def test_tensors_that_are_not_sound_are_refused(clip: torch.Tensor, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        mono_tensor(clip)
