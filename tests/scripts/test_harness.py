"""`benchmarks/_harness.py`, and every script's commands: their help, and small runs on a CPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.conftest import REPOSITORY
from tests.scripts.loading import SCRIPTS, load_script
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.batch import run_batch
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize

COMMANDS: dict[str, tuple[str, ...]] = {
    "attention": ("backends", "encoder", "absorbed"),
    "products": ("cpu", "encoder"),
    "encoder": (),
    "generate": ("cpu", "cpu-step", "start-up", "step"),
    "audio": ("front-end", "decoders", "parts", "detector"),
    "invented": (),
    "memory": ("rows", "release"),
    "texts": ("compare", "long-form", "words"),
    "archive": ("engines", "scaling"),
    "short_windows": (),
    "start": (),
    "tables": ("readme", "scale"),
}
# Imported by scripts, or not a command.
MODULES = {path.stem for path in SCRIPTS.glob("_*.py")} | {"charts"}
SMALL = ModelSize(d_model=64, heads=1, encoder_layers=1, decoder_layers=1, ffn=96)


def run(name: str, *arguments: object) -> Any:
    return CliRunner().invoke(load_script(name).app, list(map(str, arguments)), terminal_width=200)


def run_to_json(name: str, path: Path, *arguments: object) -> dict[str, Any]:
    """The document that a script writes."""
    result = run(name, *arguments, "--commit", "abc", "--output", path)
    assert result.exit_code == 0, (result.output, result.exception)
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["environment"]["commit"] == "abc"
    return document


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "tiny" is smaller still."""
    monkeypatch.setitem(MODEL_SIZES, "tiny", SMALL)


def test_every_script_is_known_here() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {*COMMANDS, *MODULES}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    shown = run(name, "--help")
    assert shown.exit_code == 0, shown.output
    for command in COMMANDS[name]:
        assert command in shown.output
        own = run(name, command, "--help")
        assert own.exit_code == 0, own.output
        assert ("--write" if name == "tables" else "--output") in own.output


