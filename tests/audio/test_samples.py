"""Sound of any kind as mono float32 at one rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from whisper_flash_attention.audio.samples import (
    Samples,
    check_finite,
    mix,
    mono_tensor,
    recording_channels,
    unchecked_samples,
)
from whisper_flash_attention.errors import AudioError


def mono_samples(clip: Any, rate: Any) -> Samples:
    samples = unchecked_samples(clip, rate)
    check_finite(samples)
    return samples


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
        (np.zeros(10, np.uint16), 16_000, "but are uint16"),
        (["a", "b"], 16_000, "but are"),
        ([[1.0], [1.0, 2.0]], 16_000, "cannot be read as an array"),
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
        (torch.zeros(10, dtype=torch.cfloat), "but are torch.complex64"),
        (torch.zeros(10, dtype=torch.bool), "but are torch.bool"),
        (torch.zeros(2, 3, 400), "give several clips as a list"),
        (torch.zeros(100, 100), r"shape \[100, 100\]"),
    ],
)
def test_tensors_that_are_not_sound_are_refused(clip: torch.Tensor, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        mono_tensor(clip)


STEREO = np.stack([tone(16_000), tone(16_000, hertz=700)])
UNIT = tone(16_000)


@pytest.mark.parametrize(
    "given",
    [
        UNIT,
        UNIT.astype(np.float64),
        UNIT.astype(">f4"),
        UNIT.astype(np.longdouble),
        np.repeat(UNIT, 2)[::2],
        UNIT[None],
        UNIT[:, None],
        UNIT.tolist(),
        torch.from_numpy(UNIT),
        torch.from_numpy(np.repeat(UNIT, 2))[::2],
        torch.from_numpy(UNIT).requires_grad_(),
        np.round(UNIT * 32768).astype(np.int16),
        np.round(UNIT * 32768).astype(">i2"),
        np.round(UNIT * 2**31).astype(np.int64).clip(-(2**31), 2**31 - 1).astype(np.int32),
        torch.from_numpy(np.round(UNIT * 32768).astype(np.int16)),
    ],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)
def test_a_recording_of_any_kind_gives_the_same_without_a_warning(
    given: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = recording_channels(given)
    assert found.shape == (1, UNIT.size) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], UNIT, atol=2e-5)
    assert found.flags.c_contiguous and found.flags.writeable
    assert not caplog.records


def test_coarse_kinds_are_scaled_too() -> None:
    bytes_ = np.round(UNIT * 128 + 128).astype(np.uint8)
    for given in (bytes_, torch.from_numpy(bytes_), torch.from_numpy(UNIT).bfloat16()):
        np.testing.assert_allclose(recording_channels(given)[0], UNIT, atol=6e-3)
    np.testing.assert_allclose(recording_channels(UNIT.astype(np.float16))[0], UNIT, atol=1e-3)


def test_read_only_samples_are_copied_and_not_changed() -> None:
    given = UNIT.copy()
    given.flags.writeable = False
    found = recording_channels(given)
    found[0, 0] = 0.5
    np.testing.assert_array_equal(given, UNIT)


@pytest.mark.parametrize("given", [STEREO, STEREO.T, torch.from_numpy(STEREO), STEREO.T.copy()])
def test_channels_are_the_short_axis(given: Any) -> None:
    np.testing.assert_array_equal(recording_channels(given), STEREO)


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        ((UNIT * 32768).astype(np.float32), 16),
        (UNIT.astype(np.float64) * 32767, 16),
        (UNIT * 2**23, 24),
        (UNIT * 2**31, 32),
        (np.round(UNIT * 32768).astype(np.int64), 16),
        (np.round(UNIT * 32768).astype(np.int32), 16),
        (np.round(UNIT * 2**31).astype(np.int64), 32),
    ],
)
def test_other_scales_become_that_of_floating_point_with_one_warning(
    given: Any, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    np.testing.assert_allclose(recording_channels(given)[0], UNIT, atol=1e-4)
    [record] = caplog.records
    assert f"are taken for samples of {bits} bits" in record.getMessage()


def test_faint_samples_of_the_scale_of_16_bits_are_recognised() -> None:
    given = np.array([0, 3, -2, 1] * 1000, np.float32)
    np.testing.assert_array_equal(recording_channels(given)[0], given / 32768)


@pytest.mark.parametrize(("peak", "warned"), [(1.0, 0), (1.2, 0), (1.9, 0), (3.3, 1), (7.9, 1)])
def test_an_overshoot_is_clipped(
    peak: float, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = UNIT * np.float32(2 * peak)
    np.testing.assert_array_equal(recording_channels(given)[0], np.clip(given, -1, 1))
    assert [record.getMessage().endswith("clipped") for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(0, np.float32), "no sound in 0 samples"),
        (np.zeros((2, 0), np.float32), "no sound in 0 samples|has shape"),
        (np.float32(0.5), r"shape \[\]"),
        (np.zeros(()), r"shape \[\]"),
        (np.zeros((9, 16_000), np.float32), "at most 8 channels"),
        (np.zeros((2, 3), np.float32), r"shape \[2, 3\]"),
        (np.zeros((1, 2, 16_000), np.float32), "must be"),
        (np.array([0.0, np.nan]), "not finite"),
        (np.array([0.0, np.inf]), "not finite"),
        (np.array([1e300]), "not finite"),
        (np.array([2.0**40]), "on no scale of sound"),
        (np.array([2**40] * 9), "beyond 32 bits"),
        (np.zeros(9, complex), "but are complex128"),
        (np.zeros(9, bool), "but are bool"),
        (np.zeros(9, np.uint16), "but are uint16"),
        (np.zeros(9, object), "but are object"),
        (np.array(["a", "b"]), "but are <U1"),
        (np.zeros(9, "m8[s]"), r"but are timedelta64\[s\]"),
        (np.zeros(9, [("a", "f4")]), "but are"),
        ([[1.0], [1.0, 2.0]], "cannot be read as an array"),
        (torch.zeros(9, device="meta"), "meta tensor, which holds no values"),
        (torch.zeros(9).to_sparse(), "sparse_coo tensor; give a dense one"),
        (torch.zeros(9, dtype=torch.cfloat), "but are complex64"),
        (torch.zeros(9, dtype=torch.bool), "but are bool"),
        (torch.zeros(()), r"shape \[\]"),
    ],
)
def test_a_recording_that_is_no_sound_is_an_audio_error(given: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        recording_channels(given)


@pytest.mark.parametrize(
    "rate", [0, -1, 1, 1999, 10**6 + 1, 10**12, 44_100.5, np.nan, np.inf, True, "16000", None, 1j]
)
def test_a_rate_that_is_nonsense_is_an_audio_error(rate: Any) -> None:
    for call in (recording_channels, mono_samples):
        with pytest.raises(AudioError, match=r"sampling rate .*: give the samples per second"):
            call(UNIT, rate)


@pytest.mark.parametrize(
    "rate", [2000, 7350, 11_127, 22_051, 44_100, 44_101, 88_200, np.float32(44_100), np.int64(8000)]
)
def test_any_other_rate_is_resampled_well(rate: Any) -> None:
    hertz = 440.0 if rate > 4000 else 300.0
    found = recording_channels(tone(int(rate), seconds=2.0, hertz=hertz), rate)[0]
    wanted = tone(16_000, seconds=2.0, hertz=hertz)
    assert abs(found.size - wanted.size) <= 40
    middle = slice(2000, 30_000)
    error = found[middle] - wanted[middle]
    assert np.sqrt(np.mean(error**2)) < 0.005


def test_long_samples_are_resampled_without_seams() -> None:
    found = recording_channels(tone(48_000, seconds=12.0), 48_000)[0]
    wanted = tone(16_000, seconds=12.0)
    np.testing.assert_allclose(found[1000:190_000], wanted[1000:190_000], atol=0.01)


def test_opposite_phases_are_not_mixed_to_silence(caplog: pytest.LogCaptureFixture) -> None:
    np.testing.assert_array_equal(mix(np.stack([UNIT * np.float32(0.9), -UNIT])), -UNIT)
    assert "channel 2 is taken instead" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(mix(np.stack([UNIT, np.zeros_like(UNIT)])), UNIT / 2)
    np.testing.assert_array_equal(mix(np.zeros((2, 9), np.float32)), np.zeros(9))
    assert not caplog.records


@pytest.mark.gpu
def test_samples_on_a_gpu_are_fetched() -> None:
    np.testing.assert_array_equal(recording_channels(torch.from_numpy(UNIT).cuda())[0], UNIT)
