"""Bounded reading of untrusted files, and the one boundary around third-party parsers."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import torch

from whisper_flash_attention.errors import WeightsError, WhisperFlashError
from whisper_flash_attention.weights.checkpoint import Convert, Shape, shorten

# The largest JSON files of Whisper: a tokenizer has 4 MB, a configuration 20 kB. Parsed JSON takes
# up to about 30 times its size.
LARGEST_TOKENIZER = 16 << 20
LARGEST_CONFIG = 1 << 20

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading in binary; never block on a named pipe or a device.

    Raises:
        WeightsError: the path cannot be opened or is not a regular file.
    """
    # Opening a named pipe waits for a writer unless it is opened without blocking; the check comes
    # after opening, so that the file that was checked is the file that is read.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: NUL or lone surrogates in the name
        raise WeightsError(f"{path}: cannot be opened ({_reason(error)})") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        found = _KINDS.get(kind, "no file")
        raise WeightsError(f"{path}: is {found}, expected a regular file")
    return os.fdopen(descriptor, "rb")


def check_regular(path: Path) -> int:
    """Return the size of a readable regular file in bytes.

    Raises:
        WeightsError: as `open_regular`.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or shorten(error, 200)


@contextmanager
def third_party_parser(message: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn whatever a third-party parser raises for a file into a `WeightsError`.

    Transformers, tokenizers and safetensors document no set of exceptions for malformed input and
    raise whatever their code runs into (AttributeError, KeyError, ZeroDivisionError, Rust panics,
    ...), so a list of types would miss some. Errors of this package pass unchanged, and so does
    every exception that a line of this package raises: that is a bug, not a bad file. Interrupts
    and exits pass, too.

    Args:
        message: makes the message from the exception; it names the file or the model.

    Raises:
        WeightsError: the parser failed, or memory ran out.
    """
    try:
        yield
    except WhisperFlashError:
        raise
    except BaseException as error:
        # A Rust panic derives from BaseException alone, but it is no interrupt.
        is_failure = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_failure or _is_raised_here(error):
            raise
        raise WeightsError(message(error)) from error


def cannot_load(path: object, what: str) -> Callable[[BaseException], str]:
    """Make the messages of `third_party_parser` for a file or folder."""
    return lambda error: f"{path}: cannot load its {what} ({describe_error(error)})"


def _is_raised_here(error: BaseException) -> bool:
    """Whether the line that raised is one of this package; no third-party code lies below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raising = "" if trace is None else trace.tb_frame.f_code.co_filename
    # Lines of this function's caller, which only re-raises, do not count.
    return raising.startswith(_PACKAGE) and raising != __file__


def describe_error(error: BaseException) -> str:
    """Describe an exception of another package in one short line."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = shorten(lines[0], 200).rstrip(".") if lines else "no reason given"
    # Texts of other types ("'int' object is not iterable", a bare key) need their type.
    clear = isinstance(error, OSError | ValueError)
    return reason if clear else f"{type(error).__name__}: {reason}"


class JoinedFiles:
    """Files read by position as if they were one; usually there is just one. A context manager.

    Raises:
        WeightsError: a file cannot be opened or read, or ends too early.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = str(paths[0]) if len(paths) == 1 else " + ".join(str(path) for path in paths)
        self._paths = tuple(paths)
        self._stack = ExitStack()
        self._files: list[tuple[int, int, BufferedReader]] = []  # first byte, size, file
        self._maps: dict[int, mmap.mmap] = {}
        self.size = 0

    def __enter__(self) -> Self:
        with ExitStack() as opened:  # closes what is open if a later file cannot be opened
            for path in self._paths:
                file = opened.enter_context(open_regular(path))
                size = os.fstat(file.fileno()).st_size
                self._files.append((self.size, size, file))
                self.size += size
            self._stack = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, position: int, count: int) -> bytearray:
        """Read `count` bytes; nothing is allocated unless the files hold that many."""
        if count > self.size - position:
            left = max(0, self.size - position)
            raise WeightsError(
                f"{self.name}: truncated: {count} bytes are needed at byte {position}, {left} left"
            )
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        try:
            for start, size, file in self._files:
                here = position + done - start
                if 0 <= here < size and done < count:
                    file.seek(here)
                    wanted = min(count - done, size - here)
                    done += _read_fully(file, view[done : done + wanted])
        except OSError as error:
            raise WeightsError(f"{self.name}: cannot be read ({error})") from error
        if done < count:
            raise WeightsError(f"{self.name}: became shorter while it was read")
        return data

    def tensor(
        self, position: int, dtype: torch.dtype, shape: Shape, convert: Convert | None = None
    ) -> torch.Tensor:
        """Read a dense tensor that begins at byte `position`.

        Args:
            convert: applied to the tensor. If it returns it as it is, the tensor lies in the mapped
                file where its address allows that; without `convert`, in memory of its own.
        """
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        probe = torch.empty(0, dtype=dtype)
        is_kept = convert is not None and convert(probe) is probe
        is_aligned = position % dtype.itemsize == 0
        mapped = self._map(position, size) if is_kept and is_aligned else None
        data = self.read(position, size) if mapped is None else mapped
        tensor = torch.frombuffer(data, dtype=dtype).reshape(shape)
        return tensor if convert is None else convert(tensor)

    def _map(self, position: int, count: int) -> memoryview | None:
        """Bytes where they lie in a file, mapped as a private copy; None if in more than one.

        The mapping outlives the object. Whoever shortens the file ends processes that use it.
        """
        for index, (start, size, file) in enumerate(self._files):
            if start <= position and position + count <= start + size:
                if index not in self._maps:
                    # What is written to it stays in this process.
                    self._maps[index] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                here = position - start
                return memoryview(self._maps[index])[here : here + count]
        return None


def _read_fully(file: BufferedReader, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def read_json(path: Path, limit: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes.

    Raises:
        WeightsError: the file is missing, not regular, too large, not JSON, or not an object.
    """
    content = parse_json(path, limit)
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def parse_json(path: Path, limit: int = LARGEST_CONFIG) -> Any:
    """Read any JSON value; see `read_json`."""
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({_reason(error)})") from error
    if len(data) > limit:
        raise WeightsError(f"{path}: more than {limit} bytes, too many for this JSON file")
    return decode_json(str(path), data)


def decode_json(name: str, data: bytes | bytearray) -> Any:
    """Parse JSON text of bounded size, of UTF-8 without lone surrogates.

    Raises:
        WeightsError: not JSON; the message begins with `name`.
    """
    try:
        content = json.loads(data.decode("utf-8"))
        # An escape such as \\ud800 makes text that no file name, terminal or Rust parser takes.
        if _SURROGATE.search(data):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{name}: not JSON ({shorten(error, 200)})") from error
    return content
