"""The command line: what it says, and its exit codes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.batch.fakes import FakeModel, all_rows, write_archive
from whisper_flash_attention.batch.run import run_batch
from whisper_flash_attention.batch.sink import Sink
from whisper_flash_attention.cli import app, batch
from whisper_flash_attention.cli.batch import batch_command
from whisper_flash_attention.errors import WeightsError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive", 3)


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "Model", lambda source, **where: FakeModel(source, raises_at=1_602))


def call(*arguments: str | Path) -> tuple[int, str]:
    words = ["batch", *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_errors_of_some_are_exit_code_1(archive: Path, tmp_path: Path) -> None:
    code, output = call(archive, "--output", tmp_path / "out", "--subtitles", "srt, vtt")
    assert code == 1
    assert "error: 002.wav: this one cannot be heard" in output
    assert "1 RuntimeError" in output
    assert "--retry-errors retries what failed" in output
    assert len(list((tmp_path / "out" / "subtitles").iterdir())) == 4
    (archive / "002.wav").unlink()
    code, output = call(archive, "-o", tmp_path / "other", "--word-timestamps", "--preset", "fast")
    assert code == 0
    assert set(all_rows(tmp_path / "other")) == {"000.wav", "001.wav"}
    assert output.startswith("2 recordings to transcribe; loading the model small\n")
    assert "2 (0.2 s of audio)" in output
    assert "2 recordings, 0.2 s in " in output
    code, output = call(archive, "-o", tmp_path / "other", "--word-timestamps", "--preset", "fast")
    assert code == 0
    assert output.startswith("2 of 2 are there already\n")
    assert "this run" not in output and "loading" not in output


def test_the_same_command_goes_on(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(archive, "-o", out, "--limit", "2")[0] == 0
    code, output = call(archive, "-o", out)
    assert code == 1
    assert "2 of 3 are there already" in output
    code, output = call(archive, "-o", out, "--model", "other")
    assert code == 2
    assert output.startswith("error: ")
    assert "model 'small', now 'other'" in output
    code, output = call(archive, "-o", out, "--model", "other", "--no-resume")
    assert "2 earlier shards are in" in output
    assert len(all_rows(out)) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("nowhere",),
        ("nowhere", "-o", "out"),
        (".", "-o", "out", "--engine", "slurm"),
        (".", "-o", "out", "--task", "sing"),
        (".", "-o", "out", "--limit", "0"),
    ],
)
def test_misuse_is_exit_code_2(
    arguments: tuple[str, ...], archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(archive)
    assert call(*arguments)[0] == 2
    assert not Path("out").exists()


def test_no_model_is_exit_code_2(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: FakeModel) -> None:
        raise WeightsError("there is no such checkpoint")

    monkeypatch.setattr(FakeModel, "open", missing)
    code, output = call(archive, "-o", tmp_path / "out")
    assert code == 2
    assert output.splitlines() == [
        "3 recordings to transcribe; loading the model small",
        "error: there is no such checkpoint",
    ]


def test_an_interruption_says_how_to_go_on(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Sink, rows: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sink, "take", interrupt)
    code, output = call(archive, "-o", tmp_path / "out")
    assert code == 130
    assert output.splitlines()[-1] == "interrupted: the same command goes on"


def test_decoding_and_subtitles_have_the_options_of_transcribe(
    archive: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--initial-prompt", "the heath", "--attention", "sdpa", "--beam-size", "2")
    lines = ("--subtitles", "srt", "--max-line-width", "8")
    assert call(archive, "-o", out, "--limit", "2", *options, *lines)[0] == 0
    assert all_rows(out)["000.wav"]["text"] == "1600 transcribe after the heath"
    assert "1600\ntranscribe\nafter\nthe\nheath\n" in (out / "subtitles/000.srt").read_text()
    code, output = call(archive, "-o", out, *options, "--subtitles", "srt", "--max-line-width", "9")
    assert code == 2
    assert "--max-line-width 8, now 9" in output
    code, output = call(archive, "-o", tmp_path / "other", "--max-line-width", "9")
    assert code == 2
    assert "lines and cues are for subtitles" in output


def test_every_argument_of_python_is_there_on_the_command_line() -> None:
    """Some under other names: groups of options, the cluster's parts."""
    grouped = {"source", "model", "run_options", "cluster", "subtitle_options", "console"}
    ours = set(inspect.signature(batch_command).parameters)
    assert set(inspect.signature(run_batch).parameters) - grouped <= ours
