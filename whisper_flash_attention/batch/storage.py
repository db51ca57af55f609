"""Where recordings are: local folders and patterns, and whatever fsspec opens by its URL."""

from __future__ import annotations

import io
import math
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from whisper_flash_attention.batch.items import BYTES_PER_SECOND, Item
from whisper_flash_attention.errors import AudioError, MissingPackage, OptionError, is_bug
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES, find_inputs

Result = TypeVar("Result")

# Protocols in front of "://", of which those that end in "::" are layers (`simplecache::s3://`).
# A "::" elsewhere is part of a name: `call::1.wav`.
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")
# Of reads from storage: packages that have no buffer of their own must not be called for bytes.
_BUFFER_BYTES = 1 << 18

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class StorageError(OSError):
    """A storage package raised something that is no `OSError`; the message has it and its class."""


def is_url(path: str) -> bool:
    """Whether fsspec is to open it: `s3://bucket/talk.mp3`, `zip://talk.mp3::talks.zip`."""
    return _URL.match(path) is not None


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A local file or a URL, open for reading bytes.

    Raises:
        OSError: it cannot be opened, or a read fails; `StorageError` where the package for the URL
            raised something else.
        MissingPackage: the URL's protocol needs a package that is not installed.
        AudioError: a local path is a pipe, a device or a socket, which might never end.
    """
    if not is_url(path):
        refuse_special_file(path)
        with Path(path).open("rb") as file:
            yield file
        return
    with ExitStack() as stack:
        raw = _StoredFile(_opened_by_fsspec(path, stack))
        yield io.BufferedReader(raw, _BUFFER_BYTES)


def _opened_by_fsspec(path: str, stack: ExitStack) -> Any:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        found = fsspec.open(path, "rb")
        # Of a cache in front of another file system, the latter.
        if isinstance(getattr(found.fs, "fs", found.fs), LocalFileSystem):
            refuse_special_file(found.path)
        return stack.enter_context(found)
    except (OSError, AudioError):
        raise
    except ImportError as error:
        raise _missing(f"{path}:", error) from error
    except Exception as error:  # a bug, too: the URL chose the class and gave it its arguments
        raise _storage_error(error) from error


class _StoredFile(io.RawIOBase):
    """A file of a storage package, whose exceptions are `OSError`s unless they are bugs."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(_stored(self._file.seekable))

    def readinto(self, buffer: Any) -> int:
        data = _stored(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return _stored(lambda: int(self._file.seek(offset, whence)))

    def tell(self) -> int:
        return _stored(lambda: int(self._file.tell()))


def _stored(call: Callable[[], Result]) -> Result:
    try:
        return call()
    except OSError:
        raise
    except Exception as error:  # storage packages raise whatever they like
        if is_bug(error):
            raise
        raise _storage_error(error) from error


def _storage_error(error: Exception) -> StorageError:
    return StorageError(f"{type(error).__name__}: {error}")


def refuse_special_file(path: str) -> None:
    """Raise `AudioError` for a local pipe, device or socket, which may block or never end.

    A path that cannot be looked at is left to whoever opens it, which says why.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return
    if kind in _KINDS:
        raise AudioError(
            f"{printable(path)}: is {_KINDS[kind]}, not a file; write what comes out of it to one"
        )


def check_protocols(items: Iterable[Item]) -> None:
    """Raise `MissingPackage` or `OptionError` if no recording is at a place that can be read here.

    Where only some cannot, each of those becomes a row with its error.
    """
    reason: MissingPackage | OptionError | None = None
    for protocol in {_protocol(item.path) if is_url(item.path) else None for item in items}:
        if protocol is None:
            return
        try:
            _file_system_class(protocol)
            return
        except (MissingPackage, OptionError) as error:
            reason = error
    if reason is not None:
        raise reason


def _protocol(url: str) -> str:
    return url.split("://")[0].split("::")[-1]


def _file_system_class(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise _missing(f"{protocol}://", error) from error
    except ValueError as error:
        raise OptionError(f"{protocol}:// is unknown to fsspec: {error}") from error


# Packages of fsspec's for the storage that people use most; its messages name them.
_STORAGE_PACKAGE = re.compile(r"\b(?:s3fs|gcsfs|adlfs|aiohttp)\b")


def _missing(place: str, error: ImportError) -> MissingPackage:
    """What to install for a place, as far as fsspec's message tells."""
    if found := _STORAGE_PACKAGE.search(str(error)):
        return MissingPackage(
            f"{place} needs the package {found[0]}, which is not installed: pip install {found[0]}"
        )
    return MissingPackage(f"{place} needs a package of its own: {error}")


def recordings_in(source: str) -> list[Item]:
    """The recordings of a folder, a pattern or a URL of either, sorted by path.

    Their ids are their paths below the folder, or below the fixed part of the pattern.

    Raises:
        OptionError: there are none, or the place cannot be listed.
        MissingPackage: the URL's protocol needs a package that is not installed.
    """
    return _remote(source) if is_url(source) else _local(source)


def _local(source: str) -> list[Item]:
    return [
        Item(utf8_id(entry.place.as_posix()), entry.name, seconds=_guess(_size(entry.name)))
        for entry in find_inputs([source])
    ]


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None  # decoding will say what is wrong with it


def _remote(source: str) -> list[Item]:
    import fsspec

    _file_system_class(_protocol(source))
    try:
        system, root = fsspec.url_to_fs(source)
        root = root.rstrip("/")
        found = _listed(system, root)
    except ImportError as error:
        raise _missing(f"{source}:", error) from error
    except Exception as error:  # storage packages raise whatever they like
        reason = error if isinstance(error, OSError) else _storage_error(error)
        raise OptionError(f"{source}: cannot be listed ({reason})") from error
    base = _fixed(root)
    if list(found) == [root]:
        base = posixpath.dirname(root)
    chain = source.split("::")[1:]  # what the outermost file system lies in
    items = [
        Item(
            utf8_id(posixpath.relpath(name, base) if base else name),
            "::".join([system.unstrip_protocol(name), *chain]),
            seconds=_guess(about.get("size")),
        )
        for name, about in sorted(found.items())
        if posixpath.splitext(name)[1].lower() in RECORDING_SUFFIXES
    ]
    if not items:
        raise OptionError(f"{source}: holds no recordings (wav, flac, mp3, m4a, ogg ...)")
    return items


def _listed(system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Files by name, with what the file system tells about each."""
    if not has_magic(root):
        return dict(system.find(root, detail=True))
    found: dict[str, dict[str, Any]] = {}
    for name, about in system.glob(root, detail=True).items():
        if about["type"] == "directory":
            found |= system.find(name, detail=True)
        else:
            found[name] = about
    return found


def _fixed(pattern: str) -> str:
    """The folders in front of the first part that can match several names."""
    parts = pattern.split("/")
    fixed = next((number for number, part in enumerate(parts) if has_magic(part)), len(parts))
    return "/".join(parts[:fixed])


def _guess(size: object) -> float | None:
    """Seconds from a size in bytes, as far as a file system knows it."""
    known = isinstance(size, int | float) and math.isfinite(size) and size >= 0
    return float(size) / BYTES_PER_SECOND if known else None  # type: ignore[arg-type]


def utf8_text(text: str) -> str:
    """The text with bytes that are not UTF-8, which names of files may have, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def utf8_id(name: str) -> str:
    """A file's name as an id: the name itself wherever it is UTF-8, and never another file's.

    Bytes that are not UTF-8 are spelled `\\udce9`. In such names, and in those that hold such a
    spelling already, backslashes are doubled.
    """
    if _SPELLED_BYTE.search(name):
        name = name.replace("\\", "\\\\")
    return utf8_text(name)


_SPELLED_BYTE = re.compile(r"[\ud800-\udfff]|\\ud[89a-f][0-9a-f]{2}")
