"""What an archive consists of: a folder, a pattern, or a manifest of its recordings."""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.places import is_url, opened, recordings_in
from whisper_flash_attention.config import parse_audio_track, parse_channel
from whisper_flash_attention.errors import MissingPackage, OptionError
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
COLUMNS = (
    *("id", "path", "language", "task", "prompt", "start", "end", "seconds"),
    *("channel", "audio_track"),
)
SHOWN_DUPLICATES = 10

# A row's number in its manifest, from 1, and its fields, or why it cannot be read.
Row = tuple[int, Mapping[str, Any] | str]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of a manifest that says nothing that could be transcribed.

    Args:
        row: its number, from 1; in a csv the heading does not count.
        reason: what is wrong with it.
    """

    row: int
    reason: str


@dataclass(slots=True)
class Archive:
    """What was found.

    Attributes:
        items: to transcribe, in the order of the manifest or of their paths.
        rejected: rows that could not be read.
        unused: columns of the manifest that mean nothing here.
    """

    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    unused: tuple[str, ...] = ()


def read_archive(source: str) -> Archive:
    """Find the recordings of a folder, a pattern, a recording or a manifest, local or at a URL.

    A manifest is a csv (with a heading), jsonl or parquet file with the columns `id` and `path`,
    and perhaps `language`, `task`, `prompt`, `start`, `end` (seconds), `channel`, `audio_track` and
    `seconds` (its length, which is for the order of work alone). Relative paths are relative to the
    manifest.

    Raises:
        OptionError: there is nothing there, it cannot be read, or ids are there more than once.
        MissingPackage: a URL, or parquet, needs a package that is not installed.
    """
    suffix = posixpath.splitext(source)[1].lower()
    if suffix in MANIFEST_SUFFIXES:
        return _from_manifest(source, suffix)
    if not is_url(source) and Path(source).is_file() and suffix not in RECORDING_SUFFIXES:
        kinds = ", ".join(MANIFEST_SUFFIXES)
        raise OptionError(f"{source}: is neither a folder nor a recording nor a manifest ({kinds})")
    if not is_url(source) and not any(mark in source for mark in "*?[") and not _exists(source):
        raise OptionError(f"{source}: there is no such folder, recording or manifest")
    return Archive(recordings_in(source))


def _exists(source: str) -> bool:
    return Path(source).exists()


def _from_manifest(source: str, suffix: str) -> Archive:
    archive = Archive()
    rows_of_id: dict[str, list[int]] = {}
    columns: dict[str, None] = {}
    base = source.rpartition("/")[0] if is_url(source) else str(Path(source).parent)
    try:
        with opened(source) as file:
            for number, fields in _READERS[suffix](file):
                if isinstance(fields, str):
                    archive.rejected.append(Rejected(number, fields))
                    continue
                columns.update(dict.fromkeys(fields))
                try:
                    item = _item(fields, base)
                except OptionError as error:
                    archive.rejected.append(Rejected(number, str(error)))
                    continue
                rows_of_id.setdefault(item.id, []).append(number)
                archive.items.append(item)
    except OSError as error:
        raise OptionError(f"{source}: cannot be read ({error})") from error
    _refuse_duplicates(source, rows_of_id)
    if not archive.items:
        first = f": row 1: {archive.rejected[0].reason}" if archive.rejected else ""
        raise OptionError(f"{source}: has no row that names a recording{first}")
    archive.unused = tuple(name for name in columns if name not in COLUMNS)
    return archive


def _refuse_duplicates(source: str, rows_of_id: Mapping[str, list[int]]) -> None:
    twice = {name: rows for name, rows in rows_of_id.items() if len(rows) > 1}
    if not twice:
        return
    shown = [
        f"{name} (rows {', '.join(map(str, rows))})"
        for name, rows in list(twice.items())[:SHOWN_DUPLICATES]
    ]
    if len(twice) > SHOWN_DUPLICATES:
        shown.append(f"and {len(twice) - SHOWN_DUPLICATES} more")
    raise OptionError(
        f"{source}: {len(twice)} ids are there more than once, so that results could not be told "
        f"apart: {'; '.join(shown)}"
    )


def _item(fields: Mapping[str, Any], base: str) -> Item:
    path = _text(fields, "path") or ""
    if path and not is_url(path) and not Path(path).is_absolute():
        path = f"{base}/{path}" if is_url(base) else str(Path(base, path))
    return Item(
        id=_text(fields, "id") or "",
        path=path,
        language=_text(fields, "language"),
        task=_text(fields, "task"),
        prompt=_text(fields, "prompt"),
        start=_number(fields, "start") or 0.0,
        end=_number(fields, "end"),
        seconds=_number(fields, "seconds"),
        channel=_parsed(fields, "channel", parse_channel),
        audio_track=_parsed(fields, "audio_track", parse_audio_track),
    )


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    """A field as text; None where it is missing or empty."""
    value = fields.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool | float | list | dict) or not isinstance(value, str | int):
        raise OptionError(f"{name} must be text, but is {value!r}")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} is not UTF-8: {text!r}") from error
    return text


def _parsed(
    fields: Mapping[str, Any], name: str, parse: Callable[[str], int | str | None]
) -> int | str | None:
    """A field as what its text means; None where it is missing or empty."""
    text = _text(fields, name)
    return None if text is None else parse(text)


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    """A field as a number of seconds; None where it is missing or empty."""
    value = fields.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise OptionError(f"{name} must be a number of seconds, but is {value!r}")
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise OptionError(f"{name} must be a number of seconds, but is {value!r}") from error


def _csv_rows(file: BinaryIO) -> Iterator[Row]:
    # Bytes that are not UTF-8 are told of the row that they are in.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _csv_rows_of(text)
    finally:
        text.detach()  # or it would close the file, which is the caller's


def _csv_rows_of(text: Iterable[str]) -> Iterator[Row]:
    reader = csv.reader(text, strict=True)
    heading = next(reader, [])
    if not {"id", "path"} <= set(heading):
        raise OptionError(f"a csv manifest needs a heading with id and path, but it has {heading}")
    for number in itertools.count(1):
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield number, f"is not csv ({error})"
            continue
        if values is None:
            return
        if values and len(values) != len(heading):
            yield number, f"has {len(values)} fields, and the heading {len(heading)}"
        elif values:  # not an empty line
            yield number, dict(zip(heading, values, strict=True))


def _json_rows(file: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield number, f"is not JSON ({error})"
            continue
        yield number, fields if isinstance(fields, dict) else "is not a JSON object"


def _parquet_rows(file: BinaryIO) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(
            "a parquet manifest needs pyarrow: pip install 'whisper-flash-attention[parquet]'"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        batches: Iterable[Any] = table.iter_batches()
        number = 0
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                yield number, fields
    except pyarrow.ArrowException as error:
        raise OptionError(f"is not parquet that can be read ({error})") from error


_READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
