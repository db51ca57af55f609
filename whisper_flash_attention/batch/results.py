"""The folder of results: one writer at a time, what is finished, what is to be done again."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whisper_flash_attention.batch.rows import Tally
from whisper_flash_attention.batch.shards import (
    TEMPORARY,
    CorruptShard,
    Shard,
    read_shard,
    shards_in,
    write_shard,
    write_whole,
)
from whisper_flash_attention.errors import BatchError, OptionError

SETTINGS, SUMMARY, LOCK = "settings.json", "summary.json", ".lock"
CORRUPT, EARLIER = "corrupt", "earlier"


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
        OptionError: the folder cannot be made, or another run writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise OptionError(f"{folder}: cannot be written to ({error.strerror})") from error
    with file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OptionError(f"{folder}: another run is writing to it") from error
        yield


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
        for path in folder.glob(f".*{TEMPORARY}"):
            path.unlink()
        (folder / SUMMARY).unlink(missing_ok=True)
        if not resume:
            _set_aside_all(folder, tell)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=1).encode() + b"\n")
    finished = Finished()
    for shard in _without_replaced(folder):
        finished.next_number = shard.number + 1
        try:
            rows = read_shard(shard, ("id", "seconds", "error_kind"))
        except CorruptShard as error:
            _set_aside(folder, shard, str(error), tell)
            continue
        if retry_errors and any(row["error_kind"] is not None for row in rows):
            _take_out_errors(folder, shard)
            rows = [row for row in rows if row["error_kind"] is None]
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
    path = folder / SETTINGS
    if not path.is_file() or not shards_in(folder):
        return
    earlier: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # damaged: then nothing is known of them
        earlier = json.loads(path.read_bytes())
    wanted = json.loads(json.dumps(settings))  # as they would come back
    other = [name for name, value in earlier.items() if wanted.get(name) != value]
    if other:
        told = "; ".join(f"{name} {earlier[name]!r}, now {wanted.get(name)!r}" for name in other)
        raise OptionError(
            f"{folder}: holds results of other settings ({told}): take the same, another folder, "
            "or --no-resume, which sets them aside"
        )


def _set_aside_all(folder: Path, tell: Callable[[str], None]) -> None:
    earlier = [shard.path for shard in shards_in(folder)]
    if not earlier:
        return
    target = folder / f"{EARLIER}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.mkdir()
    for path in (*earlier, folder / SETTINGS):
        if path.is_file():
            path.replace(target / path.name)
    tell(f"{len(earlier)} earlier shards are in {target} now")


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


def _take_out_errors(folder: Path, shard: Shard) -> None:
    """Replace a shard by one of the same number without its rows with errors.

    At no moment is a row missing that is good: the new shard is there before the old one goes.
    """
    good = [row for row in read_shard(shard) if row["error_kind"] is None]
    if good:
        write_shard(folder, shard.number, good, shard.path.suffix.removeprefix("."))
    with _as_batch_error(folder):
        shard.path.unlink()
