"""The folder of results: one writer at a time, what is finished, what is to be done again."""

from __future__ import annotations

import itertools
import json
import os
import reprlib
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from whisper_flash_attention.batch.rows import Row, Tally
from whisper_flash_attention.batch.shards import (
    CorruptShard,
    Shard,
    read_shard,
    remove_temporary,
    shards_in,
    write_shard,
    write_whole,
)
from whisper_flash_attention.errors import BatchError, OptionError
from whisper_flash_attention.options import DecodeOptions, SubtitleOptions, TranscribeOptions

SETTINGS, SUMMARY, LOCK = "settings.json", "summary.json", ".lock"
CORRUPT, EARLIER, SUBTITLE_FOLDER = "corrupt", "earlier", "subtitles"
# Settings that every version has written.
_ALWAYS_SET = frozenset(("model", "language", "task"))
_MOST_SETTINGS_BYTES = 1 << 20


@dataclass(slots=True)
class Finished:
    """What the shards of a folder hold.

    Attributes:
        ids: of all rows.
        tally: of all rows.
        next_number: for the next shard.
    """

    ids: set[str] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)
    next_number: int = 0


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other runs from writing to it meanwhile.

    The lock is the operating system's: it ends with the process, however that ends. (Windows has
    none of this kind; there nobody is kept off.)

    Raises:
        OptionError: the folder cannot be made, another run writes to it, or its lock is a link or
            no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_lock(folder / LOCK)
    except (OSError, ValueError) as error:  # of which the latter is about a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"{folder}: cannot be written to ({reason})") from error
    with file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OptionError(f"{folder}: another run is writing to it") from error
            except OSError as error:
                raise OptionError(f"{folder}: cannot be locked ({error.strerror})") from error
        yield


def _open_lock(path: Path) -> IO[bytes]:
    """Open the lock, which is made if need be, and never follow or empty what lies in its place."""
    if path.is_symlink():
        raise OptionError(f"{path}: is a link, which would lock (and make) another file; remove it")
    # O_NOFOLLOW, for a link made in between; O_NONBLOCK, for a pipe that nobody reads.
    extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | extra, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OptionError(f"{path}: is no file; remove it")
    return os.fdopen(descriptor, "r+b")


def prepare(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    retry_errors: bool,
    tell: Callable[[str], None],
) -> Finished:
    """Bring a folder that is `held` into order, and say what is finished.

    What an interrupted run left is cleared away, damaged shards are set aside, and without `resume`
    all earlier results are. With `retry_errors`, rows with errors are taken out.

    Args:
        folder: of the results.
        settings: what results depend on; those of the earlier runs must be the same.
        resume, retry_errors: as above.
        tell: called with a line for the user about each thing that was set aside.

    Raises:
        OptionError: the results that are there were made with other settings.
        BatchError: the folder cannot be read or written.
    """
    if resume:
        _check_settings(folder, settings)
    with _as_batch_error(folder):
        remove_temporary(folder, deep=False)
        remove_temporary(folder / SUBTITLE_FOLDER, deep=True)
        (folder / SUMMARY).unlink(missing_ok=True)
        if not resume:
            _set_aside_all(folder, tell)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=1).encode() + b"\n")
    finished = Finished()
    for shard in _without_replaced(folder):
        finished.next_number = shard.number + 1
        try:
            rows = read_shard(shard, ("id", "seconds", "error_kind"))
            if retry_errors and any(row["error_kind"] is not None for row in rows):
                rows = _take_out_errors(folder, shard)
        except CorruptShard as error:
            _set_aside(folder, shard, str(error), tell)
            continue
        for row in rows:
            if row["id"] in finished.ids:
                raise BatchError(
                    f"{shard.path}: has id {row['id']!r}, which is in an earlier shard, too: were "
                    "the shards of several runs put together? Give each its own folder"
                )
            finished.ids.add(row["id"])
            finished.tally.add(row)
    return finished


