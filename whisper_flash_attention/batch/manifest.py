"""What an archive consists of: a folder, a pattern, or a manifest of its recordings."""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from whisper_flash_attention import validation as check
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.storage import is_url, opened, recordings_in
from whisper_flash_attention.errors import AudioError, MissingPackage, OptionError
from whisper_flash_attention.option_kinds import parse_audio_track, parse_channel
from whisper_flash_attention.transcribe.inputs import RECORDING_SUFFIXES, path_kind

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
COLUMNS = (
    *("id", "path", "language", "task", "prompt", "start", "end", "seconds"),
    *("channel", "audio_track"),
)
SHOWN_DUPLICATES = 10
SHOWN_COLUMNS = 10
# A line of a jsonl manifest is one recording's; a longer one is not read into memory.
MOST_LINE_BYTES = 1 << 24

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
        unused: columns of the manifest that mean nothing here, the first of them.
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
    kind = None if is_url(source) else path_kind(source)
    if suffix in MANIFEST_SUFFIXES and kind != "folder":
        return _from_manifest(source, suffix)
    if kind == "file" and suffix not in RECORDING_SUFFIXES:
        kinds = ", ".join(MANIFEST_SUFFIXES)
        raise OptionError(f"{source}: is neither a folder nor a recording nor a manifest ({kinds})")
    if kind == "missing" and not any(mark in source for mark in "*?["):
        raise OptionError(f"{source}: there is no such folder, recording or manifest")
    return _without_duplicates(recordings_in(source))


def _without_duplicates(items: Sequence[Item]) -> Archive:
    """Recordings of a folder; some storage has two whose paths below it are spelled the same."""
    archive = Archive()
    seen: set[str] = set()
    for number, item in enumerate(items, 1):
        if item.id in seen:
            reason = f"{item.path}: id {item.id!r} is another recording's, too"
            archive.rejected.append(Rejected(number, reason))
        else:
            seen.add(item.id)
            archive.items.append(item)
    return archive


def _from_manifest(source: str, suffix: str) -> Archive:
    archive = Archive()
    rows_of_id: dict[str, list[int]] = {}
    unused: dict[str, None] = {}
    base = source.rpartition("/")[0] if is_url(source) else str(Path(source).parent)
    try:
        with opened(source) as file:
            for number, fields in _READERS[suffix](file, unused):
                if isinstance(fields, str):
                    archive.rejected.append(Rejected(number, fields))
                    continue
                try:
                    item = _item(fields, base)
                except OptionError as error:
                    archive.rejected.append(Rejected(number, str(error)))
                    continue
                rows_of_id.setdefault(item.id, []).append(number)
                archive.items.append(item)
    except (OSError, AudioError) as error:
        reason = str(error).removeprefix(f"{source}: ")
        raise OptionError(f"{source}: cannot be read ({reason})") from error
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from error
    _refuse_duplicates(source, rows_of_id)
    if not archive.items:
        first = f": row 1: {archive.rejected[0].reason}" if archive.rejected else ""
        raise OptionError(f"{source}: has no row that names a recording{first}")
    archive.unused = tuple(unused)
    return archive


def _note_unused(names: Iterable[str], unused: dict[str, None]) -> None:
    """Keep the first names of columns that mean nothing here."""
    for name in names:
        if len(unused) >= SHOWN_COLUMNS:
            return
        if name not in COLUMNS:
            unused[name] = None


def _check_heading(kind: str, names: Sequence[str]) -> None:
    """Raise `OptionError` if `id` or `path` is missing, or a column that is used is there twice."""
    if not {"id", "path"} <= set(names):
        raise OptionError(f"a {kind} manifest needs columns id and path, but has {_listed(names)}")
    counts = Counter(names)
    twice = [name for name in COLUMNS if counts[name] > 1]
    if twice:
        raise OptionError(f"column {twice[0]} is there {counts[twice[0]]} times; rename the others")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(check.shown, names[:SHOWN_COLUMNS]))
    more = len(names) - SHOWN_COLUMNS
    return (shown or "none") + (f" and {more} more" if more > 0 else "")


