"""What an archive consists of: folders, patterns, URLs and manifests."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batch.fakes import write_wav
from whisper_flash_attention.batch.items import BYTES_PER_SECOND, Item, longest_first
from whisper_flash_attention.batch.manifest import SHOWN_DUPLICATES, read_archive
from whisper_flash_attention.batch.storage import check_protocols
from whisper_flash_attention.errors import MissingPackage, OptionError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"id": TEXT, "path": TEXT.map(lambda name: f"/archive/{name}")},
        optional={
            "language": st.sampled_from(["de", "German", "en"]),
            "task": st.sampled_from(["transcribe", "translate"]),
            "prompt": TEXT,
            "start": st.floats(0, 10),
            "end": st.floats(10.5, 1e6),
            "seconds": st.floats(0, 1e6),
        },
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda row: row["id"],
)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: [row.get(name) for row in rows] for name in columns}
    parquet.write_table(pyarrow.table(table), path)
    return path


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
@settings(deadline=None, max_examples=40)
@given(rows=ROWS)
def test_a_manifest_says_what_was_written(
    suffix: str, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("manifest") / f"archive{suffix}"
    archive = read_archive(str(WRITERS[suffix](path, rows)))
    assert archive.items == [Item(**row) for row in rows]
    assert not archive.rejected
    assert not archive.unused


@settings(deadline=None, max_examples=40)
@given(rows=ROWS)
def test_items_travel_as_lines(rows: list[dict[str, Any]]) -> None:
    for item in (Item(**row) for row in rows):
        assert Item.from_json(item.to_json()) == item


def test_rows_that_say_nothing_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "archive.jsonl"
    lines = (
        b'{"id": "a", "path": "a.wav", "speaker": "x"}',
        b"{not json",
        b'{"id": "b"}',
        b'{"path": "b.wav"}',
        b'{"id": "b", "path": "b.wav", "start": 5, "end": 4}',
        b'{"id": "b", "path": "b.wav", "start": "soon"}',
        b'{"id": "b", "path": "b.wav", "language": "klingon"}',
        b'{"id": "b", "path": "b.wav", "task": "sing"}',
        b'{"id": "b", "path": ["b.wav"]}',
        b'["b", "b.wav"]',
        b'{"id": "\xff", "path": "b.wav"}',
        b"",
        b'{"id": 7, "path": "c.wav", "language": "German"}',
    )
    path.write_bytes(b"\n".join(lines))
    archive = read_archive(str(path))
    assert archive.items == [
        Item("a", str(tmp_path / "a.wav")),
        Item("7", str(tmp_path / "c.wav"), language="de"),
    ]
    assert [each.row for each in archive.rejected] == list(range(2, 12))
    reasons = [each.reason for each in archive.rejected]
    for reason, expected in zip(
        reasons,
        (
            *("not JSON", "path is missing", "id is missing", "end must be after start"),
            *("number of seconds", "klingon", "sing", "must be text", "not a JSON object", "JSON"),
        ),
        strict=True,
    ):
        assert expected in reason
    assert archive.unused == ("speaker",)


def test_rows_of_a_csv_are_told_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "archive.csv"
    path.write_bytes(b"\xef\xbb\xbfid,path\r\na,a.wav\r\nb\r\n\r\nc,\xff.wav\r\nd,d.wav\r\n")
    archive = read_archive(str(path))
    assert [item.id for item in archive.items] == ["a", "d"]
    assert [each.row for each in archive.rejected] == [2, 4]
    path.write_text("name,file\na,a.wav\n")
    with pytest.raises(OptionError, match="needs columns id and path"):
        read_archive(str(path))


def test_ids_that_are_there_twice_are_refused_with_a_list(tmp_path: Path) -> None:
    rows = [{"id": name, "path": "a.wav"} for name in ("a", "b", "a", "c", "b", "a")]
    path = write_jsonl(tmp_path / "archive.jsonl", rows)
    with pytest.raises(OptionError, match=r"2 ids .*a \(rows 1, 3, 6\); b \(rows 2, 5\)"):
        read_archive(str(path))
    many = [{"id": str(number % 12), "path": "a.wav"} for number in range(24)]
    with pytest.raises(OptionError, match=f"and {12 - SHOWN_DUPLICATES} more"):
        read_archive(str(write_jsonl(path, many)))


@pytest.mark.parametrize("content", [b"", b"{}\n{}\n"])
def test_a_manifest_without_any_recording_is_misuse(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "archive.jsonl"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="no row that names a recording"):
        read_archive(str(path))


def test_parquet_that_is_none_is_misuse(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    path = tmp_path / "archive.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(OptionError, match="not parquet"):
        read_archive(str(path))


def test_a_folder_gives_ids_by_the_paths_in_it(tmp_path: Path) -> None:
    small, large = write_wav(tmp_path / "x" / "b.wav"), write_wav(tmp_path / "a.wav", 3_200)
    (tmp_path / "notes.txt").write_text("not a recording")
    items = read_archive(str(tmp_path)).items
    assert [item.id for item in items] == ["a.wav", "x/b.wav"]
    assert [item.path for item in items] == [str(large), str(small)]
    assert items[0].expected_seconds == large.stat().st_size / BYTES_PER_SECOND
    assert [item.id for item in read_archive(f"{tmp_path}/**/*.wav").items] == ["a.wav", "x/b.wav"]
    assert [item.id for item in read_archive(str(large)).items] == ["a.wav"]


def test_a_folder_at_a_url_gives_the_same(tmp_path: Path) -> None:
    for name in ("x/b.wav", "a.wav", "x/notes.txt"):
        write_wav(tmp_path / name)
    local = read_archive(str(tmp_path)).items
    for source in (f"file://{tmp_path}", f"file://{tmp_path}/", f"file://{tmp_path}/**"):
        remote = read_archive(source).items
        assert [item.id for item in remote] == ["a.wav", "x/b.wav"]
        assert [item.path for item in remote] == [f"file://{item.path}" for item in local]
        assert [item.seconds for item in remote] == [item.seconds for item in local]
    (one,) = read_archive(f"file://{tmp_path}/x/b.wav").items
    assert one.id == "b.wav"


def test_a_file_system_in_a_file_is_listed_too(tmp_path: Path) -> None:
    packed = tmp_path / "talks.zip"
    with zipfile.ZipFile(packed, "w") as file:
        file.write(write_wav(tmp_path / "a.wav"), "x/a.wav")
    (item,) = read_archive(f"zip://::file://{packed}").items
    assert (item.id, item.path) == ("x/a.wav", f"zip://x/a.wav::file://{packed}")


def test_a_manifest_at_a_url_names_what_lies_beside_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "archive.jsonl", [{"id": "a", "path": "x/a.wav"}])
    (item,) = read_archive(f"file://{tmp_path}/archive.jsonl").items
    assert item.path == f"file://{tmp_path}/x/a.wav"


@pytest.mark.skipif(os.name != "posix", reason="names of files are text elsewhere")
def test_names_that_are_not_utf8_have_ids_that_can_be_written(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        os.link(write_wav(tmp_path / "a.wav"), path)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    item = read_archive(str(tmp_path)).items[1]
    assert item.id == "caf\\udce9.wav"
    assert os.fsencode(Item.from_json(item.to_json()).path) == path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere", "there is no such"),
        ("nothing/*.wav", "matches no recordings"),
        ("file:///nowhere-at-all", "no recordings"),
        ("README.md", "neither a folder nor"),
        ("nowhere.csv", "cannot be read"),
        ("gopher://bucket/x", "unknown to fsspec"),
    ],
)
def test_misuse_is_told(source: str, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        read_archive(source)


def test_protocols_that_nothing_speaks_are_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError(f"Install {protocol}fs")

    check_protocols([Item("a", "/a.wav"), Item("b", "file:///b.wav")])
    with pytest.raises(OptionError, match="gopher"):
        check_protocols([Item("a", "gopher://x.wav"), Item("b", "gopher://a.wav")])
    check_protocols([Item("a", "gopher://x.wav"), Item("b", "/a.wav")])  # an error of one row
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MissingPackage, match=r"s3:// needs the package s3fs, .*: pip install s3fs"):
        check_protocols([Item("a", "s3://bucket/a.wav")])


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://bucket/calls", "s3fs"),
        ("gs://bucket/calls", "gcsfs"),
        ("az://box/calls", "adlfs"),
        ("https://host/calls", "aiohttp"),
        ("simplecache::s3://bucket/calls", "s3fs"),
    ],
)
def test_packages_of_storage_are_named_with_the_command_that_installs_them(
    url: str, package: str
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    expected = f"needs the package {package}, which is not installed: pip install {package}"
    with pytest.raises(MissingPackage) as caught:
        read_archive(url)
    assert str(caught.value).endswith(expected)


def test_other_storage_is_told_in_the_words_of_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(protocol: str) -> None:
        raise ImportError('SFTPFileSystem requires "paramiko" to be installed')

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MissingPackage, match=r'sftp:// needs a package .*"paramiko"'):
        read_archive("sftp://host/calls")


def test_the_longest_come_first_and_the_unknown_last() -> None:
    items = [
        Item("unknown", "a"),
        Item("short", "a", seconds=5.0),
        Item("part", "a", start=10.0, end=40.0),
        Item("rest", "a", start=10.0, seconds=25.0),
    ]
    assert [item.id for item in longest_first(items)] == ["part", "rest", "short", "unknown"]