@contextmanager
def _as_batch_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BatchError(f"{folder}: cannot be written to ({error.strerror})") from error


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    with _as_batch_error(folder):
        if not shards_in(folder):
            return
    # What either side does not name had its usual value: an option may be younger than a folder.
    usual = asdict(TranscribeOptions()) | asdict(DecodeOptions()) | asdict(SubtitleOptions())
    earlier = usual | _read_settings(folder / SETTINGS)
    earlier, wanted = (json.loads(json.dumps(each)) for each in (earlier, usual | {**settings}))
    other = [name for name, value in earlier.items() if wanted.get(name) != value]
    if other:
        changes = "; ".join(
            f"{name} {reprlib.repr(earlier[name])}, now {reprlib.repr(wanted.get(name))}"
            for name in other[:_SHOWN_SETTINGS]
        )
        raise OptionError(
            f"{folder}: holds results of other settings ({changes}): take the same, "
            "another folder, or --no-resume, which sets them aside"
        )


_SHOWN_SETTINGS = 10


def _read_settings(path: Path) -> dict[str, Any]:
    """What the shards beside it were made with. Raises `OptionError` if that cannot be known."""
    try:
        if not path.is_file():
            raise ValueError("it is missing" if not os.path.lexists(path) else "it is no file")
        with path.open("rb") as file:
            data = file.read(_MOST_SETTINGS_BYTES + 1)
        if len(data) > _MOST_SETTINGS_BYTES:
            raise ValueError(f"it has more than {_MOST_SETTINGS_BYTES} bytes")
        settings = json.loads(data)
        if not (isinstance(settings, dict) and set(settings) >= _ALWAYS_SET):
            raise ValueError(f"it does not name {', '.join(sorted(_ALWAYS_SET))}")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(
            f"{path}: does not tell what the shards beside it were made with ({reason}): bring it "
            "back, take another folder, or --no-resume, which sets them aside"
        ) from error
    return settings


def _set_aside_all(folder: Path, tell: Callable[[str], None]) -> None:
    earlier = [shard.path for shard in shards_in(folder)]
    if not earlier:
        return
    target = _new_folder(folder / f"{EARLIER}-{time.strftime('%Y%m%d-%H%M%S')}")
    for path in (
        *earlier,
        folder / SUBTITLE_FOLDER,
        folder / SETTINGS,
    ):  # settings last, for a kill
        if os.path.lexists(path):
            path.replace(target / path.name)
    tell(f"{len(earlier)} earlier shards are in {target} now")


def _new_folder(path: Path) -> Path:
    """Make a folder of this name, or of this name and a number if there is one already."""
    for number in itertools.count(1):
        target = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            target.mkdir()
        except FileExistsError:
            continue
        return target
    raise AssertionError("numbers have no end")


def _set_aside(folder: Path, shard: Shard, reason: str, tell: Callable[[str], None]) -> None:
    with _as_batch_error(folder):
        (folder / CORRUPT).mkdir(exist_ok=True)
        target = folder / CORRUPT / shard.path.name
        shard.path.replace(target)
    tell(
        f"warning: {shard.path.name} is damaged ({reason}): its {shard.rows} recordings are done "
        f"again; what is left of it is {target}"
    )


def _without_replaced(folder: Path) -> list[Shard]:
    """The shards, less those whose errors were being taken out when a run was killed.

    Of two shards of one number, the one with fewer rows is the newer: see `_take_out_errors`.
    """
    kept: list[Shard] = []
    for shard in shards_in(folder):  # fewer rows first
        if kept and kept[-1].number == shard.number and _is_whole(kept[-1]):
            with _as_batch_error(folder):
                shard.path.unlink()
        else:
            kept.append(shard)
    return kept


def _is_whole(shard: Shard) -> bool:
    try:
        read_shard(shard, ("id",))
    except CorruptShard:
        return False
    return True


def _take_out_errors(folder: Path, shard: Shard) -> list[Row]:
    """Replace a shard by one of the same number without its rows with errors; return the others.

    At no moment is a row missing that is good: the new shard is there before the old one goes.
    """
    good = [row for row in read_shard(shard) if row["error_kind"] is None]
    if good:
        write_shard(folder, shard.number, good, shard.path.suffix.removeprefix("."))
    with _as_batch_error(folder):
        shard.path.unlink()
    return good
