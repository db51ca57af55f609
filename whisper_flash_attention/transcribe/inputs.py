"""Find the recordings of a command line: files, folders, patterns and standard input."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Literal, cast

from whisper_flash_attention.audio.container import CHUNK, Source, spool
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.writers.files import folded

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
            of a file that was named itself, its name alone. It begins with further folders where
            another recording would have the same.
        named: whether it was named itself.
        suffixed: whether its results keep the suffix of its name, because another recording has the
            same name but for that.
    """

    name: str
    place: Path
    named: bool = True
    suffixed: bool = False

    @property
    def stem(self) -> str:
        """What the names of its results begin with."""
        return self.place.name if self.suffixed else self.place.stem

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
        OptionError: a folder or pattern leads to no recordings, or a folder cannot be read; the
            only argument is a file that is not there.
    """
    if len(arguments) == 1 and _is_missing(arguments[0]):
        raise OptionError(f"{arguments[0]}: there is no such file")
    found: dict[str, Input] = {}
    for argument in arguments:
        for entry in _inputs(argument):
            key = argument if argument == STANDARD_INPUT else os.path.abspath(entry.name)
            found.setdefault(key, entry)
    return _apart(found)


def _apart(found: dict[str, Input]) -> list[Input]:
    """The recordings, found by their absolute paths, with places and names that no other has."""
    entries, before = _in_folders(found), found
    while entries != before:  # a longer place may be that of another argument's recording
        entries, before = _in_folders(entries), entries
    suffixed: set[str] = set()
    while True:
        by_name = defaultdict(list)
        for key, entry in entries.items():
            name = entry.place if key in suffixed else entry.place.with_suffix("")
            by_name[folded(str(name))].append(key)
        # Equal but for their case is no reason: a suffix would be the same for both.
        shared = {
            key
            for keys in by_name.values()
            if len({folded(str(entries[key].place)) for key in keys}) > 1
            for key in keys
        }
        if shared <= suffixed:
            return [replace(entry, suffixed=key in suffixed) for key, entry in entries.items()]
        suffixed |= shared


def _in_folders(entries: dict[str, Input]) -> dict[str, Input]:
    """The same; those of equal places get the folders that distinguish them."""
    by_place = defaultdict(list)
    for key, entry in entries.items():
        by_place[entry.place].append(key)
    places: dict[str, Path] = {}
    for keys in by_place.values():
        if len(keys) > 1 and STANDARD_INPUT not in keys:
            parts = {key: Path(key).parts for key in keys}
            # Without the first part, which is the root or a drive, even where drives differ.
            shared = max(1, len(os.path.commonprefix([*parts.values()])))  # noqa: RUF071, of parts
            places |= {key: Path(*each[shared:]) for key, each in parts.items()}
    return {
        key: replace(entry, place=places.get(key, entry.place)) for key, entry in entries.items()
    }


def _is_missing(argument: str) -> bool:
    is_path = argument != STANDARD_INPUT and not has_magic(argument)
    return is_path and path_kind(argument) == "missing"


def _inputs(argument: str) -> list[Input]:
    if argument == STANDARD_INPUT:
        return [StandardInput("stdin", Path("stdin"))]
    path = Path(argument)
    kind = path_kind(argument)
    if kind == "folder":
        matches, base = [path], path
    elif has_magic(argument) and kind == "missing":
        matches, base = _matches(argument), _fixed(path)
    else:
        return [Input(argument, Path(path.name))]
    recordings = sorted({recording for match in matches for recording in _recordings(match)})
    if not recordings:
        what = "holds" if kind == "folder" else "matches"
        raise OptionError(f"{argument}: {what} no recordings (wav, flac, mp3, m4a, ogg ...)")
    return [Input(str(path), path.relative_to(base), named=False) for path in recordings]


def _matches(pattern: str) -> list[Path]:
    try:
        return [Path(match) for match in glob(pattern, recursive=True)]
    except RecursionError as error:
        raise OptionError(f"{pattern}: there are too many folders in one another") from error


def _fixed(pattern: Path) -> Path:
    """The folders in front of the first part that can match several names."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    return Path(*parts[:first])


def _recordings(path: Path) -> Iterator[Path]:
    """Recordings in a folder at any depth, or the file itself if its name is a recording's."""
    if path_kind(str(path)) != "folder":
        if path.suffix.lower() in RECORDING_SUFFIXES:
            yield path
        return
    # Not `os.walk`, which on Python 3.11 cannot go as deep as folders can.
    waiting = [str(path)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as found:
                # A hidden file is often another program's note on the recording of the same name.
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # so deep that nothing in it can be opened
                yield Path(folder)  # which fails as one recording, and costs no other
                continue
            raise OptionError(f"{folder}: cannot be read ({error.strerror})") from error
        for entry in entries:
            if _is_folder(entry):
                # A link to a folder is not followed: it may lead back to where it is.
                waiting += [] if entry.is_symlink() else [entry.path]
            elif Path(entry.name).suffix.lower() in RECORDING_SUFFIXES:
                yield Path(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle, say; opening it will tell
        return False


def path_kind(path: str) -> Literal["missing", "folder", "file"]:
    """Whether there is a folder at a path, something else, or nothing.

    Raises `OptionError` if that cannot be found out: a name too long or with a NUL, a folder on the
    way that may not be searched.
    """
    try:
        return "folder" if stat.S_ISDIR(os.stat(path).st_mode) else "file"
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return "missing"
        raise OptionError(f"{path}: cannot be examined ({error.strerror})") from error
    except ValueError as error:
        raise OptionError(f"{path!r}: is no path ({error})") from error


# EINVAL is Windows' for names that it cannot have, such as patterns; ELOOP is of circular links.
_NOTHING_THERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ELOOP))
