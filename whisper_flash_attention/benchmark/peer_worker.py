"""The process that a system has for itself: it loads, transcribes, and reports time and memory."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from whisper_flash_attention.benchmark.peer_systems import SYSTEMS, Setup, Texts

GB = 1e9


@dataclass(frozen=True)
class Call:
    """What a call took and gave; memory in units of 1e9 bytes, of the process so far."""

    seconds: float
    first_seconds: float | None
    text: str
    tokens: int | None
    rss_gb: float


def serve_calls(connection: Connection, name: str, setup: Setup, peers: str | None) -> None:
    """In a process of its own: load, then a recording for every message."""
    if peers is not None:
        sys.path.append(peers)
    try:
        start = time.perf_counter()
        transcribe, settings = SYSTEMS[name].load(setup)
        connection.send((settings, time.perf_counter() - start))
        while message := connection.recv():
            path, language = message
            texts = Texts()
            start = time.perf_counter()
            transcribe(path, language, texts)
            took = time.perf_counter() - start
            call = Call(took, texts.first_seconds, texts.text, texts.tokens, peak_of_tree())
            connection.send(call)
    except Exception as error:  # of a package that is not ours: its row says what it was
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}"[:300])


def peak_of_tree() -> float:
    """Peak resident memory of this process and of those that it started, of each by itself.

    Unlike `peak_rss`, it does not begin with the memory of the process that started this one.
    """
    return sum(_peaks(os.getpid())) / GB


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
