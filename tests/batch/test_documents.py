"""The pages about archives: their commands run, their tables are what the script makes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.batch.fakes import FakeModel, all_rows, write_archive
from tests.conftest import REPOSITORY
from tests.documents import python_blocks
from tests.scripts.loading import load_script
from whisper_flash_attention.cli import app, batch

PAGE = (REPOSITORY / "docs" / "archive.md").read_text()


def commands() -> list[list[str]]:
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [each[1:] for each in words if each[:2] == ["whisper-flash", "batch"]]


def test_the_local_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    write_archive(tmp_path / "recordings", 3)
    rows = [f"call-{number},recordings/{number:03d}.wav\n" for number in range(3)]
    (tmp_path / "calls.csv").write_text("id,path\n" + "".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "Model", lambda source, **where: FakeModel(source))
    local = [words for words in commands() if "s3://" not in " ".join(words)]
    assert len(local) >= 6
    for words in local:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.stderr)
    assert set(all_rows(Path("calls"))) == {"call-0", "call-1", "call-2"}
    assert set(all_rows(Path("subtitled"))) == set(all_rows(Path("texts")))
    assert len(list(Path("subtitled", "subtitles").iterdir())) == 6
    assert [path.suffix for path in Path("tables").glob("part-*")] == [".parquet"]
    pytest.importorskip("pandas", reason="the page's snippet needs pandas")
    [shard] = Path("texts").glob("part-*.jsonl")
    (block,) = python_blocks(PAGE)
    names: dict[str, Any] = {}
    exec(compile(re.sub(r"part-\d+-\d+-\w+\.jsonl", shard.name, block), "page", "exec"), names)
    assert len(names["rows"]) == 3


def test_every_command_has_the_options_shown() -> None:
    shown = CliRunner().invoke(app, ["batch", "--help"], terminal_width=200).output
    for words in commands():
        for option in (word for word in words if word.startswith("--")):
            assert option in shown


def test_the_tables_are_made_from_the_committed_results() -> None:
    script = load_script("_scale")
    assumed = script.Assumptions()
    made = script.scale_tables(script.read_measured(assumed), assumed)
    pages = load_script("_pages")
    assert pages.between_marks((REPOSITORY / "docs" / "scale.md").read_text(), "scale") == made


def test_a_simulated_archive_takes_what_arithmetic_says() -> None:
    script = load_script("_scale")
    never = script.Assumptions(
        archive_hours=1_000.0, start_seconds=0.0, hours_between_failures=1e12
    )
    groups = script.groups_of(never)
    assert sum(groups) == pytest.approx(3.6e6, rel=0.1)
    alone = script.simulate(groups, 1, 100.0, never)
    assert alone.seconds == pytest.approx(sum(groups) / 100.0)
    assert (alone.failures, alone.useful) == (0, pytest.approx(1.0))
    several = script.simulate(groups, 8, 100.0, never)
    assert alone.seconds / 8 <= several.seconds <= alone.seconds / 8 + max(groups) / 100.0
    often = script.Assumptions(archive_hours=1_000.0, hours_between_failures=1.0)
    failing = script.simulate(groups, 8, 100.0, often)
    assert failing.failures > 0
    assert failing.seconds > several.seconds
