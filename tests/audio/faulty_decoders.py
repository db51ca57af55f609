"""Decoders that crash, hang or misbehave on recordings with certain names.

Decoder processes import them by name; other recordings are decoded as ever.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from whisper_flash_attention.audio.audio_source import stream_audio
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.errors import OptionError

NAME = f"{__name__}:decode"


class OddError(Exception):
    """Of a module that is neither Python's nor the package's."""


def decode(source: Any, **options: Any) -> Iterator[Samples]:
    """Decode as `stream_audio`, unless the recording's name is that of a fault."""
    fault = _FAULTS.get(Path(source).stem) if isinstance(source, str) else None
    if fault is not None:
        fault(Path(source))
    yield from stream_audio(source, **options)


def count_blocks(source: str, **options: Any) -> Iterator[Samples]:
    """Give as many blocks as the name has in front of a dash, and a byte to that file for each.

    Of "0" the only block waits for a file "go" beside it.
    """
    path = Path(source)
    blocks = int(path.name.partition("-")[0])
    while not blocks and not path.with_name("go").exists():
        time.sleep(0.01)
    for _ in range(max(blocks, 1)):
        with path.open("ab") as file:
            file.write(b".")
        yield np.zeros(1_000, np.float32)


@contextmanager
def opened(source: str) -> Iterator[BinaryIO]:
    """Open what is called `stored:PATH`; raise what storage packages do for other names."""
    if not source.startswith("stored:"):
        raise PermissionError(13, "forbidden", source)
    with open(source.removeprefix("stored:"), "rb") as file:
        yield file


def raise_bug(source: Any, **options: Any) -> Iterator[Samples]:
    """Raise what is a bug of the program, named by the recording."""
    raise getattr(builtins, Path(source).stem)("a bug")


def _signalled(number: int) -> Any:
    def fault(path: Path) -> None:
        os.kill(os.getpid(), number)

    return fault


def _raising(error: Exception) -> Any:
    def fault(path: Path) -> None:
        raise error

    return fault


def _wait(path: Path) -> None:
    path.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(1_000)


def _spin(path: Path) -> None:
    while True:
        pass


def _print(path: Path) -> None:
    for _ in range(1_000):
        print("x" * 1_000)
        os.write(1, b'{"done": true}\n')
        os.write(2, b"y" * 1_000)


def _warn(path: Path) -> None:
    warnings.warn("of Python", UserWarning, stacklevel=1)
    logging.getLogger("whisper_flash_attention.audio.audio_source").warning("%s: warned", path.name)
    logging.getLogger("elsewhere").error("of another package")
    logging.getLogger("whisper_flash_attention").info("not wanted")


def _tell_modules(path: Path) -> None:
    raise ValueError(json.dumps(sorted(sys.modules)))


_FAULTS = {
    "segfault": _signalled(signal.SIGSEGV),
    "abort": _signalled(signal.SIGABRT),
    "killed": _signalled(signal.SIGKILL),
    "terminated": _signalled(signal.SIGTERM),
    "exits": lambda path: os._exit(3),
    "waits": _wait,
    "spins": _spin,
    "prints": _print,
    "warns": _warn,
    "modules": _tell_modules,
    "odd": _raising(OddError("quite odd")),
    "bug": _raising(TypeError("a bug")),
    "option": _raising(OptionError("no such option")),
    "unicode": _raising(UnicodeDecodeError("utf-8", b"x", 0, 1, "not text")),
}
