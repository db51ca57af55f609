"""Decoding in processes: the samples of `load_audio`, and faults that cost one recording each."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.audio import faulty_decoders
from tests.audio.encoding import write_silence, write_wave
from tests.conftest import REPOSITORY
from whisper_flash_attention.audio import bundled_recordings, decoder_pool, load_audio
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.decoder_pool import (
    DecodeRequest,
    DecoderPool,
    default_workers,
)
from whisper_flash_attention.audio.decoder_process import SLOT_SAMPLES, SLOTS, SampleRing
from whisper_flash_attention.audio.opener import AudioOpener, OpenedAudio
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.errors import AudioError, DecoderError, OptionError

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def paths() -> list[str]:
    return [str(recording.path) for recording in bundled_recordings()]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """One process with the decoders that fail on certain names, for all tests that may share it."""
    with DecoderPool(1, timeout=30.0, decode=faulty_decoders.NAME) as pool:
        yield pool


@pytest.fixture
def hasty_pool() -> Iterator[DecoderPool]:
    with DecoderPool(1, timeout=1.0, decode=faulty_decoders.NAME) as pool:
        yield pool


@pytest.fixture
def named(tmp_path: Path, paths: list[str]) -> Callable[[str], str]:
    """Copies of a recording under names that are those of faults, or not."""

    def copy(name: str) -> str:
        return str(shutil.copy(paths[0], tmp_path / f"{name}.wav"))

    return copy


def each_of(
    pool: DecoderPool, requests: Iterable[DecodeRequest], **options: Any
) -> Iterator[OpenedAudio]:
    return AudioOpener(pool).open_each(requests, **options)


def decoded(pool: DecoderPool, sources: Sequence[str | Path], **options: Any) -> list[OpenedAudio]:
    return list(each_of(pool, map(DecodeRequest, sources), **options))


def samples_of(opened: OpenedAudio) -> Samples:
    audio = opened.result()
    assert isinstance(audio, AudioSource)
    return audio.whole()


def error_of(pool: DecoderPool, source: str) -> Exception:
    (found,) = decoded(pool, [source])
    assert found.audio is None
    assert found.error is not None
    return found.error


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def high_water(pid: int) -> float:
    """The most memory that a process had, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1_000
    raise AssertionError("there is no VmHWM")


@pytest.mark.parametrize(("workers", "ahead"), [(2, 256), (1, 1), (2, 3)])
def test_recordings_come_in_their_order_as_load_audio_gives_them(
    paths: list[str], workers: int, ahead: int
) -> None:
    with DecoderPool(workers) as pool:
        found = decoded(pool, paths * 2, ahead=ahead)
    assert [each.input for each in found] == list(map(DecodeRequest, paths * 2))
    for each, path in zip(found, paths * 2, strict=True):
        assert samples_of(each).flags.writeable
        np.testing.assert_array_equal(samples_of(each), load_audio(path))


def test_a_request_has_the_options_of_stream_audio(
    pool: DecoderPool, paths: list[str], tmp_path: Path
) -> None:
    whole = load_audio(paths[0], 8_000)
    part = DecodeRequest(paths[0], start=1.0, end=2.5, sampling_rate=8_000)
    (found,) = each_of(pool, [part])
    np.testing.assert_array_equal(samples_of(found), whole[8_000:20_000])

    ramps = np.stack([np.arange(1_600), -np.arange(1_600)]).astype(np.int16)
    path = tmp_path / "stereo.wav"
    write_wave(path, ramps, 16_000)
    right = DecodeRequest(str(path), channel=2)
    (found,) = each_of(pool, [right])
    np.testing.assert_array_equal(samples_of(found), load_audio(path, channel=2))
    for refused in (DecodeRequest(path, track=2), DecodeRequest(paths[0], most_seconds=1.0)):
        (found,) = each_of(pool, [refused])
        assert isinstance(found.error, AudioError)


def test_two_hundred_files(pool: DecoderPool, tmp_path: Path) -> None:
    sources = []
    for number in range(200):
        sources.append(str(tmp_path / f"{number}.wav"))
        write_wave(Path(sources[-1]), np.full((1, 160 + number), number, np.int16), 16_000)
    sizes = [samples_of(each).size for each in decoded(pool, sources)]
    assert sizes == [160 + number for number in range(200)]


