"""Rows become shards and subtitles, each id once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.batch.fakes import all_rows
from tests.batch.test_results import bad, good
from whisper_flash_attention.batch import sink as sinks
from whisper_flash_attention.batch.results import SUBTITLE_FOLDER, Finished
from whisper_flash_attention.batch.shards import shards_in
from whisper_flash_attention.batch.sink import Sink, subtitle_path
from whisper_flash_attention.errors import BatchError

IDS = st.text(st.characters(codec="utf-8") | st.sampled_from("./%\\"), min_size=1, max_size=300)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rows_wait_until_it_is_time(tmp_path: Path) -> None:
    clock = Clock()
    sink = Sink(tmp_path, Finished(), shard_seconds=10.0, clock=clock)
    sink.take([good("a"), bad("b")])
    clock.now = 9.9
    sink.take([good("c")])
    assert not shards_in(tmp_path)
    clock.now = 10.0
    sink.take([good("d")])
    assert set(all_rows(tmp_path)) == {"a", "b", "c", "d"}
    sink.take([good("e")])
    assert len(shards_in(tmp_path)) == 1
    sink.flush()
    sink.flush()
    assert [shard.number for shard in shards_in(tmp_path)] == [0, 1]
    assert (sink.tally.done, sink.tally.failed) == (4, 1)


def test_a_shard_has_no_more_than_fits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "SHARD_ROWS", 3)
    monkeypatch.setattr(sinks, "SHARD_AUDIO_SECONDS", 5.0)
    sink = Sink(tmp_path, Finished(), clock=Clock())
    sink.take([bad(str(number)) for number in range(7)])
    assert [shard.rows for shard in shards_in(tmp_path)] == [3, 3]
    sink.take([good("a"), good("b"), good("c")])  # 2 s each
    assert [shard.rows for shard in shards_in(tmp_path)] == [3, 3, 3]
    sink.flush()
    assert len(all_rows(tmp_path)) == 10


def test_an_id_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    finished = Finished(ids={"a"}, next_number=7)
    sink = Sink(tmp_path, finished)
    assert [row["id"] for row in sink.take([good("a"), good("b"), good("b")])] == ["b"]
    sink.flush()
    assert set(all_rows(tmp_path)) == {"b"}
    assert shards_in(tmp_path)[0].number == 7
    assert finished.ids == {"a", "b"}
    assert finished.tally.done == 1


def test_subtitles_lie_beside_in_the_same_folders(tmp_path: Path) -> None:
    sink = Sink(tmp_path, Finished(), subtitles=("srt", "vtt"))
    segment = {"start": 0.0, "end": 2.0, "text": "a", "tokens": [], "words": []}
    sink.take([good("x/talk.mp3") | {"segments": [segment]}, bad("x/other.mp3")])
    folder = tmp_path / SUBTITLE_FOLDER / "x"
    assert sorted(path.name for path in folder.iterdir()) == ["talk.mp3.srt", "talk.mp3.vtt"]
    assert "00:00:02,000\na" in (folder / "talk.mp3.srt").read_text()


def test_subtitles_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    (tmp_path / SUBTITLE_FOLDER).touch()
    sink = Sink(tmp_path, Finished(), subtitles=("srt",))
    with pytest.raises(BatchError, match="the same command goes on"):
        sink.take([good("a")])
    sink.flush()
    assert not shards_in(tmp_path)


@given(ids=st.lists(IDS, min_size=2, max_size=2, unique=True))
def test_every_id_has_a_file_of_its_own_in_the_folder(ids: list[str]) -> None:
    folder = Path("/results/subtitles")
    paths = [subtitle_path(folder, each, "srt") for each in ids]
    assert paths[0] != paths[1]
    for path in paths:
        assert path.is_relative_to(folder)
        assert ".." not in path.parts
        assert all(len(part.encode()) < 255 for part in path.parts)
