"""Opening recordings ahead: order, bounds, errors, an end before the end; threads or processes."""

from __future__ import annotations

import gc
import io
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audio import faulty_decoders
from tests.audio.encoding import write_silence, write_wave
from whisper_flash_attention.audio import audio_source as module
from whisper_flash_attention.audio import bundled_recordings, load_audio
from whisper_flash_attention.audio import opener as opener_module
from whisper_flash_attention.audio.audio_source import AudioInput, AudioSource, ChannelSources
from whisper_flash_attention.audio.container import Shared, Source
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import THREADS, AudioOpener, OpenedAudio
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.errors import AudioError, DecoderError, OptionError


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


@pytest.fixture(autouse=True)
def earlier() -> Iterator[None]:
    """Leave out threads of other tests, whose generators Python has not collected yet."""
    EARLIER.update(each.ident for each in threading.enumerate())
    yield
    EARLIER.clear()


EARLIER: set[int | None] = set()


def threads() -> list[str]:
    """The openers' threads that began in this test."""
    running = (each for each in threading.enumerate() if each.ident not in EARLIER)
    return [each.name for each in running if each.name.startswith("opener")]


def opened(sources: Iterable[Any], *, ahead: int = 256, **options: Any) -> list[OpenedAudio]:
    with AudioOpener(**options) as opener:
        return list(opener.open_each(map(AudioInput, sources), ahead=ahead))


@pytest.mark.parametrize("ahead", [1, 7, 256])
@pytest.mark.parametrize("least_bytes", [0, 1 << 40], ids=["processes", "threads"])
def test_recordings_come_in_their_order_as_load_audio_gives_them(
    paths: list[Path], ahead: int, least_bytes: int
) -> None:
    found = opened(paths * 2, ahead=ahead, least_bytes=least_bytes)
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
    assert [each.input.audio for each in opened(numbers(9))] == numbers(9)  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_number_of_recordings_in_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    decoder = Decoder()
    monkeypatch.setattr(module, "stream_audio", decoder)
    with AudioOpener() as opener:
        for place, _ in enumerate(opener.open_each(map(AudioInput, numbers(12)), ahead=ahead)):
            time.sleep(0.01)
            assert decoder.started <= place + min(ahead, THREADS + 1)
    assert decoder.started == 12
    assert decoder.most_at_once <= min(THREADS, ahead)


def test_sources_are_taken_as_they_are_needed(paths: list[Path]) -> None:
    taken = []

    def endless() -> Iterator[Source]:
        while True:
            taken.append(1)
            yield paths[4]

    with AudioOpener() as opener:
        loading = opener.open_each(map(AudioInput, endless()), ahead=2)
        assert not taken
        next(loading)
        next(loading)
        assert len(taken) <= 3
        loading.close()


def test_nothing_beyond_samples_is_taken_before_their_turn(paths: list[Path]) -> None:
    taken = []

    def mixed() -> Iterator[Any]:
        for each in (paths[0], np.zeros(16_000, np.float32), paths[1], paths[2]):
            taken.append(each)
            yield each

    with AudioOpener() as opener, closing(opener.open_each(map(AudioInput, mixed()))) as loading:
        next(loading)
        assert len(taken) == 2
        assert next(loading).result().seconds == 1.0
        assert len(taken) == 2
        next(loading)
        assert len(taken) == 4


@pytest.mark.parametrize("least_bytes", [0, 1 << 40], ids=["processes", "threads"])
def test_a_bad_file_gives_its_error_and_the_others_go_on(
    paths: list[Path], tmp_path: Path, least_bytes: int
) -> None:
    (tmp_path / "empty.wav").touch()
    sources: list[Source] = [tmp_path / "no.wav", paths[0], tmp_path / "empty.wav", paths[1], b"?"]
    found = opened(sources, least_bytes=least_bytes)
    assert [each.error is None for each in found] == [False, True, False, True, False]
    assert [each.audio is None for each in found] == [True, False, True, False, True]
    assert str(found[0].error) == f"{tmp_path / 'no.wav'}: there is no such file"
    assert str(found[2].error) == f"{tmp_path / 'empty.wav'}: the file is empty (0 bytes)"
    assert isinstance(found[4].error, AudioError)


