"""Speech found in a file is the speech found in its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audio.encoding import read_wave, write_wave
from whisper_flash_attention.audio import bundled_recordings, load_audio
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.vad import Span, cut, cut_all, find_speech
from whisper_flash_attention.errors import AudioError


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 s of speech with pauses between."""
    parts = [read_wave(each.path) for each in bundled_recordings()]
    pause = np.zeros(30_011, np.int16)
    samples = np.concatenate([part for each in parts for part in (pause, each)])
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    write_wave(path, samples[None], 16_000)
    return path


@pytest.mark.parametrize("max_seconds", [30.0, 6.0])
def test_chunks_of_a_file_are_those_of_its_samples(recording: Path, max_seconds: float) -> None:
    samples = load_audio(recording)
    seconds, found = find_speech(AudioSource(source=recording), max_seconds)
    held_seconds, held = find_speech(AudioSource(samples), max_seconds)
    chunks, expected = list(found), list(held)
    assert seconds == held_seconds == samples.size / 16_000
    assert [chunk.start for chunk in chunks] == [chunk.start for chunk in expected]
    assert len(chunks) > 1
    for chunk, other in zip(chunks, expected, strict=True):
        np.testing.assert_array_equal(chunk.samples, other.samples)
    assert [chunk.speech for chunk in chunks] == [chunk.speech for chunk in expected]


def test_quiet_places_in_a_file_are_those_of_its_samples(recording: Path) -> None:
    samples = load_audio(recording)
    _, found = cut_all(AudioSource(source=recording), 8.0)
    _, expected = cut_all(AudioSource(samples), 8.0)
    for chunk, other in zip(found, expected, strict=True):
        assert (chunk.start, chunk.speech) == (other.start, other.speech)
        np.testing.assert_array_equal(chunk.samples, other.samples)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 400_000), min_size=2, max_size=8))
def test_spans_are_cut_wherever_blocks_end(steps: list[int]) -> None:
    samples = np.arange(1_500_000, dtype=np.float32)
    bounds = np.cumsum(steps).clip(max=samples.size)
    spans = [(int(a), int(b)) for a, b in zip(bounds[::2], bounds[1::2], strict=False) if a < b]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AudioSource, "blocks", lambda _: iter(np.array_split(samples, 4)))
        chunks = list(cut(AudioSource(source="long.wav"), [Span(*span) for span in spans]))
    for (begin, end), chunk in zip(spans, chunks, strict=True):
        assert chunk.start == begin / 16_000
        np.testing.assert_array_equal(chunk.samples, samples[begin:end])


def test_a_file_that_became_shorter_is_an_error(recording: Path) -> None:
    with pytest.raises(AudioError, match="became shorter"):
        list(cut(AudioSource(source=recording), [Span(0, 100 * 16_000)]))
