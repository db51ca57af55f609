"""Log-mel features: those of Transformers' `WhisperFeatureExtractor`, for clips of any kind."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.log_mel import SAMPLES, log_mel, log_mel_whole
from whisper_flash_attention.errors import AudioError, OptionError

TOLERANCE = 1e-4


@cache
def extractor(mel_bins: int) -> Any:
    return WhisperFeatureExtractor(feature_size=mel_bins)


def expected(samples: Any, mel_bins: int = 80) -> torch.Tensor:
    batch = extractor(mel_bins)(samples, sampling_rate=16000, return_tensors="pt")
    features: torch.Tensor = batch["input_features"]
    return features


def expected_whole(samples: Any, mel_bins: int = 80) -> torch.Tensor:
    batch = extractor(mel_bins)(
        samples, sampling_rate=16000, return_tensors="pt", truncation=False, padding="longest"
    )
    features: torch.Tensor = batch["input_features"]
    return features


def noise(length: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_bundled_recordings(bundled_recordings: tuple[Any, ...], mel_bins: int) -> None:
    clips = [load_audio(recording.path) for recording in bundled_recordings]
    assert_same(log_mel(clips, mel_bins=mel_bins), expected(clips, mel_bins))


@pytest.mark.slow
@pytest.mark.parametrize("mel_bins", [80, 128])
def test_more_recordings(shared_audio: Path, mel_bins: int) -> None:
    files = [path for path in sorted(shared_audio.iterdir()) if path.suffix != ".json"]
    assert len(files) > 40
    for path in files:
        samples = load_audio(path)
        assert_same(log_mel(samples, mel_bins=mel_bins), expected(samples, mel_bins))
        whole = log_mel_whole(samples, mel_bins=mel_bins)
        assert_same(whole, expected_whole(samples, mel_bins))


@pytest.mark.parametrize(
    "length", [1, 2, 199, 200, 201, 400, 401, SAMPLES - 200, SAMPLES - 1, SAMPLES, SAMPLES + 500]
)
def test_lengths_at_the_edges(length: int) -> None:
    assert_same(log_mel(noise(length)), expected(noise(length)))


@pytest.mark.parametrize("mel_bins", [3, 40, 80, 128])
def test_any_number_of_mel_bins(mel_bins: int) -> None:
    assert_same(log_mel(noise(5000), mel_bins=mel_bins), expected(noise(5000), mel_bins))


def test_the_error_is_that_of_single_precision(bundled_recordings: tuple[Any, ...]) -> None:
    samples = load_audio(bundled_recordings[0].path)
    torch.testing.assert_close(log_mel(samples), expected(samples), rtol=0, atol=2e-6)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=11))
def test_clips_of_a_batch_do_not_see_one_another(lengths: list[int]) -> None:
    clips = [noise(length) for length in lengths]
    found = log_mel(clips)
    assert found.shape == (len(clips), 80, 3000)
    assert_same(found, expected(clips))


def test_silence_and_a_click() -> None:
    click = np.zeros(8000, np.float32)
    assert_same(log_mel(click), expected(click))
    click[4000] = 1.0
    assert_same(log_mel(click), expected(click))


def test_kinds_of_clips_and_dtypes() -> None:
    samples = noise(5000)
    wanted = log_mel(samples)
    for clip in (torch.from_numpy(samples), samples.astype(np.float64), samples.tolist()):
        assert_same(log_mel(clip), wanted)
    assert_same(log_mel([samples, samples])[1:], wanted)
    half = log_mel(samples, dtype=torch.float16)
    assert half.dtype is torch.float16
    torch.testing.assert_close(half.float(), wanted, rtol=1e-3, atol=1e-3)


def test_an_array_of_two_dimensions_is_several_clips() -> None:
    clips = np.stack([noise(5000), noise(5001)[1:]])
    wanted = log_mel([clips[0], clips[1]])
    assert_same(log_mel(clips), wanted)
    assert_same(log_mel(torch.from_numpy(clips)), wanted)
    with pytest.raises(AudioError, match="give stereo clips as a list"):
        log_mel(clips.T[:, :2])


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=5), same=st.booleans())
def test_tensors_on_the_device_are_as_arrays(lengths: list[int], same: bool) -> None:
    arrays = [noise(lengths[0] if same else length) for length in lengths]
    assert_same(log_mel([torch.from_numpy(each) for each in arrays]), expected(arrays))


def test_tensors_and_arrays_may_be_mixed_and_tensors_of_another_rate_resampled() -> None:
    wanted = log_mel([noise(5000), noise(700)])
    assert_same(log_mel([torch.from_numpy(noise(5000)), noise(700)]), wanted)
    wanted = log_mel(noise(5000), sampling_rate=8000)
    assert_same(log_mel(torch.from_numpy(noise(5000)), sampling_rate=8000), wanted)


def test_what_is_not_finite_is_refused() -> None:
    for value in (np.nan, np.inf, -np.inf, 1e30):
        clip = torch.from_numpy(noise(5000)).index_fill_(0, torch.tensor([77]), float(value))
        with pytest.raises(AudioError, match="not finite"):
            log_mel([torch.from_numpy(noise(100)), clip])
        with pytest.raises(AudioError, match="not finite"):
            log_mel([noise(100), clip.numpy()])
        with pytest.raises(AudioError, match="not finite"):
            log_mel(clip.numpy(), sampling_rate=8000)
        with pytest.raises(AudioError, match="not finite"):
            log_mel_whole(clip)


@pytest.mark.parametrize(
    "length",
    [201, 319, 320, 359, 360, 480, 5000, SAMPLES, *(SAMPLES + n for n in (1, 39, 40, 159))],
)
def test_a_whole_recording_of_any_length(length: int) -> None:
    found = log_mel_whole(noise(length))
    assert found.shape == (1, 80, length // 160)
    assert_same(found, expected_whole(noise(length)))
    assert_same(log_mel_whole(torch.from_numpy(noise(length))), found)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_a_whole_recording_has_one_range(
    bundled_recordings: tuple[Any, ...], mel_bins: int
) -> None:
    speech = np.concatenate([load_audio(each.path) for each in bundled_recordings])
    samples = np.concatenate([speech, 1e-3 * speech, speech[:54_321]])
    assert_same(log_mel_whole(samples, mel_bins=mel_bins), expected_whole(samples, mel_bins))
    half = log_mel_whole(samples, mel_bins=mel_bins, dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16


def test_a_whole_recording_that_is_too_short_is_refused() -> None:
    with pytest.raises(AudioError, match="200 samples is too short: give 201"):
        log_mel_whole(noise(200))
    with pytest.raises(OptionError, match="mel_bins is -1"):
        log_mel_whole(noise(300), mel_bins=-1)


def test_nothing_and_nonsense_are_refused() -> None:
    with pytest.raises(OptionError, match="no clips"):
        log_mel([])
    with pytest.raises(OptionError, match="mel_bins is 0"):
        log_mel(noise(100), mel_bins=0)
    with pytest.raises(AudioError, match="no sound in 0 samples"):
        log_mel([noise(100), noise(0)])


@pytest.mark.gpu
@pytest.mark.parametrize("mel_bins", [80, 128])
def test_the_gpu_computes_the_same(mel_bins: int) -> None:
    clips = [noise(length) for length in (1, 700, 80_000, SAMPLES)] * 3
    found = log_mel(clips, mel_bins=mel_bins, device="cuda")
    assert found.is_cuda
    assert_same(found.cpu(), expected(clips, mel_bins))
    there = log_mel([torch.from_numpy(clip).cuda() for clip in clips], mel_bins=mel_bins)
    assert there.is_cuda
    assert_same(there, found)
    whole = log_mel_whole(noise(SAMPLES + 777), mel_bins=mel_bins, device="cuda")
    assert_same(whole.cpu(), expected_whole(noise(SAMPLES + 777), mel_bins))


@pytest.mark.gpu
@pytest.mark.parametrize("same", [True, False])
def test_samples_on_the_gpu_stay_there_and_it_is_waited_for_once(same: bool) -> None:
    lengths = [SAMPLES] * 5 if same else [1, 700, 80_000, SAMPLES, SAMPLES + 5]
    clips = [torch.from_numpy(noise(length)).cuda() for length in lengths]
    log_mel(clips)  # the filters get there
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            log_mel(clips)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in caught if "called a synchronizing" in str(each.message)]) == 1
