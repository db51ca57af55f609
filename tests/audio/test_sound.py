"""Recordings that are held, and those that stay in their files."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.audio.encoding import write_wave
from whisper_flash_attention.audio import bundled_recordings, load_audio
from whisper_flash_attention.audio.long_speech import cut as chunks_between
from whisper_flash_attention.audio.sound import Sound, open_sound
from whisper_flash_attention.audio.vad import Span
from whisper_flash_attention.errors import AudioError


@pytest.fixture(scope="module")
def long_wave(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 s of noise at 8 kHz."""
    path = tmp_path_factory.mktemp("sound") / "long.wav"
    noise = np.random.default_rng(0).integers(-9000, 9000, 65 * 8000)
    write_wave(path, noise[None].astype(np.int16), 8000)
    return path


def test_what_is_short_is_held(long_wave: Path) -> None:
    found = open_sound(long_wave)
    np.testing.assert_array_equal(found.samples, load_audio(long_wave))
    assert found.seconds == 65
    blocks = list(found.blocks(20))
    assert [block.size for block in blocks] == [320_000] * 3 + [80_000]
    np.testing.assert_array_equal(np.concatenate(blocks), found.samples)


@pytest.mark.parametrize("kind", ["path", "bytes", "file"])
def test_what_is_long_is_read_again_and_again(long_wave: Path, kind: str) -> None:
    source = {
        "path": lambda: str(long_wave),
        "bytes": long_wave.read_bytes,
        "file": lambda: long_wave.open("rb"),
    }[kind]()
    found = open_sound(source, held_seconds=40)
    assert found.samples is None and found.seconds is None
    whole = load_audio(long_wave)
    for seconds in (30, 7):
        np.testing.assert_array_equal(np.concatenate([*found.blocks(seconds)]), whole)
    if not isinstance(source, str | bytes):
        source.close()


def test_a_pipe_is_copied_and_read_again_and_again(long_wave: Path) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as end:
            end.write(long_wave.read_bytes())

    thread = threading.Thread(target=write)
    thread.start()
    with open(reading, "rb") as file:
        found = open_sound(file, held_seconds=40)
    thread.join()
    whole = load_audio(long_wave)
    for seconds in (30, 7):
        np.testing.assert_array_equal(np.concatenate([*found.blocks(seconds)]), whole)


def test_less_than_a_window_is_always_held() -> None:
    clip = bundled_recordings()[0].path
    assert open_sound(clip, held_seconds=1).samples is not None


def test_errors_and_names(tmp_path: Path) -> None:
    missing = tmp_path / "missing.wav"
    with pytest.raises(AudioError, match=r"missing\.wav: there is no such file"):
        open_sound(missing)
    assert Sound(source=missing).name == str(missing)
    assert Sound(np.zeros(1, np.float32)).name == "<samples>"


def test_a_damaged_recording_is_told_of_once(
    long_wave: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = tmp_path / "cut.wav"
    cut.write_bytes(long_wave.read_bytes()[:-100_000])
    found = open_sound(cut, held_seconds=30)
    with caplog.at_level(logging.WARNING):
        size = sum(block.size for block in found.blocks())
        assert caplog.text.count("is damaged or cut off") == 1
        [chunk] = chunks_between(found, [Span(size - 1000, size)])
    assert chunk.samples.size == 1000
    assert caplog.text.count("is damaged or cut off") == 1
