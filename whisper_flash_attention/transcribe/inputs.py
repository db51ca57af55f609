"""Which recordings a command line means: files, folders, patterns and standard input."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import cast

from whisper_flash_attention.audio.load import Source
from whisper_flash_attention.audio.readable import CHUNK, spool
from whisper_flash_attention.errors import OptionError

STANDARD_INPUT = "-"

# In a folder, what does not end like this is not taken for a recording.
RECORDING_SUFFIXES = frozenset(
    (
        *(".3g2", ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".avi"),
        *(".caf", ".flac", ".flv", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp2", ".mp3"),
        *(".mp4", ".mpeg", ".mpg", ".oga", ".ogg", ".ogv", ".opus", ".spx", ".tta", ".w64", ".wav"),
        *(".webm", ".wma", ".wmv", ".wv"),
    )
)


@dataclass(frozen=True, slots=True)
class Input:
    """One recording.

    Args:
        name: what messages and results call it: its path, or "stdin".
        place: its path below the folder (or below the fixed part of the pattern) that was named;
            of a file that was named itself, its name alone.
        named: whether it was named itself.
    """

    name: str
    place: Path
    named: bool = True

    def source(self) -> Source:
        """Return what `load_audio` takes; standard input is read to its end for it.

        Raises `OptionError` if standard input is a terminal, `AudioError` if it has no end.
        """
        return self.name


class StandardInput(Input):
    """The recording that comes through standard input."""

    def source(self) -> Source:
        if sys.stdin.isatty():
            raise OptionError("'-' reads a recording from standard input, which is a terminal here")
        # Read here and not in the thread that decodes, so that Ctrl-C can end the waiting; and to
        # its end, because some formats are not read rightly where one cannot go back.
        read = cast("io.BufferedReader", sys.stdin.buffer).read1
        return spool(iter(lambda: read(CHUNK), b""), self.name)


def find_inputs(arguments: Sequence[str]) -> list[Input]:
    """Return the recordings in the order of the arguments, those of a folder sorted, none twice.

    Args:
        arguments: files, whether they exist or not; folders, in which everything that ends in one
            of `RECORDING_SUFFIXES` is taken, at any depth, unless it or a folder on the way is
            hidden; patterns (`talks/**/*.mp3`), which take from what they match as from a folder;
            and "-", standard input.

    Raises:
        OptionError: a folder or pattern leads to no recordings, or a folder cannot be read.
    """
    found: dict[str, Input] = {}
    for argument in arguments:
        for entry in _inputs(argument):
            key = argument if argument == STANDARD_INPUT else os.path.abspath(entry.name)
            found.setdefault(key, entry)
    return list(found.values())


def _inputs(argument: str) -> list[Input]:
    if argument == STANDARD_INPUT:
        return [StandardInput("stdin", Path("stdin"))]
    path = Path(argument)
    if path.is_dir():
        matches, base = [path], path
    elif has_magic(argument) and not path.exists():
        matches, base = [Path(match) for match in glob(argument, recursive=True)], _fixed(path)
    else:
        return [Input(argument, Path(path.name))]
    recordings = sorted({recording for match in matches for recording in _recordings(match)})
    if not recordings:
        what = "holds" if path.is_dir() else "matches"
        raise OptionError(f"{argument}: {what} no recordings (wav, flac, mp3, m4a, ogg ...)")
    return [Input(str(path), path.relative_to(base), named=False) for path in recordings]


def _fixed(pattern: Path) -> Path:
    """The folders in front of the first part that can match several names."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    return Path(*parts[:first])


def _recordings(path: Path) -> Iterator[Path]:
    """Recordings in a folder at any depth, or the file itself if its name is a recording's."""
    if not path.is_dir():
        if path.suffix.lower() in RECORDING_SUFFIXES:
            yield path
        return
    for folder, folders, files in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            # A hidden file is often another program's note on the recording of the same name.
            if not name.startswith(".") and Path(name).suffix.lower() in RECORDING_SUFFIXES:
                yield Path(folder, name)


def _refuse(error: OSError) -> None:
    raise OptionError(f"{error.filename}: cannot be read ({error.strerror})") from error
