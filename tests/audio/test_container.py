"""Streams, pipes, devices and file objects as something that can be read again, or an error."""

from __future__ import annotations

import io
import os
import socket
import stat
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from tests.audio.encoding import write_wave
from whisper_flash_attention.audio import container, load_audio
from whisper_flash_attention.audio.audio_source import ChannelSources, open_audio, open_source
from whisper_flash_attention.audio.container import Shared, readable, spool
from whisper_flash_attention.errors import AudioError


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s of stereo noise at 16 kHz, whose channels differ."""
    path = tmp_path_factory.mktemp("readable") / "stereo.wav"
    noise = np.random.default_rng(0).integers(-9000, 9000, (2, 32_000)).astype(np.int16)
    write_wave(path, noise, 16_000)
    return path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "PIPE_SECONDS", 0.3)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


class Once(io.RawIOBase):
    """A file that cannot seek, and gives a little at a time."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(memoryview(buffer)[:1000])


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: Once(path.read_bytes()),
        lambda path: os.fspath(path),
    ],
    ids=["bytes", "bytearray", "memoryview", "seekable", "not seekable", "str"],
)
def test_every_way_to_hand_over_a_file_gives_the_same(stereo: Path, make: Any) -> None:
    wanted = load_audio(stereo)
    np.testing.assert_array_equal(load_audio(make(stereo)), wanted)
    np.testing.assert_array_equal(open_source(make(stereo)).samples, wanted)


def test_a_file_in_an_archive_is_read(stereo: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(stereo, "a.wav")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.wav") as file:
        np.testing.assert_array_equal(load_audio(file), load_audio(stereo))


def test_several_readers_of_one_file_do_not_disturb_one_another(stereo: Path) -> None:
    content = stereo.read_bytes()
    with stereo.open("rb") as file:
        first, second = readable(file), readable(file)
        assert isinstance(first, Shared) and isinstance(second, Shared)
        parts: list[list[bytes]] = [[], []]
        for _ in range(0, len(content), 1000):
            for reader, found in zip((first, second), parts, strict=True):
                found.append(reader.read(1000))
        assert [b"".join(each) for each in parts] == [content, content]
        first.close()
        assert not file.closed
    with stereo.open("rb") as file:
        found = open_audio(file, channel="each")
        assert isinstance(found, ChannelSources)
        for number, audio in enumerate(found.sources, 1):
            np.testing.assert_array_equal(audio.samples, load_audio(stereo, channel=number))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.open("r"), 'is open as text; open it with mode "rb"'),
        (lambda path: path.open("ab"), "cannot be read"),
        (lambda path: 5, "a recording is a path, bytes, a file .* but got 5"),
        (lambda path: None, "a recording is a path, bytes, a file .* but got None"),
        (lambda path: "a\0b.wav", "cannot be the name of a file"),
        (lambda path: "caf\udce9.wav", "there is no such file"),
    ],
    ids=["text", "write-only", "number", "none", "NUL", "surrogate"],
)
def test_what_cannot_be_read_is_an_audio_error(stereo: Path, make: Any, message: str) -> None:
    given = make(stereo)
    with pytest.raises(AudioError, match=message):
        load_audio(given)
    if hasattr(given, "close"):
        given.close()


def test_a_closed_file_and_one_that_fails_are_audio_errors(stereo: Path) -> None:
    with stereo.open("rb") as file:
        pass
    with pytest.raises(AudioError, match=r"stereo\.wav: cannot be read \(.*closed file\)"):
        load_audio(file)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise RuntimeError("the bucket is gone")

    with pytest.raises(AudioError, match="the bucket is gone"):
        load_audio(Broken(b"12"))


def test_a_read_that_gives_text_is_an_audio_error() -> None:
    class Text:
        def read(self, size: int) -> Any:
            return "text"

    with pytest.raises(AudioError, match=r"read\(\) gives str, not bytes"):
        load_audio(Text())  # type: ignore[arg-type]


