"""Silence, noise, music, snippets, telephone and stereo sound, and files that are damaged."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.audio.encoding import encode, read_wave, write_wave
from tests.transcribe.test_transcriber import assert_in_order, word_error_rate
from whisper_flash_attention.errors import AudioError

RATE = 16_000
Samples = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def clip(bundled_recordings):
    return bundled_recordings[4]  # 3.3 s that tiny.en transcribes without an error


def noise(seconds: float, level: float) -> Samples:
    generator = np.random.default_rng(0)
    return (generator.standard_normal(round(seconds * RATE)) * level).astype(np.float32)


def dither(seconds: float) -> Samples:
    """What is left of silence that was rounded to 16 bits with dither."""
    generator = np.random.default_rng(0)
    steps = (generator.uniform(-1, 1, (2, round(seconds * RATE)))).sum(axis=0).round()
    return (steps / 32768).astype(np.float32)


def chords(seconds: int) -> Samples:
    """A progression of plucked chords, two seconds each."""
    time = np.arange(2 * RATE) / RATE
    found = []
    for root in (261.6, 220.0, 174.6, 196.0) * seconds:
        tones = [np.sin(2 * np.pi * root * ratio * time) for ratio in (1, 1.26, 1.5, 2)]
        found.append(np.sum(tones, axis=0) * np.exp(-time) / 8)
    return np.concatenate(found)[: seconds * RATE].astype(np.float32)


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(1600, np.float32),
        np.zeros(5 * RATE, np.float32),
        np.zeros(65 * RATE, np.float32),
        np.full(5 * RATE, 0.05, np.float32),
        dither(5),
        dither(40),
    ],
    ids=["0.1 s", "5 s", "65 s", "a constant", "dithered, 5 s", "dithered, 40 s"],
)
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_silence_has_no_text(transcriber, samples: Samples, mode: str) -> None:
    found = transcriber.transcribe(samples, mode=mode)
    assert found.text == "" and found.segments == ()
    assert found.seconds == samples.size / RATE


def test_a_file_of_silence_has_no_text(transcriber, tmp_path: Path) -> None:
    silence = np.zeros(4 * RATE, np.int16)
    path = encode(tmp_path / "s.mp3", silence, codec="mp3", rate=44_100, layout="stereo")
    assert transcriber.transcribe(path).text == ""


def test_speech_that_is_hardly_audible_is_transcribed(transcriber, clip) -> None:
    samples = read_wave(clip.path) / np.float32(32768)
    found = transcriber.transcribe(samples * np.float32(0.005))
    assert word_error_rate(clip.transcript, found.text) < 0.3


@pytest.mark.parametrize("level", [0.002, 0.05])
def test_noise_has_no_text(transcriber, level: float) -> None:
    torch.manual_seed(0)
    assert transcriber.transcribe(noise(10, level)).text == ""
    assert transcriber.transcribe(noise(10, level), mode="batched").text == ""


def test_music_is_hardly_taken_for_speech(transcriber) -> None:
    torch.manual_seed(0)
    found = transcriber.transcribe(chords(12))
    assert_in_order(found)
    assert len(found.text.split()) < 6
    assert transcriber.transcribe(chords(12), mode="batched").text == ""


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_sound_that_the_model_can_describe_has_no_text(transcriber, mode: str) -> None:
    tone = (0.2 * np.sin(2 * np.pi * 440 * np.arange(10 * RATE) / RATE)).astype(np.float32)
    options = {"mode": mode, "vad_filter": False, "temperature": 0.0}
    assert transcriber.transcribe(tone, **options).text == ""
    assert transcriber.transcribe(tone, **options, check_speech=False).text != ""


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_words_leave_out_the_pauses_beside_them(transcriber, clip, mode: str) -> None:
    speech = read_wave(clip.path) / np.float32(32768)
    samples = np.concatenate([np.zeros(2 * RATE, np.float32), speech, np.zeros(2 * RATE)])
    found = transcriber.transcribe(
        samples.astype(np.float32), mode=mode, vad_filter=False, word_timestamps=True
    )
    [segment] = found.segments
    assert segment.start == segment.words[0].start == pytest.approx(2.0, abs=0.3)
    assert segment.end == segment.words[-1].end == pytest.approx(2 + clip.seconds, abs=0.4)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_tenth_of_a_second_is_at_most_a_word(transcriber, clip, mode: str) -> None:
    torch.manual_seed(0)
    speech = read_wave(clip.path)[RATE : RATE + 1600] / np.float32(32768)
    for samples in (speech, noise(0.1, 0.05)):
        found = transcriber.transcribe(samples, mode=mode, word_timestamps=True)
        assert found.seconds == 0.1
        assert_in_order(found)
        assert len(found.segments) <= 1 and len(found.text) < 40


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_telephone_and_stereo_sound_become_the_same_words(
    transcriber, clip, tmp_path: Path, mode: str
) -> None:
    samples = read_wave(clip.path)
    telephone = encode(tmp_path / "t.wav", samples, codec="pcm_s16le", rate=8000, layout="mono")
    write_wave(tmp_path / "s.wav", np.stack([samples, np.zeros_like(samples)]), RATE)
    for path in (telephone, tmp_path / "s.wav"):
        found = transcriber.transcribe(path, mode=mode)
        assert word_error_rate(clip.transcript, found.text) < 0.15
        assert found.seconds == pytest.approx(clip.seconds, abs=0.01)


def test_what_is_left_of_a_damaged_recording_is_transcribed_with_a_warning(
    transcriber, bundled_recordings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = bundled_recordings[0]
    path = encode(
        tmp_path / "whole.mp3", read_wave(clip.path), codec="mp3", rate=44_100, layout="stereo"
    )
    content = path.read_bytes()
    whole = transcriber.transcribe(path)
    cut, garbled = tmp_path / "cut.mp3", tmp_path / "garbled.mp3"
    cut.write_bytes(content[: len(content) // 2])
    middle = slice(len(content) * 6 // 10, len(content) * 7 // 10)
    noisy = random.Random(0).randbytes(middle.stop - middle.start)
    garbled.write_bytes(content[: middle.start] + noisy + content[middle.stop :])
    for damaged, least in ((cut, 0.4), (garbled, 0.7)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = transcriber.transcribe(damaged)
        assert found.text.split()[:5] == whole.text.split()[:5]
        assert least * whole.seconds < found.seconds < whole.seconds
        [warning] = [each.getMessage() for each in caplog.records if "damaged" in each.getMessage()]
        assert warning.startswith(f"{damaged}: is damaged or cut off")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"This is not a recording.\n" * 40, "is not a recording that can be read"),
        (b"\xff\xfb\x90\x00" + random.Random(0).randbytes(5000), r"broken\.mp3: "),
    ],
    ids=["empty", "text", "garbage after the beginning of an mp3"],
)
def test_what_is_no_recording_is_one_clear_error(
    transcriber, tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "broken.mp3"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=reason) as caught:
        transcriber.transcribe(path)
    assert "\n" not in str(caught.value)
