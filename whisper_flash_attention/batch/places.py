"""Where recordings are: local folders and patterns, and whatever fsspec opens by its URL."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from whisper_flash_attention.batch.items import BYTES_PER_SECOND, Item
from whisper_flash_attention.errors import MissingPackage, OptionError
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES, find_inputs


def is_url(path: str) -> bool:
    """Whether fsspec is to open it: `s3://bucket/talk.mp3`, `zip://talk.mp3::talks.zip`."""
    return "://" in path or "::" in path


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A local file or a URL, open for reading bytes.

    Raises what the place's own package raises: `OSError` for most, others for some.
    """
    if not is_url(path):
        with Path(path).open("rb") as file:
            yield file
        return
    import fsspec

    with fsspec.open(path, "rb") as file:
        yield cast("BinaryIO", file)


def check_protocols(items: Iterable[Item]) -> None:
    """Raise `MissingPackage` or `OptionError` if a URL's protocol cannot be spoken here."""
    for name in {item.path.split("://")[0] for item in items if is_url(item.path)}:
        _file_system_class(name.split("::")[-1])


def _file_system_class(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise MissingPackage(f"{protocol}:// needs a package of its own: {error}") from error
    except ValueError as error:
        raise OptionError(f"{protocol}:// is unknown to fsspec: {error}") from error


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
        Item(printable(entry.place.as_posix()), entry.name, seconds=_guess(_size(entry.name)))
        for entry in find_inputs([source])
    ]


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None  # decoding will say what is wrong with it


def _remote(source: str) -> list[Item]:
    import fsspec

    _file_system_class(source.split("://")[0].split("::")[-1])
    try:
        system, root = fsspec.url_to_fs(source)
        root = root.rstrip("/")
        found = _listed(system, root)
    except OSError as error:
        raise OptionError(f"{source}: cannot be listed ({error})") from error
    base = _fixed(root)
    if list(found) == [root]:
        base = posixpath.dirname(root)
    chain = source.split("::")[1:]  # what the outermost file system lies in
    items = [
        Item(
            posixpath.relpath(name, base) if base else name,
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


def _guess(size: int | None) -> float | None:
    return None if size is None else size / BYTES_PER_SECOND


def printable(text: str) -> str:
    """The text with bytes that are not UTF-8, which names of files may have, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
