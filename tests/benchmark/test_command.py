"""The command: what it refuses, what it lists, its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from whisper_flash_attention.benchmark import report as report_module
from whisper_flash_attention.benchmark.runner import Options
from whisper_flash_attention.benchmark.settings import Job, Row, Setting
from whisper_flash_attention.cli import app
from whisper_flash_attention.cli.benchmark import run_or_explain_resuming

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--setting", "small", "--checkpoint", "tiny", "--decoder-layers", "2", "--batches", "1")
LEAST = (*QUICK, "--new-tokens", "1", "--device", "cpu")


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and all that was printed, in one line."""
    result = CliRunner().invoke(app, ["benchmark", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "huge"], "--setting is 'huge': give default, large or small"),
        (["--checkpoint", "huge"], "--checkpoint is 'huge': give tiny, base"),
        (["--checkpoint", "tiny", "--decoder-layers", "24"], "nothing to measure for tiny"),
        (["--batches", "0", "--setting", "small"], "--batches is 0: give a whole number"),
        (
            ["--new-tokens", "500", "--setting", "small"],
            "--new-tokens is 500: give a whole number, 1",
        ),
        (["--timeout", "0"], "--timeout is 0: give a number of seconds above 0"),
        (["--system", "fast", "--device", "cpu"], "--system is 'fast': give orig, sdpa"),
        (
            ["--dtype", "int8", "--device", "cpu"],
            "--compute-type int8 is for transcription",
        ),
        (["--device", "abacus"], "--device is 'abacus': give auto"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, text = invoke(*arguments)
    assert code == 2
    assert text.startswith("error: ")
    assert message in text


def test_a_report_needs_rows(tmp_path: Path) -> None:
    code, text = invoke("--report", "--output", str(tmp_path / "nothing"))
    assert code == 2
    assert "holds no rows (results.jsonl): measure some first" in text
    assert not (tmp_path / "nothing").exists()


def test_the_committed_results_make_their_report_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "draw_plots", lambda rows, folder: [])
    committed = ROOT / "benchmarks" / "results" / "h200"
    shutil.copytree(committed, tmp_path / "h200")
    code, text = invoke("--report", "--output", str(tmp_path / "h200"))
    assert code == 0
    assert "large: batch 32, 256 new tokens" in text
    report = "results.md"
    assert (tmp_path / "h200" / report).read_text() == (committed / report).read_text()


def test_an_unknown_option_is_exit_code_2() -> None:
    code, text = invoke("--faster")
    assert code == 2
    assert "no such option" in text


def test_list_tells_what_can_run_here_and_runs_nothing(tmp_path: Path) -> None:
    code, text = invoke("--list", "--device", "cpu", "--output", str(tmp_path / "out"))
    assert code == 0
    for words in ("orig", "can run", "flash:flash_attn", "needs a CUDA", "12, 6, 4, 2", "256"):
        assert words in text
    assert not (tmp_path / "out").exists()


def test_success_is_exit_code_0_with_a_table_and_the_paths(tmp_path: Path) -> None:
    code, text = invoke(*LEAST, "--system", "flash", "--output", str(tmp_path))
    assert code == 0, text
    assert "small: batch 1, 1 new tokens, float32 on" in text
    assert f"wrote {tmp_path / 'results.json'}" in text
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["status"], row["tokens_checked"]) == ("ok", 1)


def test_a_row_that_is_not_ok_is_exit_code_1(tmp_path: Path) -> None:
    code, text = invoke(*LEAST, "--system", "flash:flash_attn", "--output", str(tmp_path))
    assert code == 1
    assert "skipped" in text


def test_ctrl_c_is_exit_code_130_and_explains_resuming(tmp_path: Path) -> None:
    long = Setting("small", batch_size=1, new_tokens=400, batches=100)
    job = Job(long, 100, Row("tiny", 2), "orig", "cpu", "float32")
    console = Console(width=200)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with console.capture() as output, pytest.raises(typer.Exit) as caught:
        run_or_explain_resuming([job], Options(tmp_path), console)
    assert caught.value.exit_code == 130
    assert "the same command resumes where this one stopped" in output.get()


def test_the_script_at_the_root_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmark_flash_attention.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--setting", "--checkpoint", "--decoder-layers", "--system", "--no-resume"):
        assert option in done.stdout


def test_help_is_quick_for_it_imports_no_pytorch() -> None:
    code = (
        "import sys, whisper_flash_attention.cli.benchmark;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