@pytest.mark.parametrize("least_bytes", [0, 1 << 40], ids=["processes", "threads"])
def test_a_long_recording_stays_in_its_file(
    tmp_path: Path, paths: list[Path], least_bytes: int
) -> None:
    speech = load_audio(paths[0], 8_000)
    samples = np.resize((speech * 32_767).astype(np.int16), (2, 100 * 8_000))
    samples[1, 8_000:] = 0
    write_wave(tmp_path / "long.wav", samples, 8_000)
    inputs = [AudioInput(tmp_path / "long.wav", "each"), AudioInput(paths[0])]
    with AudioOpener(held_seconds=60.0, long_seconds=0.0, least_bytes=least_bytes) as opener:
        long, short = (each.result() for each in opener.open_each(inputs))
        assert isinstance(short, AudioSource) and short.samples is not None
        assert isinstance(long, ChannelSources) and long.seconds is None
        for number, source in enumerate(long.sources, 1):
            assert source.samples is None and source.name == str(tmp_path / "long.wav")
            whole = load_audio(tmp_path / "long.wav", channel=number)
            for seconds in (30.0, 7.0):
                blocks = list(source.blocks(seconds))
                assert [each.size for each in blocks[:-1]] == [seconds * 16_000] * (len(blocks) - 1)
                np.testing.assert_array_equal(np.concatenate(blocks), whole)


@pytest.mark.parametrize("least_bytes", [0, 1 << 40], ids=["processes", "threads"])
def test_long_recordings_are_decoded_once_where_memory_has_room(
    tmp_path: Path, least_bytes: int
) -> None:
    """Room for one of 100 s; the next stays in its file, and one after the first is gone fits."""
    paths = [write_silence(tmp_path / f"{number}.wav", 100) for number in range(3)]
    with AudioOpener(held_seconds=60.0, long_seconds=200.0, least_bytes=least_bytes) as opener:
        opening = opener.open_each(map(AudioInput, paths), ahead=1)
        for is_held in (True, False, True):
            source = next(opening).result()
            assert isinstance(source, AudioSource)
            blocks = list(source.blocks())
            assert [each.size // 16_000 for each in blocks] == [30, 30, 30, 10]
            Path(source.name).unlink()
            if is_held:
                whole = np.concatenate(blocks)
                blocks[0][:] = 0.5  # the reader's own
                np.testing.assert_array_equal(source.whole(), whole)
                first = source
            else:
                with pytest.raises(AudioError, match="there is no such file"):
                    source.whole()
                del first
                gc.collect()


def test_a_recording_that_is_longer_than_its_container_states_is_not_held(tmp_path: Path) -> None:
    budget = module.SampleBudget(120.0)
    held = module.HeldBlocks(write_silence(tmp_path / "40.wav", 40), 30.0, budget)
    minute = np.zeros(60 * 16_000, np.float32)
    assert [held.add(minute), held.add(minute)] == [True, False]
    assert held.size == 0 and not list(held())
    whole = write_silence(tmp_path / "90.wav", 90)
    assert budget.take(module.stated_size(whole)) == 0
    del held
    assert budget.take(module.stated_size(whole)) == 120 * 16_000


def test_bytes_and_open_files_of_known_size_are_decoded_in_processes(
    tmp_path: Path, paths: list[Path]
) -> None:
    long = write_silence(tmp_path / "long.wav", 100)
    shared = Shared(io.BytesIO(paths[1].read_bytes()), "upload.flac")
    sources = [paths[0].read_bytes(), shared, b"", long.read_bytes(), Shared(io.BytesIO(b"?"), "x")]
    with AudioOpener(DecoderPool(2), held_seconds=60.0, long_seconds=0.0, least_bytes=0) as opener:
        found = list(opener.open_each(map(AudioInput, sources)))
        first, second = (each.result() for each in found[:2])
        for audio, path in ((first, paths[0]), (second, paths[1])):
            assert isinstance(audio, AudioSource)
            np.testing.assert_array_equal(audio.samples, load_audio(path))
        assert str(found[2].error) == "<bytes>: the file is empty (0 bytes)"
        assert str(found[4].error).startswith("x: ")
        left = found[3].result()
        assert isinstance(left, AudioSource) and left.samples is None and left.name == "<bytes>"
        for _ in range(2):
            assert sum(map(len, left.blocks())) == 100 * 16_000
    assert not threads()


def test_many_long_recordings_are_read_side_by_side(tmp_path: Path) -> None:
    """More than there are processes: the first reading of each is in a process in any case."""
    paths = [write_silence(tmp_path / f"{number}.wav", 100) for number in range(4)]
    with AudioOpener(DecoderPool(1), held_seconds=30.0, long_seconds=0.0, least_bytes=0) as opener:
        found = [each.result() for each in opener.open_each(map(AudioInput, paths))]
        sources = [each for each in found if isinstance(each, AudioSource)]
        for _ in range(2):
            readings = [each.blocks() for each in sources]
            firsts = [next(each).size for each in readings]
            sizes = [
                first + sum(map(len, rest)) for first, rest in zip(firsts, readings, strict=True)
            ]
            assert sizes == [100 * 16_000] * 4


def test_what_waits_for_room_does_not_keep_a_reader_from_its_process(tmp_path: Path) -> None:
    paths = [
        write_silence(tmp_path / f"{number}.wav", 100 if number < 1 else 50) for number in range(6)
    ]
    with AudioOpener(DecoderPool(2), held_seconds=60.0, long_seconds=0.0, least_bytes=0) as opener:
        found = opener.open_each(map(AudioInput, paths), ahead_seconds=0.0)
        long = next(found).result()
        assert isinstance(long, AudioSource)
        assert sum(map(len, long.blocks())) == 100 * 16_000
        assert [each.result().seconds for each in found] == [50.0] * 5


@pytest.mark.parametrize("name", ["segfault", "waits"])
def test_a_decoder_that_crashes_or_hangs_costs_one_recording(
    tmp_path: Path, paths: list[Path], name: str
) -> None:
    fault = shutil.copy(paths[0], tmp_path / f"{name}.wav")
    pool = DecoderPool(1, timeout=1.0, decode=faulty_decoders.NAME)
    with AudioOpener(pool, least_bytes=0) as opener:
        found = list(opener.open_each(map(AudioInput, [paths[0], fault, paths[1]])))
    assert [each.error is None for each in found] == [True, False, True]
    assert isinstance(found[1].error, AudioError)


def test_files_are_decoded_in_processes_from_some_bytes_on(paths: list[Path]) -> None:
    size = paths[0].stat().st_size
    for count, used in ((2, False), (3, True)):
        with AudioOpener(least_bytes=3 * size) as opener:
            found = list(opener.open_each(map(AudioInput, paths[:1] * count)))
            assert (opener._pool is not None) is used
        assert all(each.error is None for each in found)


def test_closing_early_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(blocks=100_000)
    monkeypatch.setattr(
        module,
        "stream_audio",
        lambda source, **_: (
            iter([np.zeros(1, np.float32)]) if str(source) == "0" else decoder(source)
        ),
    )
    with AudioOpener() as opener:
        next(opener.open_each(map(AudioInput, numbers(50))))
        assert threads()
    assert not threads()
    assert decoder.started <= THREADS
    given = decoder.blocks_given
    time.sleep(0.02)
    assert decoder.blocks_given == given < 10_000


def test_any_other_error_is_raised_and_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Any, **_: Any) -> Iterator[Samples]:
        raise TypeError("not the recording's fault")

    monkeypatch.setattr(module, "stream_audio", broken)
    with pytest.raises(TypeError, match="not the"):
        opened(numbers(5))
    assert not threads()


