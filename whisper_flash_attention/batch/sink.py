"""Where rows end: subtitles, then shards; each id once."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from whisper_flash_attention.batch.results import Finished
from whisper_flash_attention.batch.rows import Row, Tally
from whisper_flash_attention.batch.shards import write_shard
from whisper_flash_attention.errors import BatchError, OptionError
from whisper_flash_attention.transcribe.segments import Transcription
from whisper_flash_attention.transcribe.writers import write

SUBTITLES = "subtitles"
# A shard is closed at the first of these, so that neither memory nor what a crash costs can grow.
SHARD_ROWS = 1_000
SHARD_AUDIO_SECONDS = 50 * 3_600.0
SHARD_SECONDS = 30.0
NAME_BYTES = 180  # of a file's name, of which file systems allow 255
# What some file system does not take in a name, and the sign that replaces it.
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f%<>:"\\|?*]')


class Sink:
    """Takes rows of one run and writes them. The only writer of its folder.

    Args:
        folder: of the results, held and prepared.
        finished: what is there already; rows of these ids are not written again, and what is
            written is added.
        output_format: of the shards.
        subtitles: formats to write beside them.
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
        shard_seconds: float = SHARD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = Tally()
        self._folder = folder
        self._finished = finished
        self._format = output_format
        self._subtitles = subtitles
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
            self._write_subtitles(row)
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

    def _write_subtitles(self, row: Row) -> None:
        """Written before the row is, so that whatever is finished has them."""
        if row["error"] is not None:
            return
        for name in self._subtitles:
            path = subtitle_path(self._folder / SUBTITLES, row["id"], name)
            fields = ("text", "language", "segments", "seconds")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                transcription = Transcription.from_dict({each: row[each] for each in fields})
                write(transcription, path, name, overwrite=True)
            except (OSError, OptionError) as error:
                raise BatchError(
                    f"{path}: cannot be written ({error}); the same command goes on from what is "
                    "finished"
                ) from error


def subtitle_path(folder: Path, item_id: str, output_format: str) -> Path:
    """The file of an id's subtitles: sub-folders are kept, and no id leads out of the folder.

    Two ids never share a file: what cannot be in a name is written as in a URL (`%2E%2E`), and what
    is too long is cut and ends in a hash of all of it.
    """
    parts = []
    for part in item_id.split("/"):
        name = _NOT_IN_NAMES.sub(lambda found: f"%{ord(found[0]):02X}", part)
        if part in ("", ".", ".."):
            name = part.replace(".", "%2E") or "%"
        if len(name.encode()) > NAME_BYTES:
            cut = name.encode()[:NAME_BYTES].decode(errors="ignore")
            name = f"{cut}-{hashlib.sha256(part.encode()).hexdigest()[:16]}"
        parts.append(name)
    return folder.joinpath(*parts[:-1], f"{parts[-1]}.{output_format}")
