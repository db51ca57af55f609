"""A process that decodes recordings for a `DecoderPool`: the parent's side, and `main`, its own.

It imports NumPy, PyAV and the decoding of this package. Requests come as lines of JSON on its
standard input, replies leave as such lines, samples through a `SampleRing`. When standard input
ends, the process ends at once, so that no worker outlives its parent.

    parent → worker    {"decode": fields of a `DecodeRequest`}   {"taken": true}   {"stop": true}
                       with "size", that number of bytes follows: the recording
    worker → parent    {"ready": true}   {"begun": true}   {"block": [slot, samples]}   {"log": ...}
                       {"done": channels, or bounds of parts}
                       {"failed": module, class, message and traceback}

The shared memory has no name in the file system (POSIX) and ends with the last process that has it,
so that nothing is left over, whichever process is killed. On Linux it does not count against
/dev/shm, which containers keep small. Blocks of `multiprocessing.shared_memory` are there, under
names that outlive a killed process.
"""

from __future__ import annotations

import io
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext, suppress
from importlib import import_module
from queue import SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from typing import Any, BinaryIO

import numpy as np

from whisper_flash_attention.audio.audio_source import chosen_track
from whisper_flash_attention.audio.container import Shared
from whisper_flash_attention.audio.parts import part_bounds, stream_part
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.errors import DecoderError

# Blocks that a decoder may be ahead of its reader.
SLOTS = 4
# Of a block: 30 s at 16 kHz, 1.92 MB. Pages are taken when they are first written.
SLOT_SAMPLES = 480_000
_SLOT_BYTES = 4 * SLOT_SAMPLES


