"""Speech found by Silero's detector, in chunks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from whisper_flash_attention.audio import load_audio, voice
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.threads import one_core
from whisper_flash_attention.audio.vad import (
    Chunk,
    chunk_spans,
    cut_all,
    find_speech,
    find_stretches,
)
from whisper_flash_attention.errors import MissingPackage
from whisper_flash_attention.options import VadOptions


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> np.ndarray:
    return np.concatenate([load_audio(recording.path) for recording in bundled_recordings])


def speech_chunks(samples: np.ndarray, **options: object) -> list[Chunk]:
    seconds, chunks = find_speech(AudioSource(samples), **options)  # type: ignore[arg-type]
    assert seconds == samples.size / 16_000
    return list(chunks)


def all_chunks(samples: np.ndarray) -> list[Chunk]:
    return list(cut_all(AudioSource(samples))[1])


def test_chunks_hold_the_speech_and_leave_out_the_silence(speech) -> None:
    silence = np.zeros(8 * 16_000, np.float32)
    recording = np.concatenate([silence, speech, silence, speech, silence])
    chunks = speech_chunks(recording)
    assert all(chunk.seconds <= 27 for chunk in chunks)
    covered = sum(chunk.seconds for chunk in chunks)
    assert 0.85 * 2 * speech.size / 16_000 < covered < 2 * speech.size / 16_000 + 9
    for chunk in chunks:
        begin = round(chunk.start * 16_000)
        assert np.array_equal(chunk.samples, recording[begin : begin + chunk.samples.size])
    starts = [chunk.start for chunk in chunks]
    assert starts == sorted(starts) and 7 < starts[0] < 9


def test_threads_find_the_same_speech(speech) -> None:
    recording = np.tile(speech, 4)  # of more than one block
    wanted = speech_chunks(recording)
    for source in (AudioSource(recording), AudioSource(reader=lambda: iter([recording]))):
        seconds, chunks = find_speech(source, threads=3)
        assert seconds == recording.size / 16_000
        for found, each in zip(chunks, wanted, strict=True):
            assert (found.start, found.speech) == (each.start, each.speech)
            assert np.array_equal(found.samples, each.samples)
        assert find_stretches(source, threads=2) == find_stretches(source)


def test_chunks_are_as_long_as_they_may_be(speech) -> None:
    many = speech_chunks(np.tile(speech, 2), max_seconds=8)
    assert all(chunk.seconds <= 8 for chunk in many)
    few = speech_chunks(np.tile(speech, 2))
    assert len(few) < len(many)
    assert all(chunk.seconds > 15 for chunk in few[:-1])


def test_nobody_speaks_in_silence() -> None:
    assert speech_chunks(np.zeros(16_000, np.float32)) == []


def test_all_of_a_recording_is_in_chunks_that_are_cut_in_quiet_places() -> None:
    sound = np.random.default_rng(0).standard_normal(100 * 16_000).astype(np.float32) * 0.1
    for pause in (12, 25.5, 40, 51, 69, 70.2):
        sound[round(pause * 16_000) :][:6400] *= 0.01
    chunks = all_chunks(sound)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), sound)
    cuts = [chunk.start for chunk in chunks[1:]]
    assert cuts == pytest.approx([25.7, 51.2, 76.7], abs=1.6) and len(cuts) == 3
    assert cuts[:2] == pytest.approx([25.7, 51.2], abs=0.1)
    assert all(chunk.seconds <= 27 for chunk in chunks[:-1]) and chunks[-1].seconds <= 30
    whole = all_chunks(sound[: 30 * 16_000])
    assert [chunk.seconds for chunk in whole] == [30]


def test_digital_silence_is_in_no_chunk() -> None:
    sound = np.zeros(110 * 16_000, np.float32)
    sound[: 3 * 16_000] = 0.25 * np.sin(np.arange(48_000, dtype=np.float32))
    sound[100 * 16_000 + 7] = 0.26  # a click that a look at a few samples misses
    chunks = all_chunks(sound)
    assert len(chunks) == 2 and chunks[0].start == 0
    assert chunks[1].start < 100 < chunks[1].end
    # What is too short for a word is no sound.
    assert [c.samples.size for c in all_chunks(sound[:1600])] == [1600]
    assert all_chunks(sound[:1599]) == []


def test_speech_is_known_within_chunks(speech) -> None:
    silence = np.zeros(2 * 16_000, np.float32)
    [chunk] = speech_chunks(np.concatenate([silence, speech[: 6 * 16_000], silence]))
    first, last = chunk.speech[0][0], chunk.speech[-1][1]
    assert chunk.start + 0.15 < first < 3 and 7 < last <= chunk.end - 0.15
    assert not chunk.has_speech(0, 2, 0.1)
    assert chunk.has_speech(2, 8, 3) and not chunk.has_speech(0, 10, 6.5)
    part = chunk.part(first + 1, first + 2, is_doubtful=True)
    assert part.seconds == pytest.approx(1, abs=1e-3) and part.is_doubtful
    assert part.speech[0][0] >= part.start and part.speech[-1][1] <= part.end


@pytest.mark.parametrize(
    ("chance", "level", "is_read"),
    [(0.3, -25, True), (0.3, -55, False), (0.05, -25, False)],
    ids=["missed speech", "faint", "music"],
)
def test_sound_between_chunks_of_speech_may_be_read(chance, level, is_read) -> None:
    """20 s: speech of 5 s, noise, sound from 9 to 12 s, noise, speech of 5 s."""
    frames = 625
    probabilities, levels = np.zeros(frames, np.float32), np.full(frames, -70, np.float32)
    for part in (slice(0, 156), slice(469, 625)):
        probabilities[part], levels[part] = 0.9, -20
    probabilities[281:375], levels[281:375] = chance, level

    def between(first: int, end: int) -> np.ndarray:
        return levels[first:end]

    spans = chunk_spans(frames * 512, probabilities, between, max_seconds=10)
    assert [span.is_doubtful for span in spans] == [False, *[True] * is_read, False]
    if is_read:
        assert spans[1].begin / 16_000 == pytest.approx(8.8, abs=0.1)
        assert spans[1].end / 16_000 == pytest.approx(12.2, abs=0.1)
        assert spans[1].speech == ((281 * 512, 375 * 512),)
    # Without any speech there is nothing to be as loud as.
    assert chunk_spans(frames * 512, 0.1 * probabilities, between) == []


def test_nothing_is_read_in_noise() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(6 * 16_000) / 16_000
    white = rng.standard_normal(times.size)
    brown = np.cumsum(white) / 300
    for wave in (0.5 * white, 0.01 * white, brown, 0.2 * np.sin(314 * times)):
        swelling = wave * (np.sin(2 * np.pi * times / 3) > 0.3)
        for sound in (wave, swelling):
            assert speech_chunks(sound.astype(np.float32)) == []


def test_the_detector_takes_its_parameters(speech) -> None:
    def stretches(**parameters: float) -> list[tuple[float, float]]:
        found = find_stretches(AudioSource(speech), VadOptions(**parameters))
        return [(round(a, 2), round(b, 2)) for a, b in found]

    usual = stretches()
    assert len(stretches(min_silence_duration_ms=100)) > len(usual)
    assert stretches(threshold=0.99)[0][0] >= usual[0][0]
    assert stretches(threshold=0.99) != usual
    assert stretches(speech_pad_ms=0)[0][0] > usual[0][0]
    longest = max(b - a for a, b in stretches(max_speech_duration_s=4, speech_pad_ms=0))
    assert longest < 4.5
    assert stretches(min_speech_duration_ms=60_000) == []
    few = [chunk.seconds for chunk in speech_chunks(speech)]
    many = speech_chunks(speech, options=VadOptions(max_speech_duration_s=6))
    assert len(many) > len(few) and all(chunk.seconds <= 6.4 for chunk in many)


def test_pytorch_keeps_its_threads_and_random_numbers(speech) -> None:
    before, numbers = torch.get_num_threads(), torch.random.get_rng_state()
    voice._detector.cache_clear()
    voice._recurrent_layer.cache_clear()
    with one_core():
        assert torch.get_num_threads() == 1
        speech_chunks(speech[:16_000])
    assert torch.get_num_threads() == before
    assert torch.equal(torch.random.get_rng_state(), numbers)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    voice._detector.cache_clear()
    with pytest.raises(MissingPackage, match=r"whisper-flash-attention\[vad\]"):
        speech_chunks(np.zeros(16_000, np.float32))