def test_a_process_imports_no_more_than_decoding_needs(
    pool: DecoderPool, named: Callable[[str], str]
) -> None:
    modules = set(json.loads(str(error_of(pool, named("modules")))))
    assert {"av", "numpy"} <= modules
    heavy = {
        "torch",
        "transformers",
        "ray",
        "pyarrow",
        "fsspec",
        "typer",
        "rich",
        "scipy",
        "triton",
    }
    assert not modules & heavy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("segfault", r"segfault\.wav: the decoder crashed on it \(signal 11"),
        ("abort", r"abort\.wav: the decoder crashed on it \(signal 6"),
        ("killed", r"killed\.wav: the decoder was killed on it \(signal 9; perhaps memory ran out"),
        ("terminated", r"terminated\.wav: the decoder was killed on it \(signal 15"),
        ("exits", r"exits\.wav: the decoder ended on it \(exit code 3\)"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_process_that_dies_costs_the_recording_at_hand(
    pool: DecoderPool, named: Callable[[str], str], paths: list[str], name: str, message: str
) -> None:
    before, failed, after = decoded(pool, [paths[0], named(name), paths[1]])
    with pytest.raises(AudioError, match=message):
        raise failed.error or AssertionError
    assert (before.error, after.error) == (None, None)


@pytest.mark.parametrize("name", ["waits", "spins"])
def test_a_process_that_hangs_is_killed(
    hasty_pool: DecoderPool, named: Callable[[str], str], paths: list[str], name: str
) -> None:
    failed, after = decoded(hasty_pool, [named(name), paths[1]])
    with pytest.raises(AudioError, match=r"the decoder hung on it \(no progress for 1 s\)"):
        raise failed.error or AssertionError
    assert after.error is None


def test_a_process_that_waits_for_its_reader_does_not_hang(
    hasty_pool: DecoderPool, tmp_path: Path
) -> None:
    stream = hasty_pool.stream(DecodeRequest(str(write_silence(tmp_path / "long.wav", 240))))
    sizes = [next(stream).size]
    time.sleep(2.0)  # longer than the time limit
    sizes += [block.size for block in stream]
    assert sum(sizes) == 240 * 16_000


@needs_proc
def test_a_process_that_is_killed_from_outside_costs_the_recording_at_hand(
    pool: DecoderPool, named: Callable[[str], str], paths: list[str]
) -> None:
    note = Path(named("waits")).with_suffix(".pid")
    killer = threading.Thread(target=lambda: kill_named_in(note))
    killer.start()
    failed, after = decoded(pool, [str(note.with_suffix(".wav")), paths[0]])
    killer.join()
    assert "was killed on it (signal 9" in str(failed.error)
    assert after.error is None


def kill_named_in(note: Path) -> None:
    wait_until(lambda: note.exists() and note.read_text() != "")
    os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_process_that_died_idle_costs_nothing(pool: DecoderPool, paths: list[str]) -> None:
    assert decoded(pool, [paths[0]])[0].error is None
    (process,) = pool._idle
    os.kill(process.pid, signal.SIGKILL)
    assert decoded(pool, [paths[0]])[0].error is None
    assert pool._idle[0].pid != process.pid


def test_a_process_that_is_killed_while_it_starts_costs_nothing(paths: list[str]) -> None:
    def kill_first() -> None:
        wait_until(lambda: bool(pool._all))
        with pool._lock:
            os.kill(next(iter(pool._all)).pid, signal.SIGKILL)

    with DecoderPool(1) as pool:
        killer = threading.Thread(target=kill_first)
        killer.start()
        assert [each.error for each in decoded(pool, paths)] == [None] * len(paths)
        killer.join()


def test_ctrl_c_does_not_reach_a_process(pool: DecoderPool, paths: list[str]) -> None:
    assert decoded(pool, [paths[0]])[0].error is None
    (process,) = pool._idle
    assert os.getpgid(process.pid) != os.getpgid(0)
    os.kill(process.pid, signal.SIGINT)
    assert decoded(pool, [paths[0]])[0].error is None
    assert pool._idle[0].pid == process.pid


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (f"{faulty_decoders.__name__}:nothing", "cannot be started.*has no attribute 'nothing'"),
        ("nowhere:decode", "cannot be started.*No module named 'nowhere'"),
    ],
)
def test_processes_that_cannot_start_end_the_run(
    paths: list[str], decode: str, message: str
) -> None:
    with DecoderPool(1, decode=decode) as pool, pytest.raises(DecoderError, match=message):
        decoded(pool, paths)


