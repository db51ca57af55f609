"""Whole runs in real processes: rows, failures, resuming, Ctrl-C, files, and the time left."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from whisper_flash_attention.benchmark.results import ResultRow, Store
from whisper_flash_attention.benchmark.roofline import Ceilings
from whisper_flash_attention.benchmark.runner import (
    LINE_EVERY,
    Estimate,
    Options,
    Outcome,
    ProgressReporter,
    expected_seconds,
    run,
)
from whisper_flash_attention.benchmark.settings import SETTINGS, Job, Row, Setting
from whisper_flash_attention.errors import BenchmarkError

WORK = Setting("small", batch_size=1, new_tokens=3, batches=1)
SYSTEMS = ("orig", "flash:nonsense", "flash", "flash:flash_attn")


def make_jobs(*systems: str) -> list[Job]:
    return [Job(WORK, 5, Row("tiny", 2), system, "cpu", "float32") for system in systems]


def run_quietly(jobs: Sequence[Job], options: Options) -> tuple[Outcome, str]:
    output = io.StringIO()
    outcome = run(jobs, options, Console(file=output))
    return outcome, output.getvalue()


def rows_by_system(outcome: Outcome) -> dict[str, ResultRow]:
    return {row.system: row for row in outcome.rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def first_run(folder: Path) -> tuple[Outcome, str]:
    return run_quietly(make_jobs(*SYSTEMS), Options(folder))


def test_systems_that_run_are_measured(first_run: tuple[Outcome, str]) -> None:
    rows = rows_by_system(first_run[0])
    for system in ("orig", "flash"):
        row = rows[system]
        assert row.status == "ok", row.error
        assert (row.batches, row.setting_batches) == (1, 5)
        assert row.tokens_checked == 3
        assert row.seconds_total == row.seconds_per_batch == row.seconds[0]
        assert row.seconds_per_batch > row.roofline_seconds_per_batch / 10
        assert row.parameters == 33_028_992
        assert row.compression == pytest.approx(37_760_640 / 33_028_992)
        assert row.features.startswith("bundled")


def test_flash_gives_the_ids_of_orig(first_run: tuple[Outcome, str]) -> None:
    assert rows_by_system(first_run[0])["flash"].tokens_equal_to_orig == 1.0


def test_a_row_that_fails_has_its_reason_and_the_run_goes_on(
    first_run: tuple[Outcome, str], folder: Path
) -> None:
    row = rows_by_system(first_run[0])["flash:nonsense"]
    assert row.status == "failed"
    assert row.error is not None
    assert "OptionError: system is 'flash:nonsense': give orig" in row.error
    assert row.seconds_per_batch is None
    log = (folder / "failures.log").read_text()
    assert "=== small tiny 2 flash:nonsense" in log
    assert "Traceback" in log


def test_a_system_that_cannot_run_here_is_skipped(first_run: tuple[Outcome, str]) -> None:
    row = rows_by_system(first_run[0])["flash:flash_attn"]
    assert row.status == "skipped"
    assert "needs a CUDA GPU" in str(row.error)


def test_every_file_is_written(first_run: tuple[Outcome, str], folder: Path) -> None:
    names = {path.name for path in first_run[0].files}
    assert names == {
        *("results.jsonl", "results.json", "results.csv", "results.md"),
        *("tokens.jsonl", "failures.log"),
        *("plot-small.png", "plot-small.svg"),
    }
    assert names <= {path.name for path in folder.iterdir()}
    document = json.loads((folder / "results.json").read_text())
    assert {row["system"]: row["status"] for row in document["rows"]} == {
        "orig": "ok",
        "flash": "ok",
        "flash:nonsense": "failed",
        "flash:flash_attn": "skipped",
    }
    assert "| tiny | 2 | 33.0 M |" in (folder / "results.md").read_text()


def test_progress_is_in_lines_where_there_is_no_terminal(
    first_run: tuple[Outcome, str],
) -> None:
    lines = first_run[1].splitlines()
    assert lines[:3] == [
        "measuring this machine's ceilings (a copy and a product)",
        "computing features of speech (bundled)",
        "[1/4] small tiny 2 orig: warming up",
    ]
    *_, ended = (line for line in lines if line.startswith("[1/4] "))
    assert "s per batch of 1 (" in ended
    assert any(line.startswith("[2/4] small tiny 2 flash:nonsense: failed: ") for line in lines)
    assert any(line.startswith("[4/4] ") for line in lines)


def test_lines_within_a_row_come_every_few_seconds() -> None:
    job = replace(make_jobs("orig")[0], setting=replace(WORK, batches=100))
    output, now = io.StringIO(), 0.0
    bars = Progress(console=Console(file=output, width=200), disable=True)
    reporter = ProgressReporter(Estimate([job], H100), bars, clock=lambda: now)
    reporter.start(job)
    for batch in range(1, 101):
        now += LINE_EVERY / 40
        reporter.advance(batch)
    lines = [line.partition(" (")[0] for line in output.getvalue().splitlines()]
    title = "[1/1] small tiny 2 orig"
    assert lines == [
        f"{title}: {state}" for state in ("warming up", "batch 40 of 100", "batch 80 of 100")
    ]


def test_a_second_run_repeats_only_what_is_not_ok(
    first_run: tuple[Outcome, str], folder: Path
) -> None:
    lines_before = (folder / "results.jsonl").read_text().splitlines()
    outcome, output = run_quietly(make_jobs("orig", "flash:nonsense"), Options(folder))
    added = (folder / "results.jsonl").read_text().splitlines()[len(lines_before) :]
    assert [json.loads(line)["system"] for line in added] == ["flash:nonsense"]
    assert "1 of 2 rows were measured before" in output
    assert [row.system for row in outcome.requested] == ["orig", "flash:nonsense"]
    assert len(outcome.rows) == 4


def test_a_row_that_takes_too_long_fails_and_can_be_repeated(tmp_path: Path) -> None:
    jobs = make_jobs("orig")
    outcome, _ = run_quietly(jobs, Options(tmp_path, timeout=0.05))
    (row,) = outcome.rows
    assert (row.status, row.error) == ("failed", "took longer than 0.05 s")
    assert not Store(tmp_path).finished()


def test_no_resume_measures_again(first_run: tuple[Outcome, str], folder: Path) -> None:
    before = len((folder / "results.jsonl").read_text().splitlines())
    run_quietly(make_jobs("flash"), Options(folder, resume=False))
    assert len((folder / "results.jsonl").read_text().splitlines()) == before + 1


def test_a_run_without_speech_is_reported_before_any_row(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"'podcasts' cannot be had: .*sources: bundled"):
        run_quietly(make_jobs("orig"), Options(tmp_path, features="podcasts"))


def test_a_missing_device_is_reported_before_any_row(tmp_path: Path) -> None:
    (job,) = make_jobs("orig")
    with pytest.raises(BenchmarkError, match="meta cannot be measured in float32"):
        run_quietly([replace(job, device="meta")], Options(tmp_path))


class InterruptingFile(io.StringIO):
    """Where the second row's turn comes, the user presses Ctrl-C, half a second into it."""

    def write(self, text: str) -> int:
        if text.startswith("[2/2]"):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return super().write(text)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(tmp_path: Path) -> None:
    quick = make_jobs("flash:flash_attn")[0]
    long = replace(quick, system="orig", setting=replace(WORK, new_tokens=400, batches=100))
    with pytest.raises(KeyboardInterrupt):
        run([quick, long], Options(tmp_path), Console(file=InterruptingFile()))
    assert not multiprocessing.active_children()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["system"] for row in rows] == ["flash:flash_attn"]


