"""Results on disk: one row per measured job, appended as it is measured.

`results.jsonl` is the record: a row is written and flushed to the disk before the next job starts,
so that an interrupted run loses at most the row it was in. `tokens.jsonl` keeps the ids of every
row's first timed batch. Everything else (`results.json`, `.csv`, `.md`, plots) derives from them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from whisper_flash_attention.benchmark.settings import DECODER_LAYERS, SETTINGS
from whisper_flash_attention.benchmark.systems import SYSTEMS
from whisper_flash_attention.errors import BenchmarkError
from whisper_flash_attention.transcribe.output import probe
from whisper_flash_attention.transcribe.writers.files import replace_file

# Incremented when earlier rows are not comparable any more.
SCHEMA = 1

# What makes two rows stand for the same thing: the newer one is kept.
CASE_FIELDS = (
    *("setting", "checkpoint", "system", "batch_size", "new_tokens", "word_timestamps"),
    *("device", "dtype", "entry", "mode", "container", "workers", "recordings", "threads", "vad"),
    "word_alignment",
)

Status = Literal["ok", "failed", "skipped"]
Slot = tuple[str | int, ...]


@dataclass(frozen=True)
class ResultRow:
    """One row of the results.

    Seconds are per `generate` call unless named otherwise; memory is in units of 1e9 bytes.
    `batches` is what was run, `setting_batches` what the setting prescribes. `compression` is the
    full-depth model's parameters over this one's. `roofline_seconds_per_batch` is the lower of the
    two forms of cross-attention. `tokens_checked` counts the new tokens of all timed calls.
    `tokens_equal_to_orig` is the share of ids equal to those of `orig` in the first timed batch;
    None without such ids. `attention` is the attention that ran, per kind of call. `error` is the
    reason of a row that is not "ok".
    """

    status: Status
    setting: str
    checkpoint: str
    decoder_layers: int
    system: str
    device: str
    dtype: str
    batch_size: int
    new_tokens: int
    batches: int
    setting_batches: int
    parameters: int
    compression: float
    features: str
    environment: dict[str, Any]
    ceilings: dict[str, float]
    roofline_seconds_per_batch: float
    roofline_projected_seconds: float
    roofline_absorbed_seconds: float
    error: str | None = None
    seconds_total: float | None = None
    seconds_per_batch: float | None = None
    seconds_p10: float | None = None
    seconds_p90: float | None = None
    seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    vram_driver_gb: float | None = None
    vram_source: str | None = None
    vram_allocated_gb: float | None = None
    rss_peak_gb: float | None = None
    tokens_checked: int = 0
    tokens_equal_to_orig: float | None = None
    attention: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def slot(self) -> Slot:
        """The key in the table. A newer row replaces an older one."""
        return (
            *(self.setting, self.checkpoint, self.decoder_layers, self.system),
            *(self.device, self.environment["device_name"], self.dtype),
            *(self.batch_size, self.new_tokens),
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """The work and its software, by which a finished row answers for a job.

        Rows of our own systems also depend on the code of this package.
        """
        versions = tuple(self.environment[name] for name in ("torch", "transformers", "triton"))
        return (self.slot, self.batches, self.features, versions, self.code, self.schema)

    @property
    def code(self) -> str | None:
        """The digest of this package's code, where that decides the speed."""
        is_stock = self.system in SYSTEMS and not SYSTEMS[self.system].is_ours
        return None if is_stock else str(self.environment["source"])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Store:
    """The rows and token ids of one output folder."""

    def __init__(self, folder: Path) -> None:
        """Open, or make, the folder.

        Raises:
            BenchmarkError: it cannot be made or written, or holds a results.jsonl that is damaged
                elsewhere than at its end.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = [_row(record) for record in _read_lines(folder / "results.jsonl")]
            self._tokens = {
                tuple(record["slot"]): record for record in _read_lines(folder / "tokens.jsonl")
            }
        except OSError as error:
            raise BenchmarkError(f"output folder {folder}: {error.strerror}") from error

    def add(self, row: ResultRow, tokens: Sequence[Sequence[int]] = ()) -> None:
        """Append a row, and the ids of its first timed batch, and flush them to the disk."""
        if tokens:
            record = {"slot": row.slot, "features": row.features, "tokens": tokens}
            _append(self.folder / "tokens.jsonl", record)
            self._tokens[row.slot] = record
        _append(self.folder / "results.jsonl", asdict(row))
        self._rows.append(row)

    def keep_log(self, title: str, log: str) -> None:
        """Append all that a failed row printed to `failures.log`."""
        with (self.folder / "failures.log").open("a", encoding="utf-8") as file:
            file.write(f"=== {title}\n{log.rstrip()}\n\n")

    def finished(self) -> set[tuple[Any, ...]]:
        """Keys of the rows that need not be measured again."""
        return {row.key for row in self.rows() if row.status == "ok"}

    def rows(self) -> list[ResultRow]:
        """The newest row of every slot, in the table's order, with its ids compared to orig's."""
        newest = {row.slot: row for row in self._rows}
        rows = [
            replace(row, tokens_equal_to_orig=self._equal_to_orig(row)) for row in newest.values()
        ]
        return sorted(rows, key=_order)

    def _equal_to_orig(self, row: ResultRow) -> float | None:
        orig = tuple("orig" if i == 3 else part for i, part in enumerate(row.slot))
        ours, theirs = self._tokens.get(row.slot), self._tokens.get(orig)
        if row.status != "ok" or ours is None or theirs is None:
            return None
        if ours["features"] != theirs["features"]:
            return None
        pairs = [
            (a, b)
            for one, other in zip(ours["tokens"], theirs["tokens"], strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        equal: int = sum(a == b for a, b in pairs)
        return equal / len(pairs)


class Keeper:
    """Rows in a JSON file, written anew with each one, whole or not at all.

    Raises:
        BenchmarkError: the path is that of something else than a file with rows, or its folder is
            not there.
        OptionError: the folder cannot be written to.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path is None:
            return
        check_output(path)
        if path.exists():
            try:
                found = json.loads(path.read_text("utf-8"))
            except (ValueError, RecursionError):  # a decoding error is a ValueError, too
                found = None
            except OSError as error:
                raise BenchmarkError(f"output {path} cannot be read ({error.strerror})") from error
            rows = found.get("rows") if isinstance(found, dict) else None
            if not isinstance(rows, list) or not all(isinstance(each, dict) for each in rows):
                raise BenchmarkError(f"output {path} is there and holds no rows: name another file")
            self._rows = rows

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, or replace that of the same case.

        Raises:
            BenchmarkError: the file cannot be written; it has the rows that it had before.
        """
        slot = [row.get(name) for name in CASE_FIELDS]
        kept = [each for each in self._rows if [each.get(name) for name in CASE_FIELDS] != slot]
        self._rows = [*kept, row]
        if self._path is not None:
            write_whole(self._path, json.dumps({"rows": self._rows}, indent=1) + "\n")


def check_output(path: Path) -> None:
    """Check that a file of results can be written.

    Raises:
        BenchmarkError: the path is that of something else than a file, or its folder is not there.
        OptionError: the folder cannot be written to.
    """
    try:
        is_there, is_file, has_folder = path.exists(), path.is_file(), path.parent.is_dir()
    except OSError as error:
        raise BenchmarkError(f"output {path} cannot be a file ({error.strerror})") from error
    if not has_folder:
        raise BenchmarkError(f"output {path}: there is no folder {path.parent}")
    if is_there and not is_file:
        raise BenchmarkError(f"output {path} is there and is no file: name one")
    probe(Path(os.path.realpath(path)).parent)


def write_whole(path: Path, text: str) -> None:
    """Write text in UTF-8 and have it on the disk, whole or not at all.

    Raises:
        BenchmarkError: it cannot be written; what was there before is there still.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written ({error.strerror})") from error


