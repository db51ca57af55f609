"""Shards: files of rows that are there whole or not at all, and tell when they are damaged.

A shard's name, `part-<number>-<rows>-<crc32>.<format>`, says what must be in it. It is written
under another name, synced and renamed, so that only a disk or a file system that broke its promises
can leave a damaged one; and even that is noticed.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_flash_attention import validation as check
from whisper_flash_attention.batch.rows import COLUMNS, Row, misfit, without_unset
from whisper_flash_attention.errors import BatchError, MissingPackage
from whisper_flash_attention.terminal import json_line
from whisper_flash_attention.transcribe.writers.files import replace_file

FORMATS = ("jsonl", "parquet")
_NAME = re.compile(r"part-(\d{6,12})-(\d{1,12})-([0-9a-f]{8})\.(jsonl|parquet)", re.ASCII)
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp")


class CorruptShard(Exception):
    """A shard is not what its name says. The message says in what."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard's name, taken apart.

    Args:
        path: of the file.
        number: in order of writing, from 0.
        rows: in it.
        crc: CRC-32 of the whole file.
    """

    path: Path
    number: int
    rows: int
    crc: int


def shards_in(folder: Path) -> list[Shard]:
    """The shards of a folder in order of their numbers; what else is there is none of ours."""
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir())
    shards = [
        Shard(path, int(match[1]), int(match[2]), int(match[3], 16))
        for path, match in found
        if match and path.is_file()
    ]
    return sorted(shards, key=lambda shard: (shard.number, shard.rows, shard.crc))


def remove_temporary(folder: Path, *, deep: bool) -> None:
    """Remove what killed writers left in a folder, and below it if `deep`. Raises `OSError`."""
    for place, folders, names in os.walk(folder):
        for name in filter(_TEMPORARY_NAME.fullmatch, names):
            os.unlink(os.path.join(place, name))
        if not deep:
            folders.clear()


def check_format(name: str) -> None:
    """Raise `OptionError` or `MissingPackage` if shards of this format cannot be written here."""
    check.one_of("output_format", name, FORMATS)
    if name == "parquet":
        _pyarrow()


def write_shard(folder: Path, number: int, rows: Sequence[Row], output_format: str) -> Shard:
    """Write rows as one shard: when this returns, it is on the disk, whole.

    Raises:
        BatchError: it cannot be written (a full disk, say); then nothing of it is left.
    """
    data = _as_parquet(rows) if output_format == "parquet" else _as_json_lines(rows)
    crc = zlib.crc32(data)
    path = folder / f"part-{number:06d}-{len(rows)}-{crc:08x}.{output_format}"
    write_whole(path, data)
    return Shard(path, number, len(rows), crc)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file and have it on the disk, whole or not at all.

    Raises:
        BatchError: it cannot be written.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise BatchError(
            f"{path}: cannot be written ({error.strerror}); the shards that are there are whole, "
            "and the same command goes on from them"
        ) from error


def read_shard(shard: Shard, columns: Sequence[str] = tuple(COLUMNS)) -> list[Row]:
    """The rows of a shard, with these columns.

    Raises:
        CorruptShard: the file is not what was written.
        BatchError: it cannot be read at all.
    """
    try:
        data = shard.path.read_bytes()
    except OSError as error:
        raise BatchError(f"{shard.path}: cannot be read ({error.strerror})") from error
    found = zlib.crc32(data)
    if found != shard.crc:
        raise CorruptShard(f"{len(data)} bytes of CRC-32 {found:08x} instead of {shard.crc:08x}")
    rows = _from_parquet(data, columns) if shard.path.suffix == ".parquet" else _from_lines(data)
    if len(rows) != shard.rows:
        raise CorruptShard(f"{len(rows)} rows instead of {shard.rows}")
    for number, row in enumerate(rows, 1):  # the checksum says only that it is what was written
        reason = misfit(row, columns)
        if reason is not None:
            raise CorruptShard(f"row {number}: {reason}")
    return [{name: row[name] for name in columns} for row in rows]


def _as_json_lines(rows: Sequence[Row]) -> bytes:
    return b"".join(json_line(row).encode() + b"\n" for row in rows)


def _from_lines(data: bytes) -> list[Any]:
    # Not splitlines(), which for text also cuts at other marks than line ends.
    try:
        return [json.loads(line) for line in data.split(b"\n") if line]
    except (ValueError, RecursionError) as error:
        raise CorruptShard(f"it is not JSON ({error})") from error


def _as_parquet(rows: Sequence[Row]) -> bytes:
    pyarrow, parquet = _pyarrow()
    schema = pyarrow.schema([(name, _arrow(kind)) for name, kind in COLUMNS.items()])
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    parquet.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _from_parquet(data: bytes, columns: Sequence[str]) -> list[Row]:
    pyarrow, parquet = _pyarrow()
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(data)).read(columns=list(columns))
        rows: list[Row] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        raise CorruptShard(f"it is not parquet that can be read ({error})") from error
    return [without_unset(row) for row in rows]


def _arrow(kind: Any) -> Any:
    """The Arrow type that `COLUMNS` names."""
    pyarrow, _ = _pyarrow()
    if isinstance(kind, list):
        return pyarrow.list_(_arrow(kind[0]))
    if isinstance(kind, dict):
        return pyarrow.struct([(name, _arrow(each)) for name, each in kind.items()])
    return pyarrow.type_for_alias(kind)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(
            "parquet needs pyarrow: pip install 'whisper-flash-attention[parquet]', or take jsonl"
        ) from error
    return pyarrow, pyarrow.parquet