def test_nothing_gives_nothing() -> None:
    assert opened([]) == []
    assert not threads()


def test_misuse_is_refused_at_once() -> None:
    with AudioOpener() as opener:
        with pytest.raises(OptionError, match="ahead must be at least 1, got 0"):
            opener.open_each([], ahead=0)
        with pytest.raises(OptionError, match="ahead_seconds must be"):
            opener.open_each([], ahead_seconds=-1.0)


@pytest.mark.parametrize("least_bytes", [0, 1 << 40], ids=["processes", "threads"])
def test_a_closed_opener_opens_nothing(paths: list[Path], least_bytes: int) -> None:
    opener = AudioOpener(least_bytes=least_bytes)
    loading = opener.open_each(map(AudioInput, paths), ahead=1)
    next(loading)
    opener.close()
    opener.close()
    with pytest.raises(DecoderError, match="closed"):
        next(loading)
    with pytest.raises(DecoderError, match="closed"):
        next(opener.open_each([AudioInput(paths[0])]))


@pytest.mark.parametrize(
    ("name", "work"), [("a.wav", 10), ("A.FLAC", 10), ("a.mp3", 40), ("a", 40)]
)
def test_codecs_with_loss_take_longer(tmp_path: Path, name: str, work: int) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(10))
    assert opener_module._work(AudioInput(path)) == work
    assert opener_module._work(AudioInput(str(path))) == work
    assert opener_module._work(AudioInput(bytes(10))) == 10
