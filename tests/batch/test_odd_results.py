"""A folder of results that others have been at: nothing is lost, nothing is taken on trust."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.batch.fakes import FakeModel, all_rows, write_archive
from tests.batch.test_results import SETTINGS, bad, good
from whisper_flash_attention.batch import run_batch
from whisper_flash_attention.batch.results import Finished, held, prepare
from whisper_flash_attention.batch.rows import COLUMNS, misfit
from whisper_flash_attention.batch.shards import (
    CorruptShard,
    Shard,
    read_shard,
    shards_in,
    write_shard,
    write_whole,
)
from whisper_flash_attention.errors import BatchError, OptionError

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and links are POSIX's")


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def begun(tmp_path: Path, messages: list[str]) -> Callable[..., Finished]:
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))

    def prepared(**options: bool) -> Finished:
        wanted = {"resume": True, "retry_errors": False} | options
        return prepare(tmp_path, SETTINGS, tell=messages.append, **wanted)

    return prepared


def replaced(folder: Path, number: int, rows: int, data: bytes, output_format: str) -> Path:
    """A shard with this content, whose name says that it is what was written."""
    path = folder / f"part-{number:06d}-{rows}-{zlib.crc32(data):08x}.{output_format}"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"1",
        b'{"model": "tiny"}',
        b"{",
        b"\xff\xfe",
        b"\0",
        b"[" * 100_000,
        json.dumps([SETTINGS]).encode(),
        json.dumps(SETTINGS).encode() + b" " * (1 << 20),
        json.dumps(SETTINGS)[:-1].encode(),
    ],
)
def test_settings_that_cannot_be_read_are_no_reason_to_go_on(
    content: bytes, tmp_path: Path, begun: Callable[..., Finished]
) -> None:
    write_shard(tmp_path, 0, [good("a")], "jsonl")
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(OptionError, match="does not tell what the shards"):
        begun()
    assert set(all_rows(tmp_path)) == {"a"}
    assert (tmp_path / "settings.json").read_bytes() == content
    assert begun(resume=False).ids == set()
    (aside,) = tmp_path.glob("earlier-*")
    assert (aside / "settings.json").read_bytes() == content


def test_settings_that_are_gone_or_no_file_are_no_reason_either(
    tmp_path: Path, begun: Callable[..., Finished]
) -> None:
    (tmp_path / "settings.json").unlink()
    assert begun().ids == set()  # there is nothing yet that they could be of
    write_shard(tmp_path, 0, [good("a")], "jsonl")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(OptionError, match="it is missing"):
        begun()
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(OptionError, match="it is no file"):
        begun()


@posix
def test_settings_that_are_a_pipe_are_not_waited_for(
    tmp_path: Path, begun: Callable[..., Finished]
) -> None:
    write_shard(tmp_path, 0, [good("a")], "jsonl")
    (tmp_path / "settings.json").unlink()
    os.mkfifo(tmp_path / "settings.json")
    with pytest.raises(OptionError, match="it is no file"):
        begun()


ROW = good("b")
WRONG: tuple[Any, ...] = (
    *(1, None, "text", [], {}, {"id": "b"}, ROW | {"id": 1}, ROW | {"id": None}, ROW | {"id": ""}),
    *(ROW | {"seconds": None}, ROW | {"seconds": "2"}, ROW | {"seconds": -1.0}),
    *(ROW | {"seconds": float("nan")}, ROW | {"seconds": 10**400}, ROW | {"error_kind": 1}),
    *(ROW | {"seconds": True}, ROW | {"id": ["b"]}, ROW | {"seconds": float("inf")}),
)


@pytest.mark.parametrize("retry_errors", [False, True])
def test_a_shard_whose_rows_are_none_is_set_aside(
    retry_errors: bool, tmp_path: Path, begun: Callable[..., Finished], messages: list[str]
) -> None:
    contents = [json.dumps(wrong).encode() for wrong in WRONG]
    contents += [b"{", b"[" * 100_000, b"\xff", b"\0"]
    for number, line in enumerate(contents):
        write_shard(tmp_path, 2 * number, [good(f"a{number}")], "jsonl")
        replaced(tmp_path, 2 * number + 1, 1, line + b"\n", "jsonl")
    finished = begun(retry_errors=retry_errors)
    assert finished.ids == {f"a{number}" for number in range(len(contents))}
    assert len(list((tmp_path / "corrupt").iterdir())) == len(contents) == len(messages)


def test_parquet_with_other_columns_is_set_aside(
    tmp_path: Path, begun: Callable[..., Finished], messages: list[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tables = [
        pyarrow.table({"id": ["b"]}),
        pyarrow.table({"id": [1], "seconds": [1.0], "error_kind": ["E"]}),
        pyarrow.table({"id": ["b"], "seconds": ["1"], "error_kind": ["E"]}),
        pyarrow.table({"id": [b"b"], "seconds": [1.0], "error_kind": [None]}),
    ]
    contents = [b"PAR1", b"", b"PAR1" * 10]
    for table in tables:
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink)
        contents.append(bytes(sink.getvalue()))
    for number, content in enumerate(contents):
        replaced(tmp_path, number, 1, content, "parquet")
    assert begun().ids == set()
    assert len(messages) == len(contents)


def test_errors_are_not_taken_out_of_a_shard_that_is_not_whole(
    tmp_path: Path, begun: Callable[..., Finished], messages: list[str]
) -> None:
    rows = [good("a"), bad("b")]
    for row in rows:
        del row["text"]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path = replaced(tmp_path, 0, 2, data, "jsonl")
    assert begun(retry_errors=True).ids == set()
    assert (tmp_path / "corrupt" / path.name).read_bytes() == data
    assert len(messages) == 1


def test_what_is_called_a_shard_and_is_no_file_is_none(
    tmp_path: Path, begun: Callable[..., Finished]
) -> None:
    (tmp_path / "part-000000-1-00000000.jsonl").mkdir()
    (tmp_path / f"part-{'9' * 100}-1-00000000.jsonl").touch()
    (tmp_path / "part-\u0660\u0660\u0660\u0660\u0660\u0660-1-00000000.jsonl").touch()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "part-000001-1-00000000.jsonl")
    assert shards_in(tmp_path) == []
    assert begun() == Finished()


def test_a_row_is_what_its_columns_say() -> None:
    segment = {name: None for name in COLUMNS["segments"][0]}
    for row in (good("a"), bad("a"), good("a") | {"segments": [segment]}):
        assert misfit(row, tuple(COLUMNS)) is None
    word = segment | {"words": [{"start": "soon"}]}
    for wrong in ({"segments": [1]}, {"segments": {}}, {"segments": [word]}, {"text": 1}):
        assert misfit(good("a") | wrong, tuple(COLUMNS)) is not None
    assert misfit(good("a") | {"segments": [segment | {"tokens": [1.5]}]}, ("segments",))


@posix
def test_a_lock_that_is_a_link_leads_nowhere(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("by hand")
    out = tmp_path / "out"
    out.mkdir()
    for target in (other, tmp_path / "not-there", tmp_path):
        (out / ".lock").unlink(missing_ok=True)
        (out / ".lock").symlink_to(target)
        with pytest.raises(OptionError, match="is a link"), held(out):
            pass
    assert other.read_text() == "by hand"
    assert not (tmp_path / "not-there").exists()
    (out / ".lock").unlink()
    os.mkfifo(out / ".lock")
    with pytest.raises(OptionError, match="is no file"), held(out):
        pass
    (out / ".lock").unlink()
    (out / ".lock").mkdir()
    with pytest.raises(OptionError, match="cannot be written to"), held(out):
        pass


@posix
def test_a_folder_of_results_may_be_a_link(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", 2)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert run_batch(archive, tmp_path / "out", model=FakeModel(), subtitles=("srt",)).done == 2
    assert set(all_rows(tmp_path / "real")) == {"000.wav", "001.wav"}
    assert run_batch(tmp_path / "archive", tmp_path / "out", model=FakeModel(), subtitles=("srt",))


def test_what_killed_writers_left_is_cleared_away_anywhere(tmp_path: Path) -> None:
    archive, out = write_archive(tmp_path / "archive", 2), tmp_path / "out"
    run_batch(archive, out, model=FakeModel(), subtitles=("srt",), limit=1)
    left = f".{'0f' * 16}.tmp"
    (out / "subtitles" / "x" / "y").mkdir(parents=True)
    places = (out, out / "subtitles", out / "subtitles" / "x" / "y")
    for place in places:
        (place / left).write_text("half")
        (place / ".by-hand.tmp").write_text("not ours")
    (out / "subtitles" / f".{'0e' * 16}.tmp").mkdir()  # the folder of an id
    run_batch(archive, out, model=FakeModel(), subtitles=("srt",))
    for place in places:
        assert not (place / left).exists()
        assert (place / ".by-hand.tmp").exists()


def test_several_runs_from_the_start_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = write_archive(tmp_path / "archive", 1), tmp_path / "out"
    monkeypatch.setattr(time, "strftime", lambda form: "20240101-000000")
    for _ in range(4):
        run_batch(archive, out, model=FakeModel(), subtitles=("srt",), resume=False)
    aside = sorted(path.name for path in out.glob("earlier-*"))
    assert aside == [f"earlier-20240101-000000{suffix}" for suffix in ("", "-2", "-3")]
    for name in aside:
        assert set(all_rows(out / name)) == {"000.wav"}
        assert (out / name / "subtitles" / "000.srt").is_file()
    assert set(all_rows(out)) == {"000.wav"}


def test_a_file_system_that_becomes_read_only_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(BatchError, match="Read-only file system"):
        write_whole(tmp_path / "a", b"a")


def test_names_of_bytes_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    row = good("a") | {"path": "caf\udce9"}
    shard = write_shard(tmp_path, 0, [row], "jsonl")
    assert read_shard(shard) == [row]
    with pytest.raises(CorruptShard, match="rows instead of"):
        read_shard(Shard(shard.path, 0, 2, shard.crc))
