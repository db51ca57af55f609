"""Manifests that are odd as a whole are refused in one line; odd rows cost only themselves."""

from __future__ import annotations

import datetime
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.batch.fakes import FakeModel, write_wav
from whisper_flash_attention.batch import manifest, run_batch
from whisper_flash_attention.batch.items import MOST_SECONDS, Item
from whisper_flash_attention.batch.manifest import SHOWN_COLUMNS, read_archive
from whisper_flash_attention.cli import app
from whisper_flash_attention.errors import OptionError, WhisperFlashError
from whisper_flash_attention.transcribe.inputs import find_inputs, path_kind

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from([*manifest.COLUMNS, "speaker", "ID", " id"])
ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), min_size=1, max_size=3)


def check_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    path = folder / "archive.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    try:
        archive = read_archive(str(path))
    except OptionError:
        return
    assert archive.items
    assert len(archive.items) + len(archive.rejected) == len(rows)
    for item in archive.items:
        assert 0 <= item.start <= MOST_SECONDS
        assert Item.from_json(item.to_json()) == item


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifests")


@settings(deadline=None, max_examples=60)
@given(rows=ROWS)
def test_any_rows_are_read_or_refused(rows: list[dict[str, Any]], folder: Path) -> None:
    check_rows(rows, folder)


@settings(deadline=None, max_examples=200)
@given(
    data=st.binary(max_size=80)
    | st.lists(
        st.sampled_from([b"id", b"path", b",", b"\n", b'"', b"\0", b"\xff", b"a", b"\r"])
    ).map(b"".join)
)
def test_any_bytes_are_read_or_refused(data: bytes, folder: Path) -> None:
    for suffix in (".csv", ".jsonl"):
        path = folder / f"bytes{suffix}"
        path.write_bytes(data)
        try:
            read_archive(str(path))
        except OptionError:
            continue


@pytest.mark.slow
@settings(deadline=None, max_examples=20_000)
@given(rows=ROWS)
def test_any_of_many_rows_are_read_or_refused(rows: list[dict[str, Any]], folder: Path) -> None:
    check_rows(rows, folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,path,id\na,a.wav,b\n", "column id is there 2 times"),
        (b"id,path,start,start,start\n", "column start is there 3 times"),
        (b"ID,Path\na,a.wav\n", "needs columns id and path, but has 'ID', 'Path'"),
        (b"", "needs columns id and path, but has none"),
        (b'"id,path\na,a.wav\n', "heading is not csv"),
        ("id,path\na,a.wav\n".encode("utf-16"), "needs columns id and path"),
        (b"\0" * 100, "needs columns id and path"),
        (b"a" * 200_000 + b",b\n", "heading is not csv"),
        (b",".join(b"c%d" % number for number in range(10**6)), "and 999990 more"),
        (b"id,path\n\xff,a.wav\n", "no row that names a recording: row 1: id is not UTF-8"),
    ],
)
def test_a_csv_that_is_odd_as_a_whole_is_refused_in_one_line(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "archive.csv"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=expected) as raised:
        read_archive(str(path))
    assert len(str(raised.value)) < 1_000


def test_odd_rows_of_a_csv_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "archive.csv"
    odd = (
        *(b"a\0b,a.wav,", b"x,a\0b.wav,", b'"new\nline",a.wav,', b"b,a.wav,1e999", b"c,a.wav,nan"),
        *(
            b"d,a.wav,-1",
            b"e,a.wav,1e300",
            b"f,\xff.wav,",
            b"y" * 200_000 + b",a.wav,",
            b'"g"h,a.wav,',
        ),
    )
    path.write_bytes(b"id,path,start\n" + b"\n".join(odd) + b"\ngood,a.wav,\n")
    archive = read_archive(str(path))
    assert [item.id for item in archive.items] == ["a\0b", "new\nline", "good"]
    assert [each.row for each in archive.rejected] == [2, 4, 5, 6, 7, 8, 9, 10]
    assert all(len(each.reason) < 300 for each in archive.rejected)


def test_columns_without_end_are_no_table_of_names(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(100_000)]
    path = tmp_path / "archive.csv"
    path.write_text(f"id,path,{','.join(names)}\na,a.wav{',' * len(names)}\n")
    assert read_archive(str(path)).unused == tuple(names[:SHOWN_COLUMNS])
    path = tmp_path / "archive.jsonl"
    lines = ({"id": name, "path": "a.wav", name: 1} for name in names[:1_000])
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert len(read_archive(str(path)).unused) == SHOWN_COLUMNS


def test_odd_lines_of_json_cost_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MOST_LINE_BYTES", 10_000)
    path = tmp_path / "archive.jsonl"
    deep = b"[" * 900 + b"]" * 900
    odd = (
        *(b"[" * 9_000, b'{"id": "a", "path": "a.wav", "x": "' + b"x" * 30_000 + b'"}'),
        *(b'{"id": ' + deep + b', "path": "a.wav"}', b'{"id": "a", "path": "a.wav", "start": NaN}'),
        *(b'{"id": "a", "path": "a.wav", "end": 1e999}', b'{"id": true, "path": "a.wav"}'),
        *(
            b'{"id": "\\ud800", "path": "a.wav"}',
            b'{"id": "a", "path": "a\\u0000.wav"}',
            b"\xff\xfe",
        ),
        *(b'{"id": "a", "path": "a.wav", "start": 1' + b"0" * 5_000 + b"}", b"\0", b'"a"', b"1"),
    )
    path.write_bytes(b"\n".join(odd) + b'\n{"id": "good", "path": "a.wav", "x": ' + deep + b"}")
    archive = read_archive(str(path))
    assert [item.id for item in archive.items] == ["good"]
    assert [each.row for each in archive.rejected] == list(range(1, len(odd) + 1))
    assert all(len(each.reason) < 300 for each in archive.rejected)


