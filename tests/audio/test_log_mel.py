"""Log-mel features: those of Transformers' `WhisperFeatureExtractor`, for clips of any kind."""

from __future__ import annotations

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
from whisper_flash_attention.audio.log_mel import SAMPLES, log_mel
from whisper_flash_attention.errors import AudioError, OptionError

TOLERANCE = 1e-4


@cache
def extractor(mel_bins: int) -> Any:
    return WhisperFeatureExtractor(feature_size=mel_bins)


def expected(samples: Any, mel_bins: int = 80) -> torch.Tensor:
    batch = extractor(mel_bins)(samples, sampling_rate=16000, return_tensors="pt")
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


@pytest.mark.parametrize(
    "length", [1, 2, 199, 200, 201, 400, 401, SAMPLES - 200, SAMPLES - 1, SAMPLES, SAMPLES + 500]
)
def test_lengths_at_the_edges(length: int) -> None:
    assert_same(log_mel(noise(length)), expected(noise(length)))


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
