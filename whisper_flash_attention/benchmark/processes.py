"""Run functions in processes of their own, whose failures are reported.

A server imports the heavy packages once and forks a process for every call, so that a call starts
in milliseconds, without a CUDA context or state of the call before it. The output of a process goes
to a log, from which the reason of a failure is read.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

# Imported by the server once instead of by every row.
PRELOAD = (
    "transformers.generation",
    "transformers.models.whisper.modeling_whisper",
    "whisper_flash_attention.benchmark.measure",
    "whisper_flash_attention.modeling_whisper_flash_attention",
)
START_TIMEOUT = 600.0  # seconds; the first process waits for the server's imports
PATIENCE = 10.0  # seconds that a process gets to end after SIGTERM
LONGEST_REASON = 200  # characters of a reason that go into a table

# The last line of a traceback: "torch.OutOfMemoryError: CUDA out of memory. Tried ..."
EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:: .*)?$")


class ProcessFailed(Exception):
    """The process raised, died or took too long. `reason` is one line, `log` all it printed."""

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


@dataclass(frozen=True)
class Workers:
    """Starts processes."""

    context: ForkServerContext | SpawnContext

    def call(
        self,
        function: Callable[..., Result],
        *arguments: object,
        timeout: float,
        on_progress: Callable[[Any], None] | None = None,
    ) -> Result:
        """Run `function(*arguments)` in a process of its own.

        Args:
            function: a function of a module that can be imported.
            arguments: pickled, as the result is.
            timeout: seconds after which the process is ended.
            on_progress: if given, the function gets a last argument more: a callable that passes
                its argument to `on_progress` in this process.

        Raises:
            ProcessFailed: the function raised, the process died, or the timeout was reached.
        """
        receiver, sender = self.context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="whisper-flash-") as folder:
            log = Path(folder) / "log"
            log.touch()
            process = self.context.Process(
                target=_serve,
                args=(sender, str(log), function, arguments, on_progress is not None),
            )
            try:
                process.start()
                sender.close()
                result: Result = _await_result(process, receiver, log, timeout, on_progress)
                process.join(PATIENCE)
            finally:
                receiver.close()
                _stop(process)
        return result


def start_server() -> ForkServerContext | SpawnContext:
    """Start the server and its imports, without waiting for them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    # A process forked from one that used CUDA cannot use the GPU. The server inherits this: PyTorch
    # counts devices through the driver's library, without initialising CUDA.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    forkserver.ensure_running()
    return context


def start_workers(device: str) -> Workers:
    """Processes that can use this device.

    Forked processes need a server that never used CUDA. If importing a package did, every process
    is spawned instead, some seconds slower.
    """
    workers = Workers(start_server())
    if device.startswith("cuda") and workers.call(cuda_is_spent, timeout=START_TIMEOUT):
        return Workers(multiprocessing.get_context("spawn"))
    return workers


@contextmanager
def interruptions_ignored() -> Iterator[None]:
    """Ignore Ctrl-C, as do processes that are started meanwhile, from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM raise `SystemExit`, so that processes and temporary folders are cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # one is enough: another would stop the clearing away
    raise SystemExit(128 + number)


def cuda_is_spent() -> bool:
    """Whether this process was forked from one that had used CUDA, and so cannot use it."""
    import torch

    return torch.cuda._is_in_bad_fork()


def reason_of(log: str, exit_code: int | None) -> str:
    """Why a process ended, in one line: the exception, or its exit status and last output."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    traceback = max((i for i, s in enumerate(lines) if s.startswith("Traceback")), default=None)
    if traceback is not None:
        for line in lines[traceback + 1 :]:
            if EXCEPTION.match(line):
                return _shortened(line)
    died = f"died with exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        died = f"was killed by {signal.Signals(-exit_code).name}"
        if -exit_code == signal.SIGKILL:
            died += " (perhaps out of memory)"
    # The last line of output; stacks of all threads come after "Fatal Python error".
    fatal = next((i for i, s in enumerate(lines) if s.startswith("Fatal Python error")), None)
    words = lines if fatal is None else lines[:fatal] or lines[fatal : fatal + 1]
    return _shortened(f"the process {died}" + (f": {words[-1]}" if words else ""))


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"


def _serve(
    sender: Connection,
    log: str,
    function: Callable[..., object],
    arguments: tuple[object, ...],
    reports: bool,
) -> None:
    """In the process: output to the log, then the call. An exception ends it with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    if not Path(log).exists():
        return  # the parent was interrupted meanwhile and has removed the folder
    with open(log, "a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    if reports:
        arguments = (*arguments, lambda value: sender.send((False, value)))
    sender.send((True, function(*arguments)))
    sender.close()


def _await_result(
    process: BaseProcess,
    receiver: Connection,
    log: Path,
    timeout: float,
    on_progress: Callable[[Any], None] | None,
) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        ready = wait([receiver, process.sentinel], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ProcessFailed(f"took longer than {timeout:g} s", _read(log))
        message = _receive(receiver)
        if message is None:
            process.join(PATIENCE)
            text = _read(log)
            raise ProcessFailed(reason_of(text, process.exitcode), text)
        is_result, value = message
        if is_result:
            return value
        if on_progress is not None:
            on_progress(value)


def _receive(receiver: Connection) -> tuple[bool, Any] | None:
    """The next message, also of a process that has ended since; None if there is none."""
    try:
        message: tuple[bool, Any] | None = receiver.recv() if receiver.poll() else None
    except EOFError:
        return None
    return message


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _stop(process: BaseProcess) -> None:
    """End the process if it is alive, by SIGTERM, then by SIGKILL."""
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(PATIENCE)
    process.close()
