"""A system in a process of its own: loads, and then transcribes a recording for every message.

Its memory is measured with it: on the host what it and the processes that it started had at most,
and on a GPU what its process has, as NVML counts it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from whisper_flash_attention.benchmark.peer_systems import (
    GB,
    SYSTEMS,
    Request,
    Setup,
    System,
    Texts,
)
from whisper_flash_attention.benchmark.processes import interruptions_ignored
from whisper_flash_attention.benchmark.word_alignment import TimedWord

logger = logging.getLogger("whisper_flash_attention")

POLL = 0.05  # seconds between two readings of a GPU's memory


@dataclass(frozen=True)
class Call:
    """What a call took and gave.

    Attributes:
        seconds: from the path to the whole text.
        first_seconds: to the first text; None if there is none.
        text: all of it.
        tokens: of the text; None of a system that does not count them.
        rss_gb: peak memory of the process so far, in units of 1e9 bytes.
        words: with their times, if they were wanted.
    """

    seconds: float
    first_seconds: float | None
    text: str
    tokens: int | None
    rss_gb: float
    words: tuple[TimedWord, ...] = ()


def serve_calls(connection: Connection, name: str, setup: Setup, peers: str | None) -> None:
    """In a process of its own: load, then transcribe a recording for every `Request`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    if peers is not None:
        sys.path.append(peers)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        start = time.perf_counter()
        transcribe, settings = SYSTEMS[name].load(setup)
        connection.send((settings, time.perf_counter() - start))
        peak = peak_of_tree if SYSTEMS[name].has_processes else peak_of_process
        request: Request | None
        while request := connection.recv():
            texts = Texts()
            start = time.perf_counter()
            transcribe(request, texts)
            took = time.perf_counter() - start
            given = texts.text, texts.tokens, peak(), tuple(texts.words)
            connection.send(Call(took, texts.first_seconds, *given))
    except Exception as error:  # of a package that is not ours: its row says what it was
        logger.debug("%s failed", name, exc_info=True)
        connection.send(f"{type(error).__name__}: {error}"[:300])


def _end_with_parent() -> None:
    """Wait until the process that started this one ends, however, and end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def peak_of_tree() -> float:
    """Peak resident memory of this process and of those that it started, of each by itself.

    Unlike `peak_rss`, it does not begin with the memory of the process that started this one.
    """
    return sum(_peaks(os.getpid())) / GB


def peak_of_process() -> float:
    """Peak resident memory of this process alone."""
    return next(_peaks(os.getpid())) / GB


def _peaks(process: int) -> Iterator[int]:
    home = Path(f"/proc/{process}")
    try:
        lines = (home / "status").read_text().splitlines()
        children = (home / f"task/{process}/children").read_text().split()
    except OSError:  # it has ended meanwhile
        return
    yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    for child in children:
        yield from _peaks(int(child))


class PeerFailed(Exception):
    """A system raised or died; the message says why."""


class Worker:
    """A system in its process, which begins to load; `settings` are there after `load`.

    Args:
        alone: whether no other system is loaded meanwhile.
        peers: folder with further packages.
        timeout: seconds that loading or a call may take.
    """

    def __init__(
        self, system: System, setup: Setup, *, alone: bool, peers: Path | None, timeout: float
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.memory = DeviceMemory(setup.device, alone=alone)
        self._timeout = timeout
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_calls,
            args=(theirs, system.name, setup, None if peers is None else str(peers)),
            daemon=False,  # systems start processes
        )
        with interruptions_ignored():  # also while it imports what it serves with
            self._process.start()
        theirs.close()

    def load(self) -> float:
        """Wait until it is loaded, and return the seconds that it took.

        Raises:
            PeerFailed: it cannot be loaded.
        """
        self.settings, seconds = self._receive()
        return float(seconds)

    def call(self, request: Request) -> Call:
        """Transcribe a recording.

        Raises:
            PeerFailed: the system raised, died or took too long.
        """
        with suppress(BrokenPipeError):  # it died; that is found when its result is waited for
            self._connection.send(request)
        found: Call = self._receive()
        return found

    def _receive(self) -> Any:
        deadline = time.monotonic() + self._timeout
        while not self._connection.poll(POLL):
            self.memory.read(self._process.pid)
            if time.monotonic() > deadline:
                self._process.kill()
                raise PeerFailed(f"took longer than {self._timeout:g} s")
        try:
            found = self._connection.recv()
        except EOFError:
            self._process.join()
            raise PeerFailed(f"died with exit code {self._process.exitcode}") from None
        if isinstance(found, str):
            self.stop()
            raise PeerFailed(found)
        return found

    def stop(self, *, at_once: bool = False) -> None:
        """End the process, which may have a call under way only if it is to end at once."""
        if self._process.is_alive():
            if at_once:
                self._process.terminate()
            else:
                with suppress(BrokenPipeError):
                    self._connection.send(None)
            self._process.join(2 if at_once else 10)
            if self._process.is_alive():
                self._process.kill()
        self._process.join()


class DeviceMemory:
    """Peak of a process's memory on a GPU; `gb` is None where it is not known.

    Where NVML does not count by process, it is what came to the memory that was in use before, if
    the system is `alone`.
    """

    def __init__(self, device: str, *, alone: bool) -> None:
        self.gb: float | None = None
        self._read = _device_reader(device) if device.startswith("cuda") else None
        self._before = self._read(None) if self._read and alone else None

    def read(self, process: int | None) -> None:
        """Take the memory that is in use now into account."""
        if self._read is None:
            return
        used = self._read(process)
        if used is None and self._before is not None:
            used = (self._read(None) or 0) - self._before
        if used is not None:
            self.gb = max(self.gb or 0.0, used / GB)


def _device_reader(device: str) -> Callable[[int | None], int | None] | None:
    """Reads the bytes in use on a GPU, by a process or by all (None); None without NVML."""
    import torch

    try:
        import pynvml
    except ImportError:
        return None
    identity = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}")
    except pynvml.NVMLError:
        return None

    def read(process: int | None) -> int | None:
        if process is None:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        with suppress(pynvml.NVMLError):
            for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if each.pid == process and each.usedGpuMemory:
                    return int(each.usedGpuMemory)
        return None

    return read