def test_a_terminal_gets_a_bar_with_the_time_left(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    run(make_jobs("flash:flash_attn"), Options(tmp_path), console)
    assert "1/1 rows, 0 s left" in output.getvalue()


H100 = Ceilings(3.02e12, 766e12)


def make_job(setting: str, checkpoint: str, layers: int) -> Job:
    return Job(SETTINGS[setting], 1, Row(checkpoint, layers), "orig", "cuda", "float16")


def test_deeper_and_larger_work_is_expected_to_take_longer() -> None:
    expected = [
        expected_seconds(make_job(*job), H100)
        for job in (
            ("small", "tiny", 2),
            ("default", "tiny", 2),
            ("default", "medium", 24),
            ("large", "medium", 24),
        )
    ]
    assert expected == sorted(expected)


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    jobs = [make_job("default", "tiny", 4)] * 4
    estimate = Estimate(jobs, H100)
    assert estimate.left == "? left"
    now = 110.0
    estimate.finish(jobs[0])
    assert estimate.left == "30 s left"
    now = 200.0
    estimate.advance(jobs[1], SETTINGS["default"].batches)
    assert estimate.left == "2 min left"
    now = 400.0
    for job in jobs[1:]:
        estimate.finish(job)
    assert estimate.left == "0 s left"
    assert estimate.done == pytest.approx(estimate.total)
