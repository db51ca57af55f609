"""Files of subtitles: one for every id, whatever its characters and length, and never one for two.

An id keeps its folders and its name as far as every file system can have them. What cannot be in a
name is written as in a URL (`%2E%2E`), and "%" itself as `%25`, so that `%-`, which marks what was
cut or set apart, is in no other name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from whisper_flash_attention.terminal import UNPRINTABLE
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES
from whisper_flash_attention.transcribe.writers import SUBTITLES, files

NAME_BYTES = 180  # of a file's name, of which file systems allow 255
# Of a path, of which operating systems allow 1,024 to 4,096 bytes with the results' own folder.
MOST_FOLDERS, MOST_FOLDER_BYTES = 16, 600
KEPT_FOLDERS = 2  # of an id that is deeper

_NOT_IN_NAMES = re.compile(r'[%<>:"\\|?*]')
# Devices under Windows, whatever their suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3])(\.|$)", re.IGNORECASE)
_SUFFIXES = tuple(f".{name}" for name in SUBTITLES)


def subtitle_path(folder: Path, item_id: str, output_format: str, *, apart: bool = False) -> Path:
    """The file of an id's subtitles, in `folder` or below it.

    Args:
        folder: of all subtitles.
        item_id: of the recording.
        output_format: "srt" or "vtt".
        apart: end in a hash of the id, as `alike` asks for.
    """
    *parts, last = item_id.split("/")
    folders = [_folder_name(part) for part in parts]
    too_deep = len(folders) > MOST_FOLDERS or len("/".join(folders).encode()) > MOST_FOLDER_BYTES
    name = _fitting(_encoded(last), last)
    if apart or too_deep:
        folders = folders[:KEPT_FOLDERS] if too_deep else folders
        name = f"{_cut(_encoded(last))}%-{_hash(item_id)}"
    return folder.joinpath(*folders, f"{name}.{output_format}")


def alike(ids: Iterable[str]) -> set[str]:
    """The ids whose files some file system takes for another's: they differ in case alone (`A`,
    `a`), or in how Unicode composes a character.
    """
    by_path = {str(subtitle_path(Path(), each, "")): each for each in ids}
    return {by_path[path] for pair in files.colliding(by_path) for path in pair}


def _folder_name(part: str) -> str:
    name = _encoded(part)
    if name[-1] in ". ":  # Windows drops these
        name = f"{name[:-1]}{_percent(name[-1])}"
    if files.folded(name).endswith(_SUFFIXES):  # or it could be the name of another id's file
        name += "%-"
    return _fitting(name, part)


def _encoded(part: str) -> str:
    """A part of an id as a name that every file system can have."""
    if part in ("", ".", ".."):
        return part.replace(".", "%2E") or "%"
    name = UNPRINTABLE.sub(_percent_of, _NOT_IN_NAMES.sub(_percent_of, part))
    return f"{_percent(name[0])}{name[1:]}" if _RESERVED.match(name) else name


def _fitting(name: str, part: str) -> str:
    return name if len(name.encode()) <= NAME_BYTES else f"{_cut(name)}%-{_hash(part)}"


def _cut(name: str) -> str:
    return name.encode()[:NAME_BYTES].decode(errors="ignore")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _percent_of(found: re.Match[str]) -> str:
    return _percent(found[0])


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


class SubtitleNames:
    """The files of an archive's subtitles, named as those of single recordings.

    `a/talk.wav` has `a/talk.srt`. Where another id would have the same, both keep their suffixes,
    and an id that has none ends in a hash.

    Args:
        ids: of the whole archive.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        known = set(ids)
        counts = Counter(files.folded(_stem(each)) for each in known)
        shared = {each for each in known if counts[files.folded(_stem(each))] > 1}
        self._names = {each: each if each in shared else _stem(each) for each in known}
        used = Counter(self._names.values())
        similar = alike(used)
        self._apart = {
            each
            for each, name in self._names.items()
            if used[name] > 1 or name in similar or (each in shared and _stem(each) == each)
        }

    def path(self, folder: Path, item_id: str, output_format: str) -> Path:
        """The file of an id's subtitles, in `folder` or below it."""
        if item_id in self._apart:
            return subtitle_path(folder, item_id, output_format, apart=True)
        return subtitle_path(folder, self._names.get(item_id, item_id), output_format)


def _stem(item_id: str) -> str:
    """An id without the suffix of a recording."""
    stem, suffix = os.path.splitext(item_id.rpartition("/")[2])
    is_recording = suffix.lower() in RECORDING_SUFFIXES
    return item_id[: len(item_id) - len(suffix)] if is_recording and stem else item_id
