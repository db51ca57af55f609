"""Hostile and odd manifests, names, settings and shards, thrown at what reads them.

    python -m tests.batch.attacks --count 20000

prints how many of each kind were tried, and what came of them. Each attack takes a source of random
numbers and an empty folder, and returns what came of it; anything but what is promised is raised.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.batch.fakes import FakeModel, all_rows, write_wav
from whisper_flash_attention.batch import run_batch
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.manifest import read_archive
from whisper_flash_attention.batch.results import SUBTITLE_FOLDER, Finished, prepare
from whisper_flash_attention.batch.rows import Row, finished_row
from whisper_flash_attention.batch.shards import write_shard
from whisper_flash_attention.batch.sink import Sink, SubtitleNames
from whisper_flash_attention.errors import BatchError, OptionError, WhisperFlashError
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.inputs import find_inputs
from whisper_flash_attention.transcribe.writers.files import folded

SETTINGS = {"model": "tiny", "language": None, "task": "transcribe"}

PIECES = (
    *("a", "A", "b", "é", "e\u0301", "ß", "SS", "\ufb01", "日本", ".", "..", "...", " ", "~"),
    *("/", "//", "\\", "%", "%2E", "%-", "::", "://", "file://", "s3://", "http://", "zip://"),
    *("\x1b]0;x\x07", "\x1b[2J", "\n", "\r\n", "\t", "\x85", "\u2028", "\u202e", "\ufeff", ":"),
    *(".wav", ".srt", ".vtt", ".SRT", ".tmp", "CON", "nul.", "COM1", "-", "*", "?", "[", "]"),
    *("{}", '"', "'", "<b>", "|", "&", ";", "`id`", "\x00", "\ud800", "\udce9", "\u200d"),
    *("x" * 300, "d/" * 40, "é" * 200),
)
RARE = ("x" * 5_000, "d/" * 2_500, "../" * 50)
ODD_BYTES = (
    *(b"\0", b'"', b"\n", b",", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 50, b"\r"),
)
NUMBERS = (
    *("nan", "inf", "-inf", "1e999", "-1", "0", "1_0", " 1 ", "1e-320", "9" * 400, "0x10"),
    *(float("nan"), float("inf"), -1.0, 1e308, 1e-320, 0, 1, 2.5, True, False, None, 10**400),
    *([], [1], {}, {"a": 1}, "", "soon", 3, 1e9, 1e10),
)
COLUMNS = ("id", "path", "language", "task", "prompt", "start", "end", "seconds", "speaker", "")


def odd_name(draw: random.Random) -> str:
    """Pieces of names, of which some are very long or deep."""
    if draw.random() < 0.02:
        return draw.choice(RARE)
    return "".join(draw.choices(PIECES, k=draw.randint(0, 5)))


def odd_value(draw: random.Random) -> Any:
    return odd_name(draw) if draw.random() < 0.5 else draw.choice(NUMBERS)


def odd_row(draw: random.Random, *, levels: int = 900) -> dict[str, Any]:
    """A manifest's row that is right, but for what is odd in it, nested `levels` deep at most."""
    row: dict[str, Any] = {"id": f"{draw.random()}", "path": "a.wav"}
    for name in draw.sample(COLUMNS, draw.randint(0, 4)):
        row[name] = odd_value(draw)
    if draw.random() < 0.1:
        del row[draw.choice(["id", "path"])]
    if draw.random() < 0.05:
        nested: Any = 1
        for _ in range(draw.choice([10, levels])):
            nested = [nested]
        row[draw.choice(COLUMNS)] = nested
    return row


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes with a few changes: others, fewer, more, twice, or in another encoding."""
    content = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(7)
        if kind == 0 and at < len(content):
            content[at] = draw.randrange(256)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = draw.choice(ODD_BYTES)
        elif kind == 3:
            del content[at : at + draw.randint(1, 20)]
        elif kind == 4:
            content[at:at] = content[: draw.randint(0, 40)]
        elif kind == 5 and draw.random() < 0.1:
            content = bytearray(bytes(content).decode("latin-1").encode("utf-16"))
        elif at < len(content):
            content[at] ^= 1 << draw.randrange(8)
    return bytes(content)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.writer(text)
    names = [*dict.fromkeys(name for row in rows for name in row)]
    writer.writerow(names)
    for row in rows:
        writer.writerow([row.get(name, "") for name in names])
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    names = [*dict.fromkeys(name for row in rows for name in row)]
    table = {}
    for name in names:
        try:
            table[name] = pyarrow.array([row.get(name) for row in rows])
        except (pyarrow.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):
            table[name] = pyarrow.array([None] * len(rows))
    sink = io.BytesIO()
    try:
        parquet.write_table(pyarrow.table(table), sink)
    except pyarrow.ArrowNotImplementedError:  # structs without fields
        return as_parquet([{name: str(value) for name, value in row.items()} for row in rows])
    return sink.getvalue()


WRITERS = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}


def attack_manifest(draw: random.Random, folder: Path, suffix: str) -> str:
    """Rows that are odd, then bytes that are: an archive, or one error of ours."""
    levels = 100 if suffix == ".parquet" else 900  # Arrow takes quadratic time to write them
    data = WRITERS[suffix]([odd_row(draw, levels=levels) for _ in range(draw.randint(1, 3))])
    if draw.random() < 0.6:
        data = mutated(data, draw)
    path = folder / f"archive{suffix}"
    path.write_bytes(data)
    try:
        archive = read_archive(str(path))
    except WhisperFlashError as error:
        printable(error).encode()
        return f"refused: {type(error).__name__}"
    for item in archive.items:
        assert Item.from_json(item.to_json()) == item
    json.dumps([each.reason for each in archive.rejected])
    return "read, rows rejected" if archive.rejected else "read"


def _file_row(name: str) -> Row | None:
    segment = {"start": 0.0, "end": 1.0, "text": "a", "tokens": [], "words": []}
    text = {"text": "a", "language": "en", "segments": [segment], "seconds": 1.0}
    try:
        return finished_row(Item(name, "a.wav"), text, 0.1)
    except OptionError:
        return None


def attack_ids(draw: random.Random, folder: Path) -> str:
    """Odd ids through the writer of results: each its row and its file, below the folder."""
    rows = [_file_row(odd_name(draw)) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3 and rows[0] is not None:  # what is almost the same
        name = rows[0]["id"]
        rows += [_file_row(name.swapcase()), _file_row(f"{name}.srt/b"), _file_row(f"{name}/b")]
    good = {row["id"]: row for row in rows if row is not None}
    sink = Sink(folder, Finished(), subtitles=("srt",), ids=list(good))
    taken = sink.take(good.values())
    sink.flush()
    assert [row["id"] for row in taken] == list(good)
    assert set(all_rows(folder)) == set(good)
    names = SubtitleNames(good)
    paths = {names.path(folder / SUBTITLE_FOLDER, name, "srt") for name in good}
    assert len({folded(str(path)) for path in paths}) == len(good)
    for path in paths:
        assert path.resolve().is_relative_to((folder / SUBTITLE_FOLDER).resolve())
        assert not any(parent in paths for parent in path.parents)
        assert path.is_file()
    assert all(row["error"] is None for row in taken)
    return "written" if good else "refused: OptionError"


def attack_settings(draw: random.Random, folder: Path) -> str:
    """A `settings.json` that was tampered with, beside a shard."""
    row = _file_row("a")
    assert row is not None
    write_shard(folder, 0, [row], "jsonl")
    value = draw.choice(["", [], {}, None, 1, "NaN", [SETTINGS], SETTINGS, SETTINGS, SETTINGS])
    data = json.dumps(value).encode()
    if draw.random() < 0.8:
        data = mutated(data, draw)
    (folder / "settings.json").write_bytes(data)
    try:
        found = prepare(folder, SETTINGS, resume=True, retry_errors=False, tell=lambda line: None)
    except OptionError:
        return "refused: OptionError"
    assert found.ids == {"a"}
    assert json.loads(data) == SETTINGS or set(json.loads(data)) >= set(SETTINGS)
    return "taken"


@cache
def _intact_shard(number: int, names: tuple[str, ...], output_format: str) -> tuple[str, bytes]:
    """Name and content of a shard with a row for each of these ids."""
    rows = [row for row in map(_file_row, names) if row is not None]
    with tempfile.TemporaryDirectory() as folder:
        path = write_shard(Path(folder), number, rows, output_format).path
        return path.name, path.read_bytes()


def attack_shard(draw: random.Random, folder: Path, output_format: str) -> str:
    """A shard with wrong content whose name has the right checksum, beside a good one."""
    _, data = _intact_shard(1, ("a", "b"), output_format)
    if output_format == "jsonl" and draw.random() < 0.5:
        broken: list[Any] = [json.loads(line) for line in data.splitlines()]
        at = draw.randrange(2)
        kind = draw.randrange(3)
        if kind == 0:
            broken[at] = odd_value(draw)
        elif kind == 1:
            del broken[at][draw.choice(list(broken[at]))]
        else:
            broken[at][draw.choice(list(broken[at]))] = odd_value(draw)
        data = b"".join(json.dumps(row).encode() + b"\n" for row in broken)
    else:
        data = mutated(data, draw)
    path = folder / f"part-000001-2-{zlib.crc32(data):08x}.{output_format}"
    path.write_bytes(data)
    name, kept = _intact_shard(0, ("kept",), output_format)
    (folder / name).write_bytes(kept)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    retry = draw.random() < 0.5
    try:
        found = prepare(folder, SETTINGS, resume=True, retry_errors=retry, tell=lambda line: None)
    except BatchError as error:  # an id that became another's
        assert "is in an earlier shard" in str(error)
        return "refused: BatchError"
    assert "kept" in found.ids
    if path.exists():
        return "read"
    is_aside = (folder / "corrupt" / path.name).is_file()
    assert is_aside or retry
    return "set aside" if is_aside else "rows with errors left out"


def attack_inputs(draw: random.Random, folder: Path) -> str:
    """Odd names on a command line, for both commands."""
    name = odd_name(draw).replace("..", "")  # which would be the machine's own folders
    (folder / "a.wav").touch()
    try:
        find_inputs([f"{folder}/{name}"])
        read_archive(f"{folder}/{name}")
    except WhisperFlashError as error:
        printable(error).encode()
        return f"refused: {type(error).__name__}"
    return "read"


def _file_name(name: str) -> bytes:
    return os.fsencode(name.replace("/", "").replace("\0", "").replace("\ud800", ""))[:200]


def attack_run(draw: random.Random, folder: Path) -> str:
    """A whole run over recordings with odd names, or over odd rows: each id once, no end to it."""
    archive, out = folder / "archive", folder / "out"
    write_wav(archive / "good.wav")
    if draw.random() < 0.5:
        for _ in range(3):
            path = os.fsencode(archive) + b"/" + _file_name(odd_name(draw)) + b".wav"
            with open(path, "wb") as file:
                file.write((archive / "good.wav").read_bytes() if draw.random() < 0.7 else b"no")
        source = archive
    else:
        source = archive / "archive.jsonl"
        os.mkfifo(archive / "pipe.wav")
        rows = [{"id": "good", "path": "good.wav"}, *(odd_row(draw) for _ in range(3))]
        for row in rows[1:]:
            if draw.random() < 0.5:
                paths = ("good.wav", "pipe.wav", "/dev/zero", ".", "file:///dev/zero")
                row["path"] = draw.choice(paths)
        source.write_bytes(as_jsonl(rows))
    items = read_archive(str(source)).items
    summary = run_batch(source, out, model=FakeModel(), subtitles=("srt", "vtt"))
    found = all_rows(out)
    assert set(found) == {item.id for item in items}
    good = found["good" if source.suffix else "good.wav"]
    assert good["error"] is None
    again = run_batch(source, out, model=FakeModel(), subtitles=("srt", "vtt"))
    assert again.run_files == 0
    return "all done" if summary.all_well else "some rows with errors"


ATTACKS: dict[str, Callable[[random.Random, Path], str]] = {
    "manifest, csv": lambda draw, folder: attack_manifest(draw, folder, ".csv"),
    "manifest, jsonl": lambda draw, folder: attack_manifest(draw, folder, ".jsonl"),
    "manifest, parquet": lambda draw, folder: attack_manifest(draw, folder, ".parquet"),
    "ids": attack_ids,
    "settings.json": attack_settings,
    "shard, jsonl": lambda draw, folder: attack_shard(draw, folder, "jsonl"),
    "shard, parquet": lambda draw, folder: attack_shard(draw, folder, "parquet"),
    "command line": attack_inputs,
    "whole run": attack_run,
}
# Of these a tenth, since each makes models, threads and many files.
SLOW = ("whole run",)


def attack(kind: str, count: int, seed: int = 0) -> Counter[str]:
    """Try `count` attacks of a kind, and return how often what came of them."""
    outcomes: Counter[str] = Counter()
    memory = "/dev/shm"  # where thousands of small files are quick
    base = Path(tempfile.mkdtemp("", "attacks-", memory if os.access(memory, os.W_OK) else None))
    try:
        for number in range(count):
            folder = base / str(number)
            folder.mkdir()
            try:
                outcomes[ATTACKS[kind](random.Random(f"{kind} {seed} {number}"), folder)] += 1
            except BaseException as error:
                error.add_note(f"{kind}, seed {seed}, number {number}")
                raise
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return outcomes


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=list(ATTACKS), action="append")
    arguments = parser.parse_args()
    os.fsync = lambda descriptor: None  # disks are not attacked
    total = 0
    for kind in arguments.kind or ATTACKS:
        count = arguments.count // 10 if kind in SLOW else arguments.count
        began = time.perf_counter()
        outcomes = attack(kind, count, arguments.seed)
        took = time.perf_counter() - began
        total += count
        summary = ", ".join(f"{number} {what}" for what, number in outcomes.most_common())
        print(f"{kind}: {count} in {took:.0f} s: {summary}", flush=True)
    print(f"all: {total}, none of which gave an error that is not ours, or cost another's row")


if __name__ == "__main__":
    main()
