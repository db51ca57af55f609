"""Features of real speech: different clips, different batches, and honest refusals."""

from __future__ import annotations

import builtins
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.audio.bundled_clips import BundledClip
from whisper_flash_attention.benchmark.features import (
    MOST_CLIPS,
    batch_of,
    bundled_clips,
    clips_needed,
    librispeech_clips,
    prepare_features,
    read_wave,
)
from whisper_flash_attention.benchmark.settings import SETTINGS
from whisper_flash_attention.errors import BenchmarkError, MissingPackage, OptionError


def test_bundled_clips_are_thirty_seconds_of_speech_and_all_different() -> None:
    clips, origin = bundled_clips(MOST_CLIPS)
    assert len(clips) == MOST_CLIPS
    assert {clip.shape for clip in clips} == {(480_000,)}
    assert min(float(np.abs(clip).max()) for clip in clips) > 0.05
    assert len({clip.tobytes() for clip in clips}) == MOST_CLIPS
    assert "5 recordings" in origin


def test_a_wave_file_is_read_as_any_decoder_reads_it(
    bundled_recordings: tuple[BundledClip, ...],
) -> None:
    from whisper_flash_attention.audio.audio_source import load_audio

    path = bundled_recordings[0].path
    np.testing.assert_allclose(read_wave(path), load_audio(path), atol=1e-6)


def test_another_kind_of_wave_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0" * 400)
    with pytest.raises(BenchmarkError, match=r"stereo\.wav: want 16 kHz mono"):
        read_wave(path)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_features_have_the_models_mel_bins(mel_bins: int, tmp_path: Path) -> None:
    made = prepare_features("bundled", mel_bins, 2, tmp_path / "features.npy")
    features = np.load(made.path)
    assert features.shape == (2, mel_bins, 3000)
    assert features.dtype == np.float32
    assert not np.array_equal(features[0], features[1])
    assert made.description.startswith("bundled: ")


def test_an_unknown_source_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="sources: bundled, librispeech"):
        prepare_features("podcasts", 80, 1, tmp_path / "features.npy")


def test_librispeech_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_datasets(name: str, *rest: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(MissingPackage, match=r"whisper-flash-attention\[bench\]"):
        librispeech_clips(1)


@given(st.integers(1, 64), st.integers(1, MOST_CLIPS))
def test_neighbouring_batches_differ(batch_size: int, clips: int) -> None:
    features = torch.arange(clips)[:, None, None]
    batches = [batch_of(features, index, batch_size).flatten().tolist() for index in range(3)]
    assert all(len(batch) == batch_size for batch in batches)
    if clips == MOST_CLIPS:
        assert batches[0] != batches[1] != batches[2]


def test_all_clips_of_the_first_batch_are_different_ones() -> None:
    for setting in SETTINGS.values():
        clips = clips_needed([setting])
        batch = batch_of(torch.arange(clips)[:, None, None], 0, setting.batch_size)
        assert len(set(batch.flatten().tolist())) == setting.batch_size