class SampleRing:
    """`SLOTS` blocks of float32 samples in shared memory.

    Args:
        handle: of a ring that another process made; None makes a new one.
    """

    def __init__(self, handle: str | None = None) -> None:
        size = SLOTS * _SLOT_BYTES
        self._descriptor: int | None = None
        if sys.platform == "win32":
            self.handle = handle or f"whisper-flash-{uuid.uuid4().hex}"
            self._memory = mmap.mmap(-1, size, tagname=self.handle)
        else:
            descriptor = _anonymous_file(size) if handle is None else int(handle)
            self._memory = mmap.mmap(descriptor, size)
            self.handle = str(descriptor)
            if handle is None:
                self._descriptor = descriptor  # kept open to be inherited
            else:
                os.close(descriptor)

    @property
    def inherited(self) -> tuple[int, ...]:
        """File descriptors that a process needs to open the ring by its handle."""
        return () if self._descriptor is None else (self._descriptor,)

    def write(self, slot: int, samples: Samples) -> None:
        """Fill a slot from its beginning with samples `[T]`, at most `SLOT_SAMPLES`."""
        self._slot(slot, samples.size)[:] = samples

    def read(self, slot: int, count: int) -> Samples:
        """Copy the first `count` samples of a slot."""
        return self._slot(slot, count).copy()

    def _slot(self, slot: int, count: int) -> Samples:
        assert 0 <= slot < SLOTS and 0 <= count <= SLOT_SAMPLES
        return np.frombuffer(self._memory, np.float32, count, slot * _SLOT_BYTES)

    def close(self) -> None:
        """Give the memory back; the other process keeps what it has mapped."""
        self._memory.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _anonymous_file(size: int) -> int:
    """A descriptor of `size` bytes without a name, zero until they are written."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("decoded-samples")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


# The least time that a process has to start: machines that start many at a time are slow.
_START_SECONDS = 120.0
# For a process that has closed its output to end, and write a core file where it must.
_EXIT_SECONDS = 20.0
# For a process to leave a recording; one that takes longer is killed, which costs a new start.
_STOP_SECONDS = 5.0
_SHOWN_BYTES = 2_000  # of what a process printed before it ended

# Signals of a process that crashed.
_CRASHES = frozenset(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")
    if hasattr(signal, name)
)

# `-P`: a file such as json.py in the working directory must not be imported.
_PROGRAM = (
    "import sys, json; arguments = json.loads(sys.argv[1]); sys.path[:] = arguments['path']; "
    "from whisper_flash_attention.audio.decoder_process import main; main(arguments)"
)
# Of NumPy's libraries, which start one thread per core where they are imported.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class ProcessEnded(Exception):
    """The decoder process ended.

    Args:
        how: "crashed", "was killed" ...
        why: the signal, the exit code, what it printed last.
    """

    def __init__(self, how: str, why: str) -> None:
        super().__init__(f"{how} ({why})")
        self.how, self.why = how, why


class DecoderProcess:
    """A process that decodes one recording at a time.

    It is a fresh interpreter, not a fork: it inherits neither threads nor a GPU, and it does not
    import the user's script.

    Args:
        decode: name of the function that decodes, `package.module:function`.
        timeout: seconds without a reply after which it is killed.

    Raises:
        DecoderError: the system cannot start it.
    """

    def __init__(self, decode: str, timeout: float) -> None:
        self._timeout = self._limit = timeout
        self._deadline: float | None = None
        self._timed_out = False
        self.is_ready = False
        self._lock = Lock()  # of the deadline, and so of the recording that a kill would hit
        self._ring = SampleRing()
        # A file and not a pipe, because it is read only after the process has ended.
        self._printed = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        try:
            self._process = self._started(decode)
        except OSError as error:
            self._free()
            raise DecoderError(f"decoder processes cannot be started: {error}") from error

    def _started(self, decode: str) -> subprocess.Popen[bytes]:
        level = logging.getLogger("whisper_flash_attention").getEffectiveLevel()
        arguments = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "ring": self._ring.handle,
            "decode": decode,
            "log_level": level,
        }
        # In a process group of its own, Ctrl-C in a terminal is not sent to it.
        apart: dict[str, Any]
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            apart = {"process_group": 0, "pass_fds": self._ring.inherited}
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=os.environ | _ONE_THREAD,
            **apart,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until it has imported what it needs; raises `ProcessEnded` if it cannot."""
        self.receive(max(self._timeout, _START_SECONDS))
        self.is_ready = True

    def send(self, command: dict[str, Any], contents: bytes = b"") -> None:
        """Send a command, and the bytes that it announces; raises `ProcessEnded`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n" + contents)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the next reply; log records are handed to this process's loggers.

        Raises:
            ProcessEnded: instead of a reply; after `timeout` seconds without one, too.
        """
        assert self._process.stdout is not None
        while True:
            with self._lock:
                self._limit = timeout or self._timeout
                self._deadline = time.monotonic() + self._limit
            try:
                line = self._process.stdout.readline()
            finally:
                with self._lock:
                    self._deadline = None
            if not line.endswith(b"\n"):
                raise self._ended()
            reply: dict[str, Any] = json.loads(line)
            if "log" not in reply:
                return reply
            _log(reply["log"])

    def take(self, slot: int, count: int) -> Samples:
        """Copy a block that a reply announced, and let the process use its slot again."""
        samples = self._ring.read(slot, count)
        with suppress(ProcessEnded):  # the next reply shows it, and the block is whole
            self.send({"taken": True})
        return samples

    def stop(self) -> bool:
        """Have it leave the recording that it decodes; False if it ended instead."""
        try:
            self.send({"stop": True})
            while "block" in (reply := self.receive(_STOP_SECONDS)):
                self.take(*reply["block"])
        except ProcessEnded:
            return False
        return True

    def kill_if_late(self) -> None:
        """Kill the process if a reply is overdue, so that `receive` ends."""
        with self._lock:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._timed_out = True
                self._process.kill()

    def forget_printed(self) -> None:
        """Drop what it printed so far; a library that prints much must not fill the disk."""
        self._printed.truncate(0)

    def kill(self) -> None:
        """Kill the process, from any thread; `end` must follow."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process if it is there, and free everything."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what could not be sent any more
                pipe.close()
        self._free()

    def _free(self) -> None:
        self._printed.close()
        self._ring.close()

    def _ended(self) -> ProcessEnded:
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._timed_out:
            return ProcessEnded("hung", f"no progress for {self._limit:g} s")
        if code >= 0:
            return ProcessEnded("ended", f"exit code {code}{self._last_words()}")
        if -code == signal.SIGKILL:
            return ProcessEnded("was killed", f"signal {-code}; perhaps memory ran out")
        how = "crashed" if -code in _CRASHES else "was killed"
        return ProcessEnded(how, f"signal {-code}: {signal.strsignal(-code)}")

    def _last_words(self) -> str:
        """The last line that it printed, which of a traceback is the error."""
        size = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, size - _SHOWN_BYTES))
        lines = self._printed.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def _log(fields: dict[str, Any]) -> None:
    record = logging.makeLogRecord(fields)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


# What runs in the process.


def main(arguments: dict[str, Any]) -> None:
    """Decode until standard input ends.

    Args:
        arguments: "ring", the handle of the shared memory; "decode", the name of the function that
            decodes, `package.module:function`; "log_level", below which nothing is logged.
    """
    # Ctrl-C is for the parent, which ends its workers if it wants to.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = _Replies()
    logging.basicConfig(level=arguments["log_level"], handlers=[_LogSender(replies)], force=True)
    ring = SampleRing(arguments["ring"])
    decode = _function(arguments["decode"])
    import av  # noqa: F401  # before the first request, and not in the time of a recording

    commands = _Commands()
    replies.send({"ready": True})
    slot = 0
    while True:
        request = commands.requests.get()
        commands.stopped.clear()  # meant an earlier request
        replies.send({"begun": True})
        done: int | list[int] = 1
        try:
            if most_parts := request.pop("most_parts"):
                done = part_bounds(request["source"], request["track"], most_parts)
                replies.send({"done": done})
                continue
            with closing(_blocks(decode, request)) as blocks:
                for count, block in blocks:
                    done = count
                    commands.free_slots.acquire()
                    if commands.stopped.is_set():
                        commands.free_slots.release()
                        break
                    ring.write(slot, block)
                    replies.send({"block": [slot, block.size]})
                    slot = (slot + 1) % SLOTS
        except Exception as error:  # the parent raises it, whatever it is
            replies.send({"failed": _described(error)})
        else:
            replies.send({"done": done})


class _Commands:
    """What the parent sends, read by a thread, so that its end is noticed during a decode."""

    def __init__(self) -> None:
        self.requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.free_slots = Semaphore(SLOTS)
        self.stopped = Event()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            command = json.loads(line)
            if "decode" in command:
                request = command["decode"]
                if (size := request.pop("size", None)) is not None:
                    file = io.BytesIO(sys.stdin.buffer.read(size))
                    request["source"] = Shared(file, request["source"])
                self.requests.put(request)
            elif "taken" in command:
                self.free_slots.release()
            else:
                self.stopped.set()
        os._exit(0)


class _Replies:
    """The parent's end of standard output, on which nothing else writes any more."""

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        self._lock = Lock()
        os.dup2(2, 1)  # what other code prints must not be taken for a reply

    def send(self, reply: dict[str, Any]) -> None:
        line = json.dumps(reply).encode() + b"\n"
        try:
            with self._lock:
                while line:
                    line = line[self._file.write(line) :]
        except OSError:
            os._exit(0)  # the parent is gone


