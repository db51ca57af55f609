"""Where rows end: subtitles, then shards; each id once."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from whisper_flash_attention.batch.results import SUBTITLES, Finished
from whisper_flash_attention.batch.rows import Row, Tally
from whisper_flash_attention.batch.shards import write_shard
from whisper_flash_attention.batch.storage import utf8_text
from whisper_flash_attention.batch.subtitle_names import SubtitleNames
from whisper_flash_attention.errors import BatchError, OptionError
from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.transcribe.results import Transcription
from whisper_flash_attention.transcribe.writers import write

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
        folder = self._folder / SUBTITLES
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
