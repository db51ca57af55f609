"""The folder of results is kept in order, whatever was killed when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.batch.fakes import all_rows, damage
from whisper_flash_attention.batch import results
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.results import Finished, held, prepare
from whisper_flash_attention.batch.rows import Row, failed_row, finished_row
from whisper_flash_attention.batch.shards import shards_in, write_shard
from whisper_flash_attention.errors import BatchError, OptionError

SETTINGS = {"model": "tiny", "language": None, "task": "transcribe", "temperature": (0.0, 0.2)}
NOTHING = {"text": "a", "language": "en", "segments": [], "seconds": 2.0}


def good(name: str) -> Row:
    return finished_row(Item(name, f"{name}.wav"), NOTHING, 0.5)


def bad(name: str) -> Row:
    return failed_row(Item(name, f"{name}.wav"), "AudioError", "cannot be read")


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def open_again(tmp_path: Path, messages: list[str]) -> Callable[..., Finished]:
    # As the run began that wrote the shards.
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))

    def prepared(settings: Any = SETTINGS, **options: bool) -> Finished:
        wanted = {"resume": True, "retry_errors": False} | options
        return prepare(tmp_path, settings, tell=messages.append, **wanted)

    return prepared


def test_what_is_in_shards_is_finished(
    tmp_path: Path, open_again: Callable[..., Finished], messages: list[str]
) -> None:
    assert open_again() == Finished()
    write_shard(tmp_path, 0, [good("a"), bad("b")], "jsonl")
    write_shard(tmp_path, 4, [good("c")], "jsonl")
    left = tmp_path / f".{'1f' * 16}.tmp"
    left.write_text("half a sha")
    (tmp_path / "summary.json").write_text("{}")
    finished = open_again()
    assert finished.ids == {"a", "b", "c"}
    assert finished.next_number == 5
    assert (finished.tally.done, finished.tally.failed) == (2, 1)
    assert finished.tally.audio_seconds == 4.0
    assert finished.tally.kinds == {"AudioError": 1}
    assert not left.exists()
    assert not (tmp_path / "summary.json").exists()
    assert not messages


def test_a_damaged_shard_is_set_aside_and_told(
    tmp_path: Path, open_again: Callable[..., Finished], messages: list[str]
) -> None:
    write_shard(tmp_path, 0, [good("a"), good("b")], "jsonl")
    write_shard(tmp_path, 1, [good("c")], "jsonl")
    aside = damage(tmp_path)
    assert open_again().ids == {"c"}
    assert aside.is_file()
    assert len(messages) == 1
    assert "its 2 recordings are done again" in messages[0]
    assert open_again().ids == {"c"}
    assert len(messages) == 1


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_errors_are_taken_out_to_be_done_again(
    tmp_path: Path, open_again: Callable[..., Finished], output_format: str
) -> None:
    if output_format == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    write_shard(tmp_path, 0, [good("a"), bad("b"), good("c")], output_format)
    write_shard(tmp_path, 1, [bad("d")], output_format)
    write_shard(tmp_path, 2, [good("e")], output_format)
    finished = open_again(retry_errors=True)
    assert finished.ids == {"a", "c", "e"} == set(all_rows(tmp_path))
    assert finished.tally.failed == 0
    assert [(shard.number, shard.rows) for shard in shards_in(tmp_path)] == [(0, 2), (2, 1)]


def test_killed_while_errors_are_taken_out(
    tmp_path: Path, open_again: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment when the new shard is there and the old one, too."""
    write_shard(tmp_path, 0, [good("a"), bad("b"), good("c")], "jsonl")
    write_shard(tmp_path, 0, [good("a"), good("c")], "jsonl")
    assert open_again().ids == {"a", "c"} == set(all_rows(tmp_path))


def test_the_new_one_damaged_is_no_reason_to_drop_the_old(
    tmp_path: Path, open_again: Callable[..., Finished], messages: list[str]
) -> None:
    write_shard(tmp_path, 0, [good("a"), bad("b"), good("c")], "jsonl")
    write_shard(tmp_path, 0, [good("a"), good("c")], "jsonl")
    aside = damage(tmp_path)
    assert open_again().ids == {"a", "b", "c"} == set(all_rows(tmp_path))
    assert aside.is_file()
    assert len(messages) == 1


def test_shards_of_two_runs_are_not_taken_for_one(
    tmp_path: Path, open_again: Callable[..., Finished]
) -> None:
    write_shard(tmp_path, 0, [good("a")], "jsonl")
    write_shard(tmp_path, 1, [good("b"), good("a")], "jsonl")
    with pytest.raises(BatchError, match="id 'a', which is in an earlier shard"):
        open_again()


def test_results_of_other_settings_are_refused_or_set_aside(
    tmp_path: Path, open_again: Callable[..., Finished], messages: list[str]
) -> None:
    open_again()
    base = SETTINGS | {"model": "base"}
    open_again(base)  # nothing is there yet that would not fit
    write_shard(tmp_path, 0, [good("a")], "jsonl")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(OptionError, match="model 'base', now 'tiny'"):
        open_again()
    assert (tmp_path / "summary.json").exists()
    assert open_again(base | {"new": 1}).ids == {"a"}
    assert open_again(resume=False).ids == set()
    (aside,) = tmp_path.glob("earlier-*")
    assert set(all_rows(aside)) == {"a"}
    assert json.loads((aside / "settings.json").read_text())["model"] == "base"
    assert len(messages) == 1


def test_one_run_at_a_time(tmp_path: Path) -> None:
    if not hasattr(results.os, "fork"):
        pytest.skip("the lock is POSIX's")
    program = (
        "import pathlib, sys\n"
        "from whisper_flash_attention.batch.results import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OptionError, match="another run is writing"), held(tmp_path):
            pass
        other.kill()
        other.wait()
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_misuse(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written to"), held(tmp_path / "file" / "out"):
        pass
