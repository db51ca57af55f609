"""Where rows end: subtitles, then shards; each id once.

Every id has files of subtitles of its own, whatever its characters and length. It keeps its folders
and its name as far as every file system can have them. What cannot be in a name is written as in a
URL (`%2E%2E`), and "%" itself as `%25`, so that `%-`, which marks what was cut or set apart, is in
no other name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from whisper_flash_attention.batch.results import SUBTITLE_FOLDER, Finished
from whisper_flash_attention.batch.rows import Row, Tally
from whisper_flash_attention.batch.shards import write_shard
from whisper_flash_attention.batch.storage import utf8_text
from whisper_flash_attention.errors import BatchError, OptionError
from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.terminal import UNPRINTABLE
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES
from whisper_flash_attention.transcribe.results import Transcription
from whisper_flash_attention.transcribe.writers import SUBTITLES, files, write

# A shard is closed at the first of these, so that neither memory nor what a crash costs can grow.
SHARD_ROWS = 1_000
SHARD_AUDIO_SECONDS = 50 * 3_600.0
SHARD_SECONDS = 30.0
# What a file system raises about one name; all others would be the same for the next file.
_ABOUT_A_NAME = frozenset(
    (
        *(errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP),
        *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY),
    )
)


class Sink:
    """Takes rows of one run and writes them. The only writer of its folder.

    Args:
        folder: of the results, held and prepared.
        finished: what is there already; rows of these ids are not written again, and what is
            written is added.
        output_format: of the shards.
        subtitles: formats to write beside them.
        subtitle_options: how these are cut.
        ids: of the whole archive, for files of subtitles that must not be taken for one another.
        shard_seconds: the longest that rows wait for others before they are written, when the next
            rows come.
        clock: the time in seconds.

    Attributes:
        tally: of the rows of this run.
    """

    def __init__(
        self,
        folder: Path,
        finished: Finished,
        output_format: str = "jsonl",
        *,
        subtitles: tuple[str, ...] = (),
        subtitle_options: SubtitleOptions = SubtitleOptions(),
        ids: Iterable[str] = (),
        shard_seconds: float = SHARD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = Tally()
        self._folder = folder
        self._finished = finished
        self._format = output_format
        self._subtitles = subtitles
        self._subtitle_options = subtitle_options
        self._names = SubtitleNames({*ids, *finished.ids} if subtitles else ())
        self._shard_seconds = shard_seconds
        self._clock = clock
        self._waiting: list[Row] = []
        self._waiting_audio = 0.0
        self._written = clock()

    def take(self, rows: Iterable[Row]) -> list[Row]:
        """Write rows, or keep them until there are enough for a shard; return those that were new.

        Raises:
            BatchError: they cannot be written. Rows that wait then are lost, and are not finished.
        """
        new = []
        for row in rows:
            if row["id"] in self._finished.ids:
                continue  # a worker was lost after its answer had arrived, and another did it again
            row = self._with_subtitles(row)
            self._finished.ids.add(row["id"])
            self._finished.tally.add(row)
            self.tally.add(row)
            self._waiting.append(row)
            self._waiting_audio += row["seconds"] or 0.0
            new.append(row)
            if len(self._waiting) >= SHARD_ROWS or self._waiting_audio >= SHARD_AUDIO_SECONDS:
                self.flush()
        if self._clock() - self._written >= self._shard_seconds:
            self.flush()
        return new

    def flush(self) -> None:
        """Write the rows that wait. Raises `BatchError` if they cannot be written."""
        self._written = self._clock()
        if not self._waiting:
            return
        write_shard(self._folder, self._finished.next_number, self._waiting, self._format)
        self._finished.next_number += 1
        self._waiting, self._waiting_audio = [], 0.0

    def _with_subtitles(self, row: Row) -> Row:
        """Write a row's subtitles, and return the row.

        They are written before the row is, so that whatever is finished has them. If the file
        system refuses their name, the row that is returned has the error.
        """
        if row["error"] is not None or not self._subtitles:
            return row
        folder = self._folder / SUBTITLE_FOLDER
        path = folder
        try:
            folder.mkdir(exist_ok=True)
            for name in self._subtitles:
                path = self._names.path(folder, row["id"], name)
                path.parent.mkdir(parents=True, exist_ok=True)
                fields = ("text", "language", "segments", "seconds")
                transcription = Transcription.from_dict({each: row[each] for each in fields})
                write(*(transcription, path, name), options=self._subtitle_options, overwrite=True)
        except (OSError, OptionError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if path != folder and isinstance(cause, OSError) and cause.errno in _ABOUT_A_NAME:
                message = f"{path}: subtitles cannot be written ({cause.strerror})"
                return {**row, "error": utf8_text(message), "error_kind": type(cause).__name__}
            raise BatchError(
                f"{path}: cannot be written ({error}); the same command goes on from what is "
                "finished"
            ) from error
        return row


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
