"""Functions for other processes to run; they must be importable there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from whisper_flash_attention.benchmark.roofline import Ceilings


def count_to_three(report: Callable[[int], None]) -> str:
    for number in (1, 2, 3):
        report(number)
    return "done"


def raise_with_several_lines() -> None:
    print("some output before")
    raise RuntimeError("first line\nsecond line")


def say_and_leave(words: str, code: int) -> None:
    print(words, file=sys.stderr, flush=True)
    os._exit(code)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    os.write(2, b"terminate called\n")
    os.abort()


def ignore_sigterm_and_sleep() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def imported_modules() -> list[str]:
    return sorted(sys.modules)


def peak_rss_growth(size: int) -> float:
    """How much the peak grows, in units of 1e9 bytes, when this many bytes were held."""
    from whisper_flash_attention.benchmark.measure import peak_rss

    before = peak_rss()
    held = bytearray(b"1") * size
    del held
    return peak_rss() - before


def known_ceilings(device: str, dtype: str) -> Ceilings:
    """Those of some CPU, at once; measured for other devices."""
    from whisper_flash_attention.benchmark.measure import measure_ceilings

    return Ceilings(1e10, 5e10) if device == "cpu" else measure_ceilings(device, dtype)
