"""The process that decodes for a `DecoderPool`, one recording at a time.

It imports NumPy, PyAV and the decoding of this package. Requests come as lines of JSON on its
standard input, replies leave as such lines, samples through a `SampleRing`. When standard input
ends, the process ends at once, so that no worker outlives its parent.

    parent → worker    {"decode": fields of a `DecodeRequest`}   {"taken": true}   {"stop": true}
    worker → parent    {"ready": true}   {"begun": true}   {"block": [slot, samples]}   {"log": ...}
                       {"done": channels} {"failed": module, class, message and traceback}
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from importlib import import_module
from queue import SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from typing import Any, BinaryIO

from whisper_flash_attention.audio.audio_source import chosen_track
from whisper_flash_attention.audio.decoder_process import SLOT_SAMPLES, SLOTS, SampleRing
from whisper_flash_attention.audio.samples import Samples


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
        channels = 1
        try:
            with closing(_blocks(decode, request)) as blocks:
                for count, block in blocks:
                    channels = count
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
            replies.send({"done": channels})


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
                self.requests.put(command["decode"])
            elif "taken" in command:
                self.free_slots.release()
            else:
                self.stopped.set()
        os._exit(0)


class _Replies:
    """The parent's end of standard output, on which nobody else writes any more."""

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
