"""Long recordings are read in memory that does not grow with them, and as short ones are."""

from __future__ import annotations

import subprocess
import sys
import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.audio.encoding import read_wave, write_wave
from tests.conftest import REPOSITORY
from whisper_flash_attention.audio import audio_source, load_audio
from whisper_flash_attention.audio.audio_source import open_audio
from whisper_flash_attention.transcribe import Transcriber


def speech_at_8_khz(bundled_recordings, path: Path, minutes: int) -> Path:
    """Speech with pauses, over and over, `minutes` long."""
    parts = [read_wave(each.path)[::2] for each in bundled_recordings]
    pause = np.zeros(8000, np.int16)
    minute = np.concatenate([part for each in [*parts, *parts] for part in (each, pause)])
    minute = minute[: 60 * 8000].tobytes()
    assert len(minute) > 2 * 59 * 8000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        for _ in range(minutes):
            file.writeframes(minute)
    return path


def memory_of(path: Path, mode: str) -> tuple[float, float, int]:
    """Seconds of a recording, the most resident MB while it is transcribed, its segments."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.transcribe.memory_of_a_recording", str(path), mode],
        check=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    seconds, megabytes, segments = run.stdout.split()
    return float(seconds), float(megabytes), int(segments)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_three_hours_take_the_memory_of_a_quarter_of_one(
    tmp_path: Path, bundled_recordings, mode: str
) -> None:
    short = speech_at_8_khz(bundled_recordings, tmp_path / "short.wav", 15)
    long = speech_at_8_khz(bundled_recordings, tmp_path / "long.wav", 183)
    seconds, megabytes, segments = memory_of(long, mode)
    assert seconds > 3 * 3600
    assert segments > 300
    assert megabytes < memory_of(short, mode)[1] + 30


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_recording_in_its_file_is_read_as_its_samples_are(
    transcriber: Transcriber,
    bundled_recordings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    monkeypatch.setattr(audio_source, "open_audio", partial(open_audio, held_seconds=30))
    clip = read_wave(bundled_recordings[4].path)
    samples = np.zeros(34 * 16_000, np.int16)
    samples[: clip.size] = samples[-clip.size :] = clip
    write_wave(tmp_path / "long.wav", samples[None], 16_000)
    options = {"mode": mode, "temperature": 0.0, "max_new_tokens": 32}
    streamed = transcriber.transcribe(tmp_path / "long.wav", **options)
    held = transcriber.transcribe(load_audio(tmp_path / "long.wav"), **options)
    assert streamed == held
    assert streamed.seconds == 34 and streamed.segments[-1].end > 31
