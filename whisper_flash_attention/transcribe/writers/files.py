"""Replace files atomically, and write a transcription into a file with a name of its own.

Some file systems take two names for one: `A.srt` and `a.srt`, or two forms of `é`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.transcribe.results import Transcription
from whisper_flash_attention.transcribe.writers.formats import render


def write(
    transcription: Transcription,
    path: str | os.PathLike[str],
    output_format: str | None = None,
    *,
    options: SubtitleOptions | None = None,
    overwrite: bool = False,
) -> None:
    """Write `path` in UTF-8, whole or not at all: an interrupted write leaves what was there.

    Args:
        transcription: of one recording.
        path: in a folder that exists.
        output_format: one of `FORMATS`; None is that which the name ends in.
        options: the layout of subtitles.
        overwrite: replace a file that is there.

    Raises:
        OptionError: the format is unknown, the file is there already and not to be overwritten, or
            it cannot be written.
    """
    path = Path(path)
    text = render(transcription, output_format or path.suffix.removeprefix("."), options)
    try:
        if not overwrite and path.is_file():
            raise OptionError(f"{path}: exists already; overwrite=True replaces it")
        replace_file(path, text.encode(), durable=False)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror})") from error


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file atomically; follow symbolic links.

    Args:
        durable: wait until it is on the disk, so that it outlives a loss of power.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    target = Path(os.path.realpath(path))
    # Short, as the file's own name may be as long as the file system allows.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):  # a file system that has become read-only, say
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        with suppress(OSError):  # where folders cannot be opened, or not synchronised
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the directory entry
            finally:
                os.close(descriptor)


def folded(name: str) -> str:
    """Return the same text for all names that any file system takes for one."""
    return normalize("NFKC", normalize("NFKC", name).casefold())


def colliding(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names that fold into an earlier one's text, each with that earlier one."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(folded(name), name), name) for name in names)
    return [(earlier, name) for earlier, name in pairs if earlier != name]


def distinguishes_names(folder: Path) -> bool:
    """Whether the file system of a folder distinguishes upper and lower case, and Unicode forms.

    It is tried with a temporary file. Raises `OSError` if that fails.
    """
    name = f".{uuid.uuid4().hex}-\u00e9.tmp"
    probe = folder / name
    probe.touch()
    try:
        others = (name.upper(), normalize("NFD", name))
        return not any((folder / other).exists() for other in others)
    finally:
        with suppress(FileNotFoundError):
            probe.unlink()
