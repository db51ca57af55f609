"""Shards are there whole or not at all, and damage is noticed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.rows import COLUMNS, SEGMENT, WORD, Row, failed_row, finished_row
from whisper_flash_attention.batch.shards import (
    FORMATS,
    CorruptShard,
    Shard,
    check_format,
    read_shard,
    shards_in,
    write_shard,
)
from whisper_flash_attention.errors import BatchError, OptionError
from whisper_flash_attention.transcribe import Segment, Transcription, Word

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
SECONDS = st.floats(0, 1e5)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    item = Item(draw(TEXT.filter(bool)), "a.wav")
    if draw(st.booleans()):
        return failed_row(item, "AudioError", draw(TEXT))
    start, length = draw(SECONDS), draw(SECONDS)
    word = Word(start, start + length, draw(TEXT), 0.5)
    words = (word,) if draw(st.booleans()) else ()
    segment = Segment(
        *(start, start + length, draw(TEXT), (1, 50_364), -0.5, None, 1.5, 0.2, words),
        channel=draw(st.none() | st.integers(1, 2)),
        language=draw(st.none() | st.just("de")),
        id=draw(st.integers(0, 9)),
        seek=draw(st.integers(0, 9)),
    )
    text = Transcription(draw(TEXT), "de", (segment,), start + length)
    return finished_row(item, text.to_dict(), draw(SECONDS))


def folder_of(output_format: str, factory: pytest.TempPathFactory) -> Path:
    if output_format == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    return factory.mktemp("shards")


@pytest.mark.parametrize("output_format", FORMATS)
@settings(deadline=None, max_examples=40)
@given(written=st.lists(rows(), min_size=1, max_size=4))
def test_what_is_written_is_read(
    output_format: str, written: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of(output_format, tmp_path_factory)
    shard = write_shard(folder, 3, written, output_format)
    assert shards_in(folder) == [shard]
    assert (shard.number, shard.rows) == (3, len(written))
    assert read_shard(shard) == written
    assert read_shard(shard, ("id", "error")) == [
        {"id": row["id"], "error": row["error"]} for row in written
    ]
    assert [path.name for path in folder.iterdir()] == [shard.path.name]


@pytest.mark.parametrize("output_format", FORMATS)
@settings(deadline=None, max_examples=40)
@given(written=st.lists(rows(), min_size=1, max_size=3), data=st.data())
def test_any_damage_is_noticed(
    output_format: str,
    written: list[Row],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shard = write_shard(folder_of(output_format, tmp_path_factory), 0, written, output_format)
    content = bytearray(shard.path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    shard.path.write_bytes(content)
    with pytest.raises(CorruptShard):
        read_shard(shard)


def test_the_columns_are_those_of_transcriptions() -> None:
    word = Word(0.0, 1.0, "a", 0.5)
    text = Transcription("a", "en", (Segment(0.0, 1.0, "a", (1,), words=(word,)),), 1.0).to_dict()
    (segment,) = text["segments"]
    row = finished_row(Item("a", "a"), text, 1.0)
    # The channel and the language are left out where they are not set.
    assert {*row["segments"][0], "channel", "language"} == set(SEGMENT)
    assert row["segments"] == text["segments"]
    assert list(segment["words"][0]) == list(WORD)
    assert list(row) == list(COLUMNS)
    assert list(failed_row(Item("a", "a"), "E", "e")) == list(COLUMNS)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = write_shard(tmp_path, 0, [failed_row(Item("a", "a"), "E", "e")], "jsonl")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BatchError, match=r"No space left on device.*the same command goes on"):
        write_shard(tmp_path, 1, [failed_row(Item("b", "b"), "E", "e")], "jsonl")
    assert list(tmp_path.iterdir()) == [before.path]


def test_other_files_are_none_of_ours(tmp_path: Path) -> None:
    for name in ("part-1.jsonl", "part-000001-1-0000000g.jsonl", ".x.tmp", "notes.txt"):
        (tmp_path / name).touch()
    assert shards_in(tmp_path) == []


def test_a_shard_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="cannot be read"):
        read_shard(Shard(tmp_path / "part-000000-1-00000000.jsonl", 0, 1, 0))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(OptionError, match=r"output_format is .*: give jsonl or parquet"):
        check_format("xml")