def test_every_command_that_pages_and_scripts_show_exists() -> None:
    """`benchmarks/x.py command --option` in docs, CONTRIBUTING and the scripts."""
    pages = [
        REPOSITORY / "CONTRIBUTING.md",
        *REPOSITORY.glob("docs/**/*.md"),
        *SCRIPTS.glob("*.py"),
    ]
    found = 0
    for page in pages:
        text = page.read_text("utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
        for name, rest in re.findall(r"benchmarks/([a-z_]+)\.py([^\n`#]*)", text):
            assert name in COMMANDS or name in MODULES, f"{page.name}: benchmarks/{name}.py"
            words = shlex.split(rest) if rest.count('"') % 2 == 0 and "'" not in rest else []
            if not words or not COMMANDS.get(name) or words[0] not in COMMANDS[name]:
                continue
            found += 1
            shown = run(name, words[0], "--help").output
            for option in (word for word in words if re.fullmatch(r"--[a-z-]+", word)):
                assert option in shown, f"{page.name}: {name} {words[0]} has no {option}"
    assert found > 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ("attention", "encoder"),
        ("attention", "absorbed"),
        ("products", "encoder"),
        ("generate", "step"),
        ("memory", "rows"),
        ("memory", "release"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(command: tuple[str, str]) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert "needs a CUDA GPU" in result.output


def test_the_kernels_of_a_step_are_those_of_the_engine() -> None:
    for module, names in load_script("generate").KERNELS.items():
        for name in names:
            assert callable(getattr(module, name)), name


def test_attention_backends_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("attention")
    shapes = (script.Shape("prefill", 4, 4, True), script.Shape("self step", 1, 8, True, True))
    monkeypatch.setattr(script, "SHAPES", shapes)
    arguments = (
        "backends",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--size",
        "tiny",
        "--batch",
        1,
    )
    document = run_to_json("attention", tmp_path / "rows.json", *arguments)
    rows = {(row["case"], row["backend"]): row for row in document["rows"]}
    for case in ("prefill", "self step"):
        assert rows[case, "auto"]["microseconds"] > 0
        assert rows[case, "reference"]["error"] < 1e-5
    assert any("why_not" in row for row in document["rows"])


def test_products_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("products")
    monkeypatch.setattr(script, "SHAPES", ((32, 16),))
    monkeypatch.setattr(script, "WEIGHT_BYTES", 4 * 32 * 16 * 3)
    arguments = ("cpu", "--threads", 1, "--rounds", 1)
    document = run_to_json("products", tmp_path / "rows.json", *arguments)
    assert [(row["rows"], row["n"], row["k"]) for row in document["rows"]] == [
        (1, 32, 16), (4, 32, 16), (1500, 32, 16),
    ]  # fmt: skip
    for row in document["rows"]:
        assert min(row[name] for name in ("linear", "onednn", "left", "engine")) > 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("child", ["ours", "stock"])
def test_the_first_token_on_a_cpu(child: str) -> None:
    arguments = ("--checkpoint", "tiny", "--batch", 1, "--device", "cpu", "--child", child)
    result = run("generate", "start-up", *arguments)
    assert result.exit_code == 0, result.output
    assert float(result.stdout.strip().splitlines()[-1]) > 0


def test_front_end_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("audio")
    monkeypatch.setattr(script, "LOG_MEL_ROUNDS", {1: 1})
    arguments = ("front-end", "--threads", 1)
    document = run_to_json("audio", tmp_path / "rows.json", *arguments)
    assert [row["format"] for row in document["decoding"]] == ["wav", "flac", "mp3"]
    assert min(row["times_real"] for row in document["decoding"]) > 1
    assert [row["mel_bins"] for row in document["log_mel"]] == [80, 128]
    assert max(row["difference"] for row in document["log_mel"]) < 1e-3


def test_parts_of_one_recording(tmp_path: Path) -> None:
    arguments = ("parts", "--minutes", 0.1, "--processes", 1)
    document = run_to_json("audio", tmp_path / "rows.json", *arguments)
    assert [row["container"] for row in document["rows"]] == ["wav", "flac", "mp3", "m4a"]
    assert min(row[name] for row in document["rows"] for name in ("one", "parts")) > 1


def test_archives_on_both_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("archive")

    def instant_run(**settings: Any) -> dict[str, Any]:
        files = len(list(Path(settings["source"]).rglob("*.wav")))
        row = {"engine": settings["engine"], "files": files, "failed": 0, "seconds": 1 + files / 4}
        return row | {"files_per_second": 1.0, "memory_mb": 1.0, "memory_together_mb": 2.0}

    monkeypatch.setattr(script, "run_in_process", instant_run)
    arguments = ("engines", "--counts", 2, "--counts", 6, "--rounds", 1)
    document = run_to_json("archive", tmp_path / "rows.json", *arguments)
    assert [(row["engine"], row["files"]) for row in document["overhead"]] == [
        ("local", 2), ("ray", 2), ("local", 6), ("ray", 6),
    ]  # fmt: skip
    assert document["beyond_start"] == {"local": 4.0, "ray": 4.0}
    arguments = ("scaling", "--workers", 1, "--workers", 2, "--copies", 2)
    documents: list[dict[str, Any]] = []
    monkeypatch.setattr(script, "write_json", lambda *values: documents.append(values[-1]))
    assert run("archive", *arguments).exit_code == 0
    assert [row["times_real"] for row in documents[0]["rows"]] == [1_200.0, 1_200.0]


def test_an_archive_runs_without_a_model(tmp_path: Path) -> None:
    script, source = load_script("archive"), tmp_path / "recordings"
    source.mkdir()
    for name in ("a", "b"):
        script.write_wave(source / f"{name}.wav", 3_000 * np.sin(np.arange(16_000)))
    inputs = [AudioSource(np.zeros(8_000, np.float32)), np.zeros(16_000, np.float32)]
    found = list(script.DoNothing().transcribe_each(inputs, batch_size=2))
    assert [(index, each.seconds) for index, each in found] == [(0, 0.5), (1, 1.0)]
    summary = run_batch(source, tmp_path / "texts", model=script.DoNothing())
    assert (summary.done, summary.failed) == (2, 0)


def test_the_memory_of_a_process_and_what_it_started() -> None:
    with load_script("archive").PeakMemory() as memory:
        memory._ended.wait(0.6)
    assert 0 < memory.own <= memory.together


def test_a_process_is_timed_with_the_phases_that_it_reports() -> None:
    start = load_script("start")
    row = start.run_once([sys.executable, "-c", "print(1.0, 3.0, 3.5, 3.5, 4.0)"], dict(os.environ))
    assert [row[name] for name in start.PHASES] == [2.0, 0.5, 0.0, 0.5]
    assert 0 < row["seconds"] < 60 and 1 < row["peak_mib"] < 100
    silent = start.run_once([sys.executable, "-c", "pass"], dict(os.environ))
    assert silent.keys() == {"seconds", "peak_mib"}
    with pytest.raises(typer.BadParameter, match="failed"):
        start.run_once([sys.executable, "-c", "raise SystemExit(1)"], dict(os.environ))


@pytest.mark.slow
def test_whole_processes_take_turns(tmp_path: Path, tiny_en: str) -> None:
    document = run_to_json("start", tmp_path / "rows.json", "--rounds", 1, "--threads", 1)
    rows = {row["system"]: row for row in document["rows"]}
    assert set(rows) == {"command", "script", "python", "--version", "--help"}
    assert rows["python"]["seconds"] < rows["--help"]["seconds"] < rows["command"]["seconds"]
    assert rows["script"]["load"] > 0


def test_systems_take_turns_and_are_timed() -> None:
    calls: list[str] = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = load_script("_harness").time_in_turns(works, 2)
    assert calls == ["a", "b", "a", "b"]
    assert [len(times[name]) for name in ("a", "b")] == [2, 2]


def test_sets_of_inputs_exceed_the_cache() -> None:
    cold_sets = load_script("_harness").cold_sets
    assert (cold_sets(30, 100), cold_sets(300, 100), cold_sets(300, 100, least=2)) == (4, 1, 2)


def test_a_kernel_that_is_wrong_or_fails_gets_no_time() -> None:
    measure = load_script("_harness").measure_kernel

    def fail() -> float:
        raise RuntimeError("first line\nno such instruction")

    rows: list[dict[str, Any]] = [{}, {}, {}]
    good, wrong, failed = rows
    measure(good, lambda: 1e-4, lambda: 5.0, 1e-3)
    measure(wrong, lambda: 1e-2, fail, 1e-3)
    measure(failed, fail, fail, 1e-3)
    assert good == {"error": 1e-4, "microseconds": 5.0}
    assert wrong == {"error": 1e-2, "failure": "relative error 1.0e-02"}
    assert failed["failure"] == "failed: RuntimeError: no such instruction"


def test_options_that_are_not_known_are_refused() -> None:
    harness = load_script("_harness")
    for refused in (
        lambda: harness.one_of("size", ["tiny", "huge"], MODEL_SIZES),
        lambda: harness.half_dtype("float32"),
    ):
        with pytest.raises(typer.BadParameter, match="possible: "):
            refused()