class _LogSender(logging.Handler):
    """Sends log records to the parent, whose handlers decide about them."""

    def __init__(self, replies: _Replies) -> None:
        super().__init__()
        self._replies = replies

    def emit(self, record: logging.LogRecord) -> None:
        names = ("name", "levelno", "levelname", "pathname", "lineno", "funcName")
        fields = {name: getattr(record, name) for name in names}
        self._replies.send({"log": fields | {"msg": record.getMessage()}})


def _blocks(
    decode: Callable[..., Iterator[Samples]], request: dict[str, Any]
) -> Generator[tuple[int, Samples]]:
    """How many channels come one after another, and blocks `[T]` that each fit into a slot."""
    options = dict(request)
    source, opener = options.pop("source"), options.pop("opener")
    options["block_seconds"] = SLOT_SAMPLES / options["sampling_rate"]
    if options.pop("is_part"):
        decode = stream_part
    with nullcontext(source) if opener is None else _function(opener)(source) as opened:
        if options["channel"] != "each":
            yield from ((1, block) for block in decode(opened, **options))
            return
        count = chosen_track(opened, options["track"]).channels
        for number in range(1, count + 1):
            options["channel"] = number
            yield from ((count, block) for block in decode(opened, **options))


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), attribute)
    return found


def _described(error: Exception) -> dict[str, str]:
    return {
        "module": type(error).__module__,
        "class": type(error).__qualname__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
