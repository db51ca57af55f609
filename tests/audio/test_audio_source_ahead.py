"""Decoding ahead in threads: order, bounds, errors, and an end before the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audio.encoding import write_wave
from whisper_flash_attention.audio import audio_source as module
from whisper_flash_attention.audio import bundled_recordings, load_audio
from whisper_flash_attention.audio.audio_source import AudioInput, open_ahead
from whisper_flash_attention.audio.container import Source
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.errors import AudioError, OptionError


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    return [recording.path for recording in bundled_recordings()]


class Decoder:
    """Stands in for `stream_audio`: blocks of a number each, how many are at work, how far."""

    def __init__(self, blocks: int = 1) -> None:
        self.blocks, self.lock = blocks, threading.Lock()
        self.started = self.most_at_once = self.at_work = self.blocks_given = 0

    def __call__(self, source: Any, **_: Any) -> Iterator[Samples]:
        with self.lock:
            self.started += 1
            self.at_work += 1
            self.most_at_once = max(self.most_at_once, self.at_work)
        for _ in range(self.blocks):
            time.sleep(0.002)
            self.blocks_given += 1
            yield np.full(1, float(str(source)), np.float32)
        with self.lock:
            self.at_work -= 1


def numbers(count: int) -> list[Source]:
    return [str(number) for number in range(count)]


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("open_ahead")]


@pytest.mark.parametrize(("workers", "ahead"), [(None, None), (1, 1), (3, 1), (2, 7)])
def test_recordings_come_in_their_order_as_load_audio_gives_them(
    paths: list[Path], workers: int | None, ahead: int | None
) -> None:
    found = list(open_ahead(map(AudioInput, paths * 2), workers=workers, ahead=ahead))
    assert [each.input.audio for each in found] == paths * 2
    for each in found:
        assert each.error is None
        assert each.audio is not None
        np.testing.assert_array_equal(each.audio.samples, load_audio(str(each.input.audio)))
    assert not threads()


def test_a_recording_that_takes_long_holds_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_first(source: Any, **_: Any) -> Iterator[Samples]:
        time.sleep(0.05 if source == "0" else 0.0)
        yield np.full(1, float(str(source)), np.float32)

    monkeypatch.setattr(module, "stream_audio", slow_first)
    assert [
        each.input.audio for each in open_ahead(map(AudioInput, numbers(9)), workers=4)
    ] == numbers(9)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_number_of_recordings_in_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    decoder = Decoder()
    monkeypatch.setattr(module, "stream_audio", decoder)
    for place, _ in enumerate(open_ahead(map(AudioInput, numbers(12)), workers=3, ahead=ahead)):
        time.sleep(0.01)
        assert decoder.started <= place + ahead
    assert decoder.started == 12
    assert decoder.most_at_once <= min(3, ahead)


def test_sources_are_taken_as_they_are_needed(paths: list[Path]) -> None:
    taken = []

    def endless() -> Iterator[Source]:
        while True:
            taken.append(1)
            yield paths[4]

    loading = open_ahead(map(AudioInput, endless()), workers=1, ahead=2)
    assert not taken
    next(loading)
    next(loading)
    assert len(taken) <= 3
    loading.close()


def test_a_bad_file_gives_its_error_and_the_others_go_on(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    sources: list[Source] = [tmp_path / "no.wav", paths[0], tmp_path / "empty.wav", paths[1], b"?"]
    found = list(open_ahead(map(AudioInput, sources)))
    assert [each.error is None for each in found] == [False, True, False, True, False]
    assert [each.audio is None for each in found] == [True, False, True, False, True]
    assert str(found[0].error) == f"{tmp_path / 'no.wav'}: there is no such file"
    assert str(found[2].error) == f"{tmp_path / 'empty.wav'}: the file is empty (0 bytes)"
    assert isinstance(found[4].error, AudioError)


def test_a_long_recording_stays_in_its_file(tmp_path: Path, paths: list[Path]) -> None:
    silence = np.zeros((1, 601 * 8000), np.int16)
    write_wave(tmp_path / "long.wav", silence, 8000)
    long, short = open_ahead(map(AudioInput, [tmp_path / "long.wav", paths[0]]))
    assert long.audio is not None and long.audio.samples is None
    assert sum(block.size for block in long.audio.blocks()) == 601 * 16_000
    assert short.audio is not None and short.audio.samples is not None


def test_closing_early_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(blocks=100_000)
    monkeypatch.setattr(
        module,
        "stream_audio",
        lambda source, **_: (
            iter([np.zeros(1, np.float32)]) if str(source) == "0" else decoder(source)
        ),
    )
    loading = open_ahead(map(AudioInput, numbers(50)), workers=2, ahead=8)
    next(loading)
    assert threads()
    loading.close()
    assert not threads()
    assert decoder.started <= 2
    given = decoder.blocks_given
    time.sleep(0.02)
    assert decoder.blocks_given == given < 10_000


def test_any_other_error_is_raised_and_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Any, **_: Any) -> Iterator[Samples]:
        raise ZeroDivisionError("not the recording's fault")

    monkeypatch.setattr(module, "stream_audio", broken)
    with pytest.raises(ZeroDivisionError):
        list(open_ahead(map(AudioInput, numbers(5))))
    assert not threads()


def test_nothing_gives_nothing() -> None:
    assert list(open_ahead([])) == []
    assert not threads()


@pytest.mark.parametrize("name", ["workers", "ahead"])
def test_numbers_below_one_are_refused_at_once(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be at least 1, got 0"):
        open_ahead([], **{name: 0})
