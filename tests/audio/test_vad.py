"""Speech found by Silero's detector, in chunks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from whisper_flash_attention.audio import load_audio, vad
from whisper_flash_attention.audio.vad import all_chunks, speech_chunks
from whisper_flash_attention.errors import MissingPackage


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> np.ndarray:
    return np.concatenate([load_audio(recording.path) for recording in bundled_recordings])


def test_chunks_hold_the_speech_and_leave_out_the_silence(speech) -> None:
    silence = np.zeros(8 * 16_000, np.float32)
    recording = np.concatenate([silence, speech, silence, speech, silence])
    chunks = list(speech_chunks(recording))
    assert all(chunk.seconds <= 27 for chunk in chunks)
    heard = sum(chunk.seconds for chunk in chunks)
    assert 0.85 * 2 * speech.size / 16_000 < heard < 2 * speech.size / 16_000 + 9
    for chunk in chunks:
        begin = round(chunk.start * 16_000)
        assert np.array_equal(chunk.samples, recording[begin : begin + chunk.samples.size])
    starts = [chunk.start for chunk in chunks]
    assert starts == sorted(starts) and 7 < starts[0] < 9


def test_chunks_are_as_long_as_they_may_be(speech) -> None:
    many = list(speech_chunks(np.tile(speech, 2), max_seconds=8))
    assert all(chunk.seconds <= 8 for chunk in many)
    few = list(speech_chunks(np.tile(speech, 2)))
    assert len(few) < len(many)
    assert all(chunk.seconds > 15 for chunk in few[:-1])


def test_nobody_speaks_in_silence() -> None:
    assert list(speech_chunks(np.zeros(16_000, np.float32))) == []


def test_all_of_a_recording_is_in_chunks_but_digital_silence() -> None:
    sound = np.sin(np.arange(70 * 16_000, dtype=np.float32))
    sound[30 * 16_000 : 60 * 16_000] = 0.25
    sound[3 * 16_000 : 29 * 16_000] = 0
    chunks = list(all_chunks(sound))
    assert [(chunk.start, chunk.seconds) for chunk in chunks] == [(0, 30), (60, 10)]
    assert np.array_equal(chunks[1].samples, sound[60 * 16_000 :])
    # A click that the first look at a few samples misses.
    sound[45 * 16_000 + 7] = 0.26
    assert [chunk.start for chunk in all_chunks(sound)] == [0, 30, 60]
    short = [chunk.samples.size for chunk in all_chunks(sound[:5200], max_seconds=0.2)]
    assert short == [3200, 2000]
    # What is left at the end is too short for a word.
    assert len(list(all_chunks(sound[: 3200 + 1599], max_seconds=0.2))) == 1


def test_pytorch_keeps_its_threads(speech) -> None:
    before = torch.get_num_threads()
    vad._detector.cache_clear()
    list(speech_chunks(speech[:16_000]))
    assert torch.get_num_threads() == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    vad._detector.cache_clear()
    with pytest.raises(MissingPackage, match=r"whisper-flash-attention\[vad\]"):
        list(speech_chunks(np.zeros(16_000, np.float32)))
