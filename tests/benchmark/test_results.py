"""Rows on disk: appended, read back, torn, replaced, compared."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmark.rows import failed_row, make_row
from whisper_flash_attention.benchmark.results import (
    Keeper,
    Store,
    as_csv,
    as_json,
    percentile,
)
from whisper_flash_attention.errors import BenchmarkError, OptionError


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_row("orig"), make_row("flash", 0.01), failed_row("sdpa", "no reason")]
    store = Store(tmp_path / "new" / "folder")
    for row in rows:
        store.add(row)
    assert sorted(Store(store.folder).rows(), key=str) == sorted(rows, key=str)


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_torn_last_line_is_dropped_and_the_next_row_starts_a_line(
    tmp_path: Path, cut: int
) -> None:
    store = Store(tmp_path)
    store.add(make_row("orig"))
    store.add(make_row("flash", 0.01))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Store(tmp_path)
    assert [row.system for row in again.rows()] == ["orig"]
    again.add(make_row("sdpa", 0.05))
    assert [row.system for row in Store(tmp_path).rows()] == ["orig", "sdpa"]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make_row("orig"))
    path = tmp_path / "results.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(BenchmarkError, match=r"results\.jsonl is damaged in line 1"):
        Store(tmp_path)


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    record = asdict(make_row()) | {"speed": 1}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(BenchmarkError, match=r"another version .*speed"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match="output folder"):
        Store(tmp_path / "file" / "folder")


def test_a_newer_row_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make_row("flash", 0.02))
    store.add(make_row("flash", 0.01))
    assert [row.seconds_per_batch for row in store.rows()] == [0.01]


def test_only_rows_that_are_ok_are_finished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make_row("orig"))
    store.add(failed_row("flash", "out of memory"))
    assert store.finished() == {make_row("orig").key}


@pytest.mark.parametrize(
    "change",
    [
        {"batches": 5},
        {"dtype": "bfloat16"},
        {"new_tokens": 26},
        {"features": "librispeech: clips"},
        {"environment": {"torch": "2.12.0"}},
        {"environment": {"device_name": "NVIDIA L4"}},
    ],
)
def test_other_work_or_other_software_is_measured_anew(change: dict[str, Any]) -> None:
    assert make_row("orig", **change).key != make_row("orig").key


def test_our_code_counts_for_our_systems_only() -> None:
    newer = {"source": "ba9876543210", "commit": "v0.2.0"}
    assert make_row("orig", environment=newer).key == make_row("orig").key
    assert make_row("flash", environment=newer).key != make_row("flash").key
    name = "flash:sdpa_flash"
    assert make_row(name, environment=newer).key != make_row(name).key


def test_another_date_or_time_is_the_same_work() -> None:
    later = make_row("flash", 0.5, environment={"date": "2030-01-01T00:00:00+00:00"})
    assert later.key == make_row("flash", 0.01).key


def test_ids_are_compared_with_those_of_orig(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make_row("flash"), [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert store.rows()[0].tokens_equal_to_orig is None
    store.add(make_row("orig"), [[1, 2, 3, 4], [5, 6, 0, 0]])
    for again in (store, Store(tmp_path)):
        shares = {row.system: row.tokens_equal_to_orig for row in again.rows()}
        assert shares == {"orig": 1.0, "flash": 0.75}


def test_ids_from_other_speech_are_not_compared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make_row("orig"), [[1, 2]])
    store.add(make_row("flash", features="librispeech: clips"), [[1, 2]])
    assert {row.system: row.tokens_equal_to_orig for row in store.rows()}["flash"] is None


def test_rows_come_in_the_order_of_the_table(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make_row("flash:xformers", setting="large"))
    store.add(make_row("flash", decoder_layers=2))
    store.add(make_row("orig", checkpoint="medium", decoder_layers=24))
    store.add(make_row("orig", decoder_layers=2))
    store.add(make_row("orig"))
    order = [(r.setting, r.checkpoint, r.decoder_layers, r.system) for r in store.rows()]
    assert order == [
        ("default", "tiny", 4, "orig"),
        ("default", "tiny", 2, "orig"),
        ("default", "tiny", 2, "flash"),
        ("default", "medium", 24, "orig"),
        ("large", "tiny", 4, "flash:xformers"),
    ]


def test_json_carries_every_field_and_the_newest_environment() -> None:
    newer = make_row("flash", environment={"date": "2030-01-01T00:00:00+00:00", "torch": "3.0"})
    document = json.loads(as_json([make_row("orig"), newer]))
    assert document["environment"]["torch"] == "3.0"
    assert [row["system"] for row in document["rows"]] == ["orig", "flash"]
    assert document["rows"][0] == asdict(make_row("orig"))


def test_csv_has_a_column_for_every_value_and_none_for_lists() -> None:
    (record,) = csv.DictReader(io.StringIO(as_csv([make_row("orig", 0.08)])))
    assert record["system"] == "orig"
    assert float(record["seconds_per_batch"]) == 0.08
    assert record["torch"] == "2.11.0"
    assert record["attention"] == "all: eager"
    assert float(record["bytes_per_second"]) == 3.02e12
    assert not any("{" in value or "[" in value for value in record.values())


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_lies_between_the_extremes(values: list[float], share: float) -> None:
    assert min(values) <= percentile(values, share) * (1 + 1e-12)
    assert percentile(values, share) <= max(values) * (1 + 1e-12)


def test_percentiles_are_those_of_the_textbook() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([float(n) for n in range(11)], 0.9) == pytest.approx(9.0)


# --- rows in a JSON file -------------------------------------------------------------------------


def rows_in(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"]
    return rows


def test_a_full_disk_leaves_the_rows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    Keeper(path).keep({"system": "first"})
    keeper = Keeper(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BenchmarkError, match=r"rows.json cannot be written \(No space left"):
        keeper.keep({"system": "second"})
    assert rows_in(path) == [{"system": "first"}]
    assert [each.name for each in tmp_path.iterdir()] == ["rows.json"]


def test_an_interruption_leaves_the_rows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    keeper = Keeper(path)
    keeper.keep({"system": "first"})

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keeper.keep({"system": "second"})
    assert rows_in(path) == [{"system": "first"}]
    assert [each.name for each in tmp_path.iterdir()] == ["rows.json"]


def test_rows_go_where_a_link_points(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path, target = tmp_path / "rows.json", tmp_path / "elsewhere" / "rows.json"
    path.symlink_to(target)
    for name in ("first", "second"):
        Keeper(path).keep({"system": name})
    assert path.is_symlink()
    assert [row["system"] for row in rows_in(target)] == ["first", "second"]


@pytest.mark.parametrize(
    "content",
    [
        *(b'{"rows": 5}', b'{"rows": [3]}', b'{"rows": {"a": {}}}', b"{}", b"5", b"", b"\xff"),
        b"[" * 200_000,
    ],
)
def test_a_file_without_rows_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=r"output .*rows.json is there and holds no rows"):
        Keeper(path)
    assert path.read_bytes() == content


def test_an_output_that_cannot_be_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path, Path()):
        with pytest.raises(BenchmarkError, match="is no file: name one"):
            Keeper(path)
    with pytest.raises(BenchmarkError, match="there is no folder"):
        Keeper(tmp_path / "nowhere" / "rows.json")
    with pytest.raises(BenchmarkError, match=r"cannot be a file \(File name too long"):
        Keeper(tmp_path / ("x" * 300))

    def refuse(path: Path, data: bytes) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OptionError, match=r"cannot be written to \(Read-only file system"):
        Keeper(tmp_path / "rows.json")
