"""Open a recording: a file by its name, bytes, or a file object; FFmpeg sees bytes only."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from whisper_flash_attention.audio.lengths import (
    CorrectedFile,
    Correction,
    length_correction,
    mp3_frames,
)
from whisper_flash_attention.audio.pyav import open_options
from whisper_flash_attention.audio.readable import name_of_file, readable
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.terminal import printable

if TYPE_CHECKING:
    from av.container import InputContainer

# A file's name, or what it holds: bytes, or a file that was opened for reading bytes.
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | io.RawIOBase

# Formats that announce no length: what FFmpeg reports for them is an estimate from the bit rate.
_LENGTH_IS_A_GUESS = frozenset(
    (
        *("aac", "ac3", "aptx", "aptx_hd", "amr", "amrnb", "amrwb", "dts", "eac3", "g722", "g726"),
        *("g726le", "gsm", "loas", "mlp", "sbc", "swf", "truehd"),
    )
)


@dataclass(frozen=True, slots=True)
class OpenedContainer:
    """A recording that FFmpeg reads.

    Args:
        name: what messages call it.
        container: PyAV's.
        announces_length: whether lengths in the container come from the file and are no estimate.
        mp3_frames: how many frames an mp3 file announces, if it does.
        correction: of the length in its header, if that was wrong.
    """

    name: str
    container: InputContainer
    announces_length: bool
    mp3_frames: int | None
    correction: Correction | None


def name_of(source: Source) -> str:
    """Return what messages call it, on one line that is safe to print."""
    if isinstance(source, str | os.PathLike):
        return printable(os.fsdecode(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>"
    return name_of_file(source)


@contextmanager
def open_container(source: Source) -> Iterator[OpenedContainer]:
    """Open a recording for as long as the context lasts.

    Raises:
        AudioError: it is missing, a folder, empty, or no recording; or reading it fails within the
            context.
    """
    import av

    name = name_of(source)
    try:
        # FFmpeg gets bytes instead of a name, and no protocol: a playlist can open nothing else.
        options = {"protocol_whitelist": "none"}
        with _opened(source) as file:
            if _is_empty(file):
                raise AudioError(f"{name}: the file is empty (0 bytes)")
            correction = length_correction(file)
            read = file if correction is None else cast(BinaryIO, CorrectedFile(file, correction))
            frames = mp3_frames(file)
            with av.open(read, mode="r", options=options, **open_options()) as container:
                kind = container.format.name
                is_guess = kind in _LENGTH_IS_A_GUESS or kind == "mp3"
                frames = frames if kind == "mp3" else None
                yield OpenedContainer(name, container, not is_guess, frames, correction)
    except FileNotFoundError as error:
        raise AudioError(f"{name}: there is no such file") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name}: is a folder, not a recording; name the files in it") from error
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise AudioError(f"{name}: is not a recording that can be read ({reason})") from error


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """Yield a file to read bytes from, which is closed afterwards if it was opened here."""
    found = readable(source)
    if isinstance(found, Path):
        with found.open("rb") as file:
            yield file
    elif isinstance(found, bytes):
        yield io.BytesIO(found)
    else:
        yield cast(BinaryIO, found)


def _is_empty(file: BinaryIO) -> bool:
    file.seek(0)
    empty = not file.read(1)
    file.seek(0)
    return empty