def test_an_interpreter_that_is_not_there_ends_the_run(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with DecoderPool(1) as pool, pytest.raises(DecoderError, match=r"cannot be started.*No such"):
        decoded(pool, paths)


def test_what_decoding_raises_is_raised_here(
    pool: DecoderPool, named: Callable[[str], str], tmp_path: Path
) -> None:
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    error = error_of(pool, str(text))
    with pytest.raises(AudioError, match=r"text\.wav: is not a recording"):
        raise error
    assert type(error_of(pool, named("option"))) is OptionError
    with pytest.raises(TypeError, match="a bug") as bug:
        error_of(pool, named("bug"))
    notes = bug.value.__notes__
    assert "faulty_decoders.py" in notes[0] and notes[1].endswith("bug.wav was decoded")
    odd = error_of(pool, named("odd"))
    assert str(odd) == f"{faulty_decoders.__name__}.OddError: quite odd"
    assert type(odd) is RuntimeError
    assert "UnicodeDecodeError" in str(error_of(pool, named("unicode")))


def test_names_are_those_of_files_whatever_they_hold(
    pool: DecoderPool, paths: list[str], tmp_path: Path
) -> None:
    names = ["a b\nc.wav", "ü.wav", os.fsdecode(b"not-utf-8-\xe9.wav"), "-"]
    sources = [shutil.copy(paths[0], tmp_path / name) for name in names]
    assert [each.error for each in decoded(pool, sources)] == [None] * len(names)


def test_what_is_no_path_is_opened_in_the_process(pool: DecoderPool, paths: list[str]) -> None:
    opener = f"{faulty_decoders.__name__}:opened"
    good, bad = each_of(
        pool, [DecodeRequest(f"stored:{paths[0]}", opener), DecodeRequest("elsewhere:x", opener)]
    )
    np.testing.assert_array_equal(samples_of(good), load_audio(paths[0]))
    assert type(bad.error) is PermissionError
    assert "forbidden" in str(bad.error)


def test_log_records_arrive_once(
    pool: DecoderPool, named: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    decoded(pool, [named("warns")])
    assert [(each.name, each.levelno, each.getMessage()) for each in caplog.records] == [
        ("whisper_flash_attention.audio.audio_source", logging.WARNING, "warns.wav: warned"),
        ("elsewhere", logging.ERROR, "of another package"),
    ]


def test_what_a_process_prints_is_dropped(
    pool: DecoderPool, named: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert decoded(pool, [named("prints")])[0].error is None
    assert capfd.readouterr() == ("", "")
    assert pool._idle[0]._printed.seek(0, os.SEEK_END) == 0


@needs_proc
@pytest.mark.parametrize("minutes", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_a_long_recording_is_streamed_in_bounded_memory(
    pool: DecoderPool, paths: list[str], tmp_path: Path, minutes: int
) -> None:
    decoded(pool, paths)
    (process,) = pool._idle
    before, total = high_water(process.pid), 0
    for block in pool.stream(DecodeRequest(write_silence(tmp_path / "a.wav", 60 * minutes))):
        assert block.size <= SLOT_SAMPLES
        total += block.size
    assert total == 60 * minutes * 16_000
    # Of 15 minutes all samples are 58 MB; the shared memory is 8.
    assert high_water(process.pid) < before + 30


def test_a_stream_that_is_closed_leaves_the_process_to_the_next(
    pool: DecoderPool, paths: list[str], tmp_path: Path
) -> None:
    decoded(pool, paths[:1])
    (process,) = pool._idle
    long = DecodeRequest(str(write_silence(tmp_path / "long.wav", 1_800)))
    for _ in range(3):
        stream = pool.stream(long)
        assert next(stream).size == SLOT_SAMPLES
        stream.close()
    assert decoded(pool, paths[:1])[0].error is None
    assert pool._idle == [process]


def test_memory_bounds_what_is_decoded_ahead(tmp_path: Path) -> None:
    """Only the oldest recording goes on; the others keep what fits between the processes."""
    sources = [str(tmp_path / name) for name in ("0-a", "50-b", "50-c")]
    decode = f"{faulty_decoders.__name__}:count_blocks"
    with DecoderPool(3, decode=decode) as pool:
        found: list[OpenedAudio] = []
        requests = [DecodeRequest(source) for source in sources]
        thread = threading.Thread(
            target=lambda: found.extend(each_of(pool, requests, ahead_seconds=0.0))
        )
        thread.start()
        others = [Path(source) for source in sources[1:]]
        wait_until(lambda: all(path.exists() for path in others))
        time.sleep(0.5)
        # One that was taken, those in shared memory, one that waits for room there.
        assert max(path.stat().st_size for path in others) <= 1 + SLOTS + 1
        (tmp_path / "go").touch()
        thread.join(30)
    assert [samples_of(each).size for each in found] == [1_000, 50_000, 50_000]


@needs_proc
def test_closing_is_quick_and_leaves_no_process(named: Callable[[str], str]) -> None:
    pool = DecoderPool(1, timeout=300.0, decode=faulty_decoders.NAME)
    note = Path(named("waits")).with_suffix(".pid")
    errors: list[Exception] = []

    def decode() -> None:
        try:
            decoded(pool, [named("waits"), named("b")])
        except DecoderError as error:
            errors.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    wait_until(lambda: note.exists() and note.read_text() != "")
    started = time.monotonic()
    pool.close()
    pool.close()
    thread.join()
    assert time.monotonic() - started < 5
    assert [str(error) for error in errors] == ["the decoder pool was closed"]
    assert not is_running(int(note.read_text()))
    with pytest.raises(DecoderError, match="was closed"):
        decoded(pool, [named("c")])


# A script without `if __name__ == "__main__"`: no process may run it again.
SCRIPT = """
import sys, threading
from contextlib import suppress
print("once", flush=True)
from tests.audio import faulty_decoders
from whisper_flash_attention.audio.decoder_pool import DecodeRequest, DecoderPool
from whisper_flash_attention.errors import DecoderError
pool = DecoderPool(2, decode=faulty_decoders.NAME)
list(pool.stream(DecodeRequest(sys.argv[1])))
idle = pool._idle[0].pid
streams = [pool.stream(DecodeRequest(path)) for path in sys.argv[1:]]
next(streams[0])

def hang():
    with suppress(DecoderError):  # at the end
        next(streams[1])

threading.Thread(target=hang, daemon=True).start()
print(idle, flush=True)
try:
    threading.Event().wait()
except KeyboardInterrupt:
    streams[0].close()
    pool.close()
    print("interrupted", flush=True)
"""


def run_script(tmp_path: Path, first: str, second: str, signal_number: int) -> tuple[str, str]:
    """Interrupt a script with a process that waits and one that hangs; what it and they left."""
    shared_before = {*os.listdir("/dev/shm")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    note = Path(second).with_suffix(".pid")
    # A module of such a name beside the recordings must not be taken for Python's.
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit('the wrong module')")
    with subprocess.Popen(
        [sys.executable, str(script), first, second],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])},
        cwd=folder,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "once\n"
        pids = [int(process.stdout.readline())]
        wait_until(lambda: note.exists() and note.read_text() != "")
        pids.append(int(note.read_text()))
        assert all(map(is_running, pids))
        os.killpg(process.pid, signal_number)
        out, err = process.stdout.read(), process.stderr.read()
    wait_until(lambda: not any(map(is_running, pids)), 10.0)
    # Other tests, in other processes, may have memory of their own there for a while.
    wait_until(lambda: {*os.listdir("/dev/shm")} <= shared_before)
    return out, err


@needs_proc
@pytest.mark.parametrize(
    ("number", "out"), [(signal.SIGKILL, ""), (signal.SIGINT, "interrupted\n")]
)
def test_a_parent_that_ends_leaves_nothing(
    tmp_path: Path, named: Callable[[str], str], number: int, out: str
) -> None:
    long = write_silence(tmp_path / "long.wav", 1_800)
    assert run_script(tmp_path, str(long), named("waits"), number) == (out, "")


def test_samples_pass_through_shared_memory() -> None:
    ring = SampleRing()
    for slot in range(SLOTS):
        ring.write(slot, np.full(SLOT_SAMPLES, slot, np.float32))
    for slot in range(SLOTS):
        np.testing.assert_array_equal(ring.read(slot, 7), np.full(7, slot, np.float32))
    ring.close()


def test_there_is_a_process_for_every_core_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 1), (2, 1), (8, 7), (16, 15), (128, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        monkeypatch.setattr(decoder_pool.sys, "platform", "linux")
        assert default_workers() == workers


def test_misuse_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="workers must be at least 1"):
        DecoderPool(0)
    with pytest.raises(OptionError, match="timeout must be"):
        DecoderPool(1, timeout=0.0)
    with pytest.raises(OptionError, match="sampling_rate must be positive"):
        DecodeRequest("a.wav", sampling_rate=0)


@needs_proc
def test_the_next_pool_takes_the_processes_that_one_left(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pids(**options: Any) -> set[int]:
        with DecoderPool(1, reuse=True, **options) as pool:
            decoded(pool, paths[:1])
            return {process.pid for process in pool._all}

    first = pids()
    assert pids() == first
    assert pids(timeout=7.0) != first
    with DecoderPool(1) as apart:
        decoded(apart, paths[:1])
        assert {process.pid for process in apart._all} != first
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)  # names of files are looked up there
        assert pids() != first
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, first)))
    assert pids() != first
    decoder_pool._KEPT.end_late(after=decoder_pool.KEPT_SECONDS)
    assert decoder_pool._KEPT._kept == []