def test_a_stream_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1000)

    assert container.MOST_BYTES == 4 * 2**30
    monkeypatch.setattr(container, "MOST_BYTES", 2**20)
    with pytest.raises(
        AudioError, match=r"stdin: more than 0\.000976562 GiB came through this str"
    ):
        spool(endless(), "stdin")


def test_a_long_stream_is_on_disk_and_a_full_disk_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MOST_IN_MEMORY", 1000)
    copy = spool([bytes(600), bytes(600)], "stdin")
    assert copy.name == "stdin"
    assert isinstance(copy._file.fileno(), int)
    assert copy.read() == bytes(1200) and copy.again().read(5) == bytes(5)

    class Full:
        def __init__(self, **_: Any) -> None: ...

        def write(self, chunk: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "Spooled", Full)
    with pytest.raises(AudioError, match=r"file after 0 MiB \(No space left on device\)"):
        spool([bytes(600)], "stdin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_copied_and_can_be_read_again(stereo: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)

    def write() -> None:
        time.sleep(0.2)  # whoever reads waits for the writer
        with pipe.open("wb") as file:
            file.write(stereo.read_bytes())

    thread = in_thread(write)
    found = open_audio(pipe, channel="each")
    thread.join()
    assert isinstance(found, ChannelSources) and len(found.sources) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("call", [load_audio, open_source, open_audio])
def test_a_pipe_that_nobody_writes_to_is_given_up(
    impatient: None, tmp_path: Path, call: Callable[[Any], Any]
) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    started = time.monotonic()
    with pytest.raises(AudioError, match=r"pipe\.wav: is a named pipe through which nothing came"):
        call(pipe)
    assert time.monotonic() - started < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a writer that has gone")
def test_a_writer_that_writes_nothing_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    thread = in_thread(lambda: pipe.open("wb").close())
    started = time.monotonic()
    with pytest.raises(AudioError, match=r"pipe\.wav: "):
        load_audio(pipe)
    assert time.monotonic() - started < 20
    thread.join()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_writer_that_stops_is_given_up_and_so_is_waiting_in_vain(
    impatient: None, tmp_path: Path
) -> None:
    pipe, done = tmp_path / "pipe.wav", threading.Event()
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            file.write(b"RIFF")
            done.wait(10)

    thread = in_thread(write)
    with pytest.raises(AudioError, match=r"through which nothing came for 0\.3 s"):
        load_audio(pipe)
    done.set()
    thread.join()
    stop = threading.Event()
    stop.set()
    with pytest.raises(AudioError, match="the file is empty"):
        open_source(pipe, stop=stop)


DEVICES = [each for each in ("/dev/zero", "/dev/urandom", "/dev/null") if os.path.exists(each)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_is_refused_by_its_name_and_as_an_open_file(device: str) -> None:
    assert stat.S_ISCHR(os.stat(device).st_mode)
    with pytest.raises(AudioError, match=f"{device}: is a device, not a recording"):
        open_audio(device)
    with open(device, "rb") as file, pytest.raises(AudioError, match="is a device, not a rec"):
        open_audio(file)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")
def test_sockets_and_folders_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "s"))
        with pytest.raises(AudioError, match="s: is a socket, not a recording"):
            load_audio(tmp_path / "s")
    with pytest.raises(AudioError, match="is a folder, not a recording; name the files in it"):
        load_audio(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/fd names pipes there")
def test_a_pipe_whose_writer_is_gone_already_is_read(stereo: Path) -> None:
    reading, writing = os.pipe()
    with open(writing, "wb") as end:
        end.write(stereo.read_bytes()[: 16_000 + 44])
    found = spool_of(f"/dev/fd/{reading}")
    os.close(reading)
    assert found.read() == stereo.read_bytes()[: 16_000 + 44]


def spool_of(path: str) -> BinaryIO:
    found = readable(path)
    assert isinstance(found, Shared)
    return found  # type: ignore[return-value]
