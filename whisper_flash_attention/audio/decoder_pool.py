"""Decode recordings in processes of their own.

A decoder that crashes or hangs on a recording costs that recording alone, and decoders do not share
an interpreter's lock, neither with one another nor with the thread that feeds a GPU. Samples come
back through shared memory.

Memory: each process takes about 60 MB and up to 8 MB of shared memory, however long a recording is.
Processes that a pool leaves idle may be kept for the next one, which then need not start them.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from threading import BoundedSemaphore, Event, Lock, Thread, Timer
from typing import Any, Self

from whisper_flash_attention.audio.audio_source import MOST_SECONDS_HELD
from whisper_flash_attention.audio.container import Shared, name_of
from whisper_flash_attention.audio.decoder_process import DecoderProcess, ProcessEnded
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.errors import AudioError, DecoderError, OptionError, WhisperFlashError

STREAM_AUDIO = "whisper_flash_attention.audio.audio_source:stream_audio"
DECODE_TIMEOUT = 300.0  # seconds
# One GPU does not need more, and each takes memory.
MOST_WORKERS = 16
# How long idle processes wait for another pool.
KEPT_SECONDS = 30.0
# Processes for one request that may end before they begin with it: while idle, or starting.
_MOST_STARTS = 4
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """A recording to decode, with the arguments of `stream_audio`.

    Args:
        source: a path; or a file that is open, whose bytes the process gets; with `opener`, what
            that takes.
        opener: name of a function, `package.module:function`, that is called in the decoder process
            with `source`, and returns a context manager that gives a file open for reading bytes.
        start, end, sampling_rate, track, most_seconds: as for `stream_audio`; at most as much as
            may be held in memory, if left out.
        is_part: decode with `stream_part`, not with the pool's function.
        most_parts: if not 0, decode nothing, and return what `part_bounds` does.
        channel: as for `stream_audio`; or "each", all channels of the track by themselves.

    Raises:
        OptionError: the rate is not positive.
    """

    source: str | Path | Shared
    opener: str | None = None
    start: float = 0.0
    end: float | None = None
    sampling_rate: int = SAMPLING_RATE
    channel: int | str | None = None
    track: int | str | None = None
    most_seconds: float = MOST_SECONDS_HELD
    is_part: bool = False
    most_parts: int = 0

    def __post_init__(self) -> None:
        if self.sampling_rate <= 0:
            raise OptionError(f"sampling_rate must be positive, got {self.sampling_rate}")


def default_workers() -> int:
    """One decoder process per core that this process may use, but one, and at most 16."""
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores - 1))


class DecoderPool:
    """Processes that decode, started when they are first needed.

    Use it as a context manager, or close it: that kills the processes, whatever they are doing.
    They end by themselves when this process ends, however it ends.

    What decoding raises in a process is raised here: exceptions of this package as they were, those
    of Python with the traceback of the process as a note, others as `RuntimeError` with their class
    and message. Log records arrive at the loggers of the same names in this process, at once. What
    a process prints is dropped.

    Args:
        workers: the most processes; None is `default_workers()`.
        timeout: seconds without progress (30 s of audio, or the end of the recording) after which
            a process counts as hanging and is killed.
        decode: name of the function that decodes, `package.module:function`, which takes and gives
            what `stream_audio` does.
        reuse: take processes that another pool left idle, and leave them for the next one: they end
            after `KEPT_SECONDS`, or with this process.

    Raises:
        OptionError: a number is not positive.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        timeout: float = DECODE_TIMEOUT,
        decode: str = STREAM_AUDIO,
        reuse: bool = False,
    ) -> None:
        self.workers = default_workers() if workers is None else workers
        if self.workers < 1:
            raise OptionError(f"workers must be at least 1, got {self.workers}")
        if not timeout > 0:
            raise OptionError(f"timeout must be seconds, more than 0, got {timeout}")
        self._timeout, self._decode, self._reuse = timeout, decode, reuse
        self.decodes_parts = decode == STREAM_AUDIO
        self._idle: list[DecoderProcess] = []
        self._all: set[DecoderProcess] = set()
        self._lock = Lock()  # of these two
        self._free = BoundedSemaphore(self.workers)
        self._closed = Event()
        self._watchdog = Thread(target=self._kill_late, name="decoder_watchdog", daemon=True)
        self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes, but those that are kept; from any thread, repeatedly.

        What is being decoded elsewhere raises `DecoderError`.
        """
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
            if self._reuse:
                self._all.difference_update(idle)
            for process in self._all:
                process.kill()
        self._watchdog.join()
        if self._reuse:
            _KEPT.put(_setting(self._decode, self._timeout), idle)
            return
        for process in idle:
            self._end(process)

    @contextmanager
    def reserved(self, most: int) -> Iterator[int]:
        """Reserve up to `most` free workers for `stream(..., beside=True)`; yield how many."""
        count = 0
        try:
            while count < most and self._free.acquire(blocking=False):
                count += 1
            yield count
        finally:
            for _ in range(count):
                self._free.release()

    def stream(
        self, request: DecodeRequest, *, beside: bool = False
    ) -> Generator[Samples, None, Any]:
        """Decode a recording block by block, while the process is up to two minutes of audio ahead.

        Until the iterator ends or is closed, one of the processes is taken.

        Args:
            beside: do not wait for one of the `workers`, but take another process if need be: for
                a reader for which these wait.

        Returns:
            Blocks of mono samples `[T]`, 30 s each at 16 kHz, of which the caller owns the memory;
            where each channel is requested, those of one channel after those of another. The
            generator's return value is the number of channels; or the bounds of parts.

        Raises:
            AudioError: as `stream_audio`, or the decoder crashed or hung on the recording.
            DecoderError: processes cannot be started, or the pool was closed.
        """
        with nullcontext() if beside else self._free:
            process = self._begin(request)
            busy = True
            try:
                while "block" in (reply := process.receive()):
                    yield process.take(*reply["block"])
                busy = False
            except GeneratorExit:
                busy = not process.stop()
                raise
            except ProcessEnded as error:
                self._raise_if_closed()
                name = name_of(request.source)
                raise AudioError(f"{name}: the decoder {error.how} on it ({error.why})") from error
            finally:
                if busy:
                    self._end(process)
                else:
                    self._release(process)
        if "failed" in reply:
            raise _rebuilt(reply["failed"])
        return reply["done"]

    def _begin(self, request: DecodeRequest) -> DecoderProcess:
        """A process that has begun with a request; one that died without it is replaced."""
        reason = ""
        for _ in range(_MOST_STARTS):
            process = self._idle_or_new()
            try:
                if not process.is_ready:
                    process.wait_until_ready()
                process.send(*_command(request))
                process.receive()
                return process
            except ProcessEnded as error:
                self._end(process)
                self._raise_if_closed()
                reason = str(error)
            except BaseException:
                self._end(process)
                raise
        raise DecoderError(f"decoder processes cannot be started: one {reason}")

    def _idle_or_new(self) -> DecoderProcess:
        with self._lock:
            self._raise_if_closed()
            if self._idle:
                return self._idle.pop()
        kept = _KEPT.take(_setting(self._decode, self._timeout)) if self._reuse else None
        process = kept or DecoderProcess(self._decode, self._timeout)
        with self._lock:
            self._all.add(process)
        if self._closed.is_set():  # else it is known to `close`
            self._end(process)
            self._raise_if_closed()
        return process

    def _release(self, process: DecoderProcess) -> None:
        process.forget_printed()
        with self._lock:
            if not self._closed.is_set():
                self._idle.append(process)
                return
        self._end(process)

    def _end(self, process: DecoderProcess) -> None:
        with self._lock:
            self._all.discard(process)
        process.end()

    def _kill_late(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            with self._lock:
                for process in self._all:
                    process.kill_if_late()

    def _raise_if_closed(self) -> None:
        if self._closed.is_set():
            raise DecoderError("the decoder pool was closed")


def _command(request: DecodeRequest) -> tuple[dict[str, Any], bytes]:
    """What a process gets: a command, and the bytes of an open file."""
    options = {each.name: getattr(request, each.name) for each in fields(request)}
    source, contents = request.source, b""
    if isinstance(source, Shared):
        contents = source.again().read()
        options["size"], source = len(contents), source.name
    return {"decode": options | {"source": str(source)}}, contents


def _setting(decode: str, timeout: float) -> tuple[object, ...]:
    """What a process depends on that was started now, and which process may talk to it."""
    level = logging.getLogger(_PACKAGE).getEffectiveLevel()
    environment = frozenset(os.environ.items())
    return os.getpid(), decode, timeout, level, os.getcwd(), tuple(sys.path), environment


class _KeptProcesses:
    """Idle processes between two pools."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, tuple[object, ...], DecoderProcess]] = []
        self._lock = Lock()

    def put(self, setting: tuple[object, ...], processes: list[DecoderProcess]) -> None:
        """Keep processes that were started under this setting; of many, the last ones."""
        until = time.monotonic() + KEPT_SECONDS
        with self._lock:
            self._kept += [(until, setting, each) for each in processes]
            ended, self._kept = self._kept[:-MOST_WORKERS], self._kept[-MOST_WORKERS:]
        _end_all(ended)
        if processes:
            timer = Timer(KEPT_SECONDS, self.end_late)
            timer.daemon = True
            timer.start()

    def take(self, setting: tuple[object, ...]) -> DecoderProcess | None:
        """A process that was started under this setting, if there is one."""
        with self._lock:
            for index, (_, its, process) in enumerate(self._kept):
                if its == setting and process.is_running:
                    del self._kept[index]
                    return process
        return None

    def end_late(self, *, after: float = 0.0) -> None:
        """End those that have waited long enough, or will have `after` that number of seconds."""
        now, own = time.monotonic() + after, os.getpid()
        with self._lock:
            ended = [each for each in self._kept if each[0] <= now and each[1][0] == own]
            self._kept = [each for each in self._kept if each[0] > now]
        _end_all(ended)


def _end_all(kept: list[tuple[float, tuple[object, ...], DecoderProcess]]) -> None:
    for _, _, process in kept:
        process.end()


_KEPT = _KeptProcesses()
atexit.register(_KEPT.end_late, after=KEPT_SECONDS)


def _rebuilt(failure: dict[str, str]) -> Exception:
    """The exception that was raised in the process."""
    module, name, message = failure["module"], failure["class"], failure["message"]
    error: Exception | None = None
    if module == "builtins" or module.partition(".")[0] == _PACKAGE:
        kind = getattr(import_module(module), name, None)
        with suppress(TypeError):  # some take other arguments than a message
            if isinstance(kind, type) and issubclass(kind, Exception):
                error = kind(message)
    if error is None:
        error = RuntimeError(f"{module}.{name}: {message}")
    if not isinstance(error, WhisperFlashError):
        error.add_note(f"In the decoder process:\n{failure['traceback']}")
    return error