def write_columns(target: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    parquet.write_table(pyarrow.table(columns), target)
    return target


def test_columns_of_parquet_that_are_not_used_may_hold_anything(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    day = datetime.date(2024, 1, 1)
    path = write_columns(
        tmp_path / "archive.parquet",
        id=["a"],
        path=["a.wav"],
        start=pyarrow.array([1.5], pyarrow.float32()),
        day=[day],
        nanoseconds=pyarrow.array([1], pyarrow.timestamp("ns")),
        far=pyarrow.array([2**62], pyarrow.timestamp("us")),
        zone=pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Olympus")),
        raw=[b"\xff"],
        nested=[{"a": [day]}],
    )
    archive = read_archive(str(path))
    assert archive.items == [Item("a", str(tmp_path / "a.wav"), start=1.5)]
    assert archive.unused == ("day", "nanoseconds", "far", "zone", "raw", "nested")
    assert run_batch(path, tmp_path / "out", model=FakeModel()).failed == 1  # it is not there


def test_columns_of_parquet_that_are_used_hold_text_and_numbers(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "archive.parquet"
    for name, values in (
        ("id", [b"a"]),
        ("start", [datetime.date(2024, 1, 1)]),
        ("start", [True]),
        ("prompt", [["a"]]),
        ("language", [{"a": 1}]),
    ):
        columns = {"id": ["a"], "path": ["a.wav"]} | {name: values}
        with pytest.raises(OptionError, match=f"column {name} has type"):
            read_archive(str(write_columns(path, **columns)))
    with pytest.raises(OptionError, match="needs columns id and path, but has 'id', 'file'"):
        read_archive(str(write_columns(path, id=["a"], file=["a"])))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["id", "path", "id"])
    parquet.write_table(twice, path)
    with pytest.raises(OptionError, match="column id is there 2 times"):
        read_archive(str(path))
    odd = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xffb")],
    )
    parquet.write_table(pyarrow.table({"id": odd, "path": ["a.wav"] * 2}), path)
    archive = read_archive(str(path))
    assert [item.id for item in archive.items] == ["b"]
    assert [(each.row, each.reason) for each in archive.rejected] == [(1, "is not UTF-8")]
    dictionary = pyarrow.array(["a", "b"]).dictionary_encode()
    write_columns(path, id=dictionary, path=pyarrow.array(["a", "b"], pyarrow.large_string()))
    assert [item.id for item in read_archive(str(path)).items] == ["a", "b"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e10, 10**400])
def test_lengths_are_bounded(value: float) -> None:
    for name in ("start", "end", "seconds"):
        with pytest.raises(OptionError, match=r"must be (seconds|after)"):
            Item("a", "a.wav", **{name: value})


def test_lengths_as_large_as_they_may_be_end_no_run(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav")
    rows = [{"id": f"{number}", "path": "a.wav", "seconds": 1e9} for number in range(3)]
    rows += [
        {"id": "tiny", "path": "a.wav", "end": 1e-320},
        {"id": "long", "path": "a.wav", "end": 1e9},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    summary = run_batch(path, tmp_path / "out", model=FakeModel())
    assert (summary.done, summary.failed) == (4, 1)


LONG, NUL = "x" * 5_000, "a\0b"


@pytest.mark.parametrize(
    "name", [LONG, NUL, f"{LONG}.csv", f"{NUL}.jsonl", f"{LONG}/*.wav", f"{NUL}*"]
)
def test_names_that_no_file_can_have_are_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        read_archive(str(tmp_path / name) if os.sep not in name else name)
    for words in (("batch", name, "-o", str(tmp_path / "out")), ("transcribe", name)):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, result.exception
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [LONG, NUL, "file/out"])
def test_a_folder_of_results_that_cannot_be_is_one_line(name: str, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav")
    (tmp_path / "file").touch()
    with pytest.raises(WhisperFlashError, match="cannot be written to"):
        run_batch(tmp_path, tmp_path / name, model=FakeModel())


def test_a_folder_that_may_not_be_searched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        for look in (path_kind, lambda path: find_inputs([path]), read_archive):
            with pytest.raises(OptionError, match="Permission denied"):
                look("secret/a.wav")  # type: ignore[operator]


def test_a_manifest_that_is_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        with pytest.raises(OptionError, match="is a pipe"):
            read_archive(str(path))
        path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(OptionError, match="is a device"):
        read_archive(str(path))
    # A folder is one, whatever it is called.
    path.unlink()
    write_wav(path / "a.wav")
    assert [item.id for item in read_archive(str(path)).items] == ["a.wav"]
