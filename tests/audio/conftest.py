"""One clip of speech, as samples and in other formats."""

from __future__ import annotations

import pytest

from tests.audio.encoding import Samples, encode, read_wave
from whisper_flash_attention.audio import bundled_recordings


@pytest.fixture(scope="session")
def speech() -> Samples:
    return read_wave(bundled_recordings()[0].path)  # 7.1 s


@pytest.fixture(scope="session")
def mp3(speech: Samples, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mp3") / "speech.mp3"
    return encode(path, speech, codec="mp3", rate=44_100, layout="stereo").read_bytes()


@pytest.fixture(scope="session")
def m4a(speech: Samples, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("m4a") / "speech.m4a"
    return encode(path, speech, codec="aac", rate=44_100, layout="stereo").read_bytes()