def _refuse_duplicates(source: str, rows_of_id: Mapping[str, list[int]]) -> None:
    twice = {name: rows for name, rows in rows_of_id.items() if len(rows) > 1}
    if not twice:
        return
    shown = [
        f"{name} (rows {', '.join(map(str, rows[:SHOWN_DUPLICATES]))})"
        for name, rows in list(twice.items())[:SHOWN_DUPLICATES]
    ]
    if len(twice) > SHOWN_DUPLICATES:
        shown.append(f"and {len(twice) - SHOWN_DUPLICATES} more")
    raise OptionError(
        f"{source}: {len(twice)} ids are there more than once, so that results could not be "
        f"distinguished: {'; '.join(shown)}"
    )


def _item(fields: Mapping[str, Any], base: str) -> Item:
    path = _text(fields, "path") or ""
    if path and not is_url(path) and not Path(path).is_absolute():
        if is_url(base) and "::" in path:
            raise OptionError(f"path {path!r}: names with '::' cannot be opened by a URL")
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
        raise OptionError(f"{name} must be text, but is {check.shown(value)}")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} is not UTF-8: {check.shown(text)}") from error
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
        raise OptionError(f"{name} must be a number of seconds, but is {check.shown(value)}")
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise OptionError(
            f"{name} must be a number of seconds, but is {check.shown(value)}"
        ) from error


def _csv_rows(file: BinaryIO, unused: dict[str, None]) -> Iterator[Row]:
    # Bytes that are not UTF-8 are reported for the row that they are in.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _csv_rows_of(text, unused)
    finally:
        text.detach()  # or it would close the file, which is the caller's


def _csv_rows_of(text: Iterable[str], unused: dict[str, None]) -> Iterator[Row]:
    reader = csv.reader(text, strict=True)
    try:
        heading = next(reader, [])
    except csv.Error as error:
        raise OptionError(f"its heading is not csv ({error})") from error
    _check_heading("csv", heading)
    _note_unused(heading, unused)
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


def _json_rows(file: BinaryIO, unused: dict[str, None]) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            yield number, f"is longer than {MOST_LINE_BYTES} bytes"
            continue
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield number, f"is not JSON ({error})"
            continue
        if isinstance(fields, dict):
            _note_unused(fields, unused)
        yield number, fields if isinstance(fields, dict) else "is not a JSON object"


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long."""
    while line := file.readline(MOST_LINE_BYTES + 1):
        if len(line) <= MOST_LINE_BYTES:
            yield line
            continue
        yield None
        while line and not line.endswith(b"\n"):
            line = file.readline(MOST_LINE_BYTES)


def _parquet_rows(file: BinaryIO, unused: dict[str, None]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(
            "a parquet manifest needs pyarrow: pip install 'whisper-flash-attention[parquet]'"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        schema = table.schema_arrow
        _check_heading("parquet", schema.names)
        _note_unused(schema.names, unused)
        # No other columns: they may be large, or of types that Python has no word for.
        used = [name for name in COLUMNS if name in schema.names]
        for name in used:
            _check_type(name, schema.field(name).type)
        number = 0
        for batch in table.iter_batches(columns=used):
            columns = [_values(batch.column(batch.schema.get_field_index(name))) for name in used]
            for values in zip(*columns, strict=True):
                number += 1
                wrong = [value for value in values if isinstance(value, _Undecodable)]
                yield number, "is not UTF-8" if wrong else dict(zip(used, values, strict=True))
    except (pyarrow.ArrowException, ValueError, LookupError, OverflowError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"is not parquet that can be read ({error})") from error


class _Undecodable:
    """Stands for a value whose bytes are not UTF-8."""


def _check_type(name: str, kind: Any) -> None:
    """Raise `OptionError` if an Arrow type holds neither text nor numbers."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(value) or types.is_large_string(value)
    is_text |= "string_view" in str(value)
    if not (is_text or types.is_integer(value) or types.is_floating(value) or types.is_null(value)):
        raise OptionError(f"column {name} has type {kind}, and must hold text or numbers")


def _values(column: Any) -> list[Any]:
    """The values of an Arrow array."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(column[index]) for index in range(len(column))]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _Undecodable()


_READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