def as_json(rows: Iterable[ResultRow]) -> str:
    """All rows, with the environment and the ceilings of the newest, as a JSON document."""
    rows = list(rows)
    newest = max(rows, key=lambda row: row.environment["date"])
    document = {
        "schema": SCHEMA,
        "environment": newest.environment,
        "ceilings": newest.ceilings,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(document, indent=1) + "\n"


def as_csv(rows: Iterable[ResultRow]) -> str:
    """All rows, nested values flattened into columns; without the single times."""
    records = [_flat(row) for row in rows]
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _flat(row: ResultRow) -> dict[str, Any]:
    record = asdict(row)
    for nested in ("seconds", "environment", "ceilings"):
        del record[nested]
    record["attention"] = "; ".join(f"{kind}: {name}" for kind, name in row.attention.items())
    return record | row.environment | row.ceilings


def _order(row: ResultRow) -> tuple[Any, ...]:
    systems = list(SYSTEMS)
    system = systems.index(row.system) if row.system in systems else len(systems)
    return (
        *(row.device, row.environment["device_name"], row.dtype),
        *(list(SETTINGS).index(row.setting), row.batch_size, row.new_tokens),
        *(list(DECODER_LAYERS).index(row.checkpoint), -row.decoder_layers),
        *(system, row.system),
    )


def _row(record: dict[str, Any]) -> ResultRow:
    names = {item.name for item in fields(ResultRow)}
    if set(record) != names:
        wrong = ", ".join(sorted(set(record) ^ names))
        raise BenchmarkError(
            f"results.jsonl has rows of another version of this benchmark (fields: {wrong}); "
            "choose another --output"
        )
    return ResultRow(**record)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file. A torn last line is cut off, so that one can append."""
    if not path.exists():
        return []
    content = path.read_bytes()
    complete, newline, torn = content.rpartition(b"\n")
    if torn:
        os.truncate(path, len(complete + newline))
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise BenchmarkError(
                f"{path.name} is damaged in line {number}: {error}; "
                "remove that line, or choose another --output"
            ) from error
    return records


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
