"""Files that processes decode, short and long ones, through every method of `Transcriber`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.audio.encoding import write_wave
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import transcriber as module

ONCE = DecodeOptions(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def paths(bundled_recordings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """3 s of speech, and 33 s of which the last seconds are speech."""
    speech = (load_audio(bundled_recordings[0].path) * 32_767).astype(np.int16)
    folder = tmp_path_factory.mktemp("files")
    long = np.zeros(33 * 16_000, np.int16)
    long[-48_000:] = long[:48_000] = speech[:48_000]
    write_wave(folder / "short.wav", speech[None, :48_000], 16_000)
    write_wave(folder / "long.wav", long[None], 16_000)
    return [folder / "short.wav", folder / "long.wav"]


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are decoded by processes; those of more than 30 s stay in their files."""
    opener = partial(AudioOpener, least_bytes=0, held_seconds=30.0, long_seconds=0.0)
    monkeypatch.setattr(module, "AudioOpener", opener)


@pytest.mark.usefixtures("in_processes")
def test_files_give_the_text_of_their_samples(transcriber, paths) -> None:
    wanted = [transcriber.transcribe(load_audio(path), options=ONCE).text for path in paths]
    assert all("Dashwood" in text for text in wanted)
    found = transcriber.transcribe(paths, options=ONCE)
    assert [each.text for each in found] == wanted
    assert [each.seconds for each in found] == [3.0, 33.0]
    each = dict(transcriber.transcribe_each(paths, options=ONCE))
    assert [each[index].text for index in (0, 1)] == wanted
    segments = transcriber.stream(paths[1], options=ONCE)
    assert [each.text for each in segments] == [each.text for each in found[1].segments]


@pytest.mark.usefixtures("in_processes")
def test_a_file_that_cannot_be_decoded_is_named(transcriber, paths, tmp_path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(AudioError, match=r"text\.wav: is not a recording"):
        transcriber.transcribe([*paths, tmp_path / "text.wav"], options=ONCE)


@pytest.mark.usefixtures("in_processes")
def test_the_others_go_on_after_a_file_that_cannot_be_opened(transcriber, paths, tmp_path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    several = [tmp_path / "text.wav", paths[0], tmp_path / "nowhere.wav"]
    failed: dict[int, AudioError] = {}
    found = dict(transcriber.transcribe_each(several, options=ONCE, on_error=failed.__setitem__))
    assert list(found) == [1] and "Dashwood" in found[1].text
    assert "is not a recording" in str(failed.pop(0))
    assert "nowhere.wav" in str(failed.pop(2)) and not failed
