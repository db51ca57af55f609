"""`benchmarks/open_asr/run_eval.py`: data sets, the leaderboard's manifest, and figures."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.scripts.loading import load_script
from whisper_flash_attention.audio.bundled_clips import bundled_recordings

script: Any = load_script("open_asr/run_eval")
pytestmark = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
needs_kaldialign = pytest.mark.skipif(
    find_spec("kaldialign") is None, reason="kaldialign is not installed"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set in the leaderboard's layout: files with bytes and with paths, in two parts."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "data" / "librispeech"
    folder.mkdir(parents=True)
    clips = bundled_recordings()[:3]
    (folder / "third.wav").write_bytes(clips[2].path.read_bytes())
    rows = [
        {
            "audio": {"bytes": clips[0].path.read_bytes(), "path": "a.wav"},
            "text": clips[0].transcript,
        },
        {
            "audio": {"bytes": clips[1].path.read_bytes(), "path": "b.wav"},
            "text": script.NOT_SCORED,
        },
        {"audio": {"bytes": None, "path": "third.wav"}, "text": clips[2].transcript},
    ]
    for number, part in enumerate((rows[:2], rows[2:])):
        path = folder / f"test.clean-{number:05}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(part), path)
    return tmp_path / "data"


@needs_kaldialign
def test_a_local_data_set_gives_a_manifest_and_figures(data: Path, tmp_path: Path) -> None:
    arguments = {
        "model_id": "package:tiny.en",
        "dataset_path": str(data),
        "dataset": "librispeech",
        "split": "test.clean",
        "batch_size": "2",
        "warmup_steps": "0",
        "max_eval_samples": "-1",  # as the leaderboard's scripts have it
    }
    flags = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    row = tmp_path / "row.json"
    flags += ["--results", str(tmp_path / "results"), "--row", str(row), "--no-streaming"]
    result = CliRunner().invoke(script.app, flags)
    assert result.exit_code == 0, result.output
    path = script.manifest_path(
        tmp_path / "results", "package:tiny.en", str(data), "librispeech", "test.clean"
    )
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [list(line) for line in lines] == [
        ["audio_filepath", "duration", "time", "text", "pred_text"]
    ] * 2
    first, third = bundled_recordings()[0], bundled_recordings()[2]
    assert [line["text"] for line in lines] == [first.transcript, third.transcript]
    assert lines[0]["duration"] == pytest.approx(first.seconds, abs=0.01)
    assert lines[0]["time"] == lines[1]["time"] > 0
    found = json.loads(row.read_text())
    assert found["samples"] == 2 and found["wer"] < 10
    seconds, took = (sum(line[name] for line in lines) for name in ("duration", "time"))
    assert found["rtfx"] == pytest.approx(seconds / took, rel=1e-3)
    assert f"WER: {found['wer']} % RTFx: {found['rtfx']}" in result.output


@needs_kaldialign
def test_texts_are_normalised_and_compounds_are_the_same() -> None:
    rows = [
        {"text": "MISTER SMITH'S WHITE PAPER", "pred_text": "Mr. Smith's whitepaper!"},
        {"text": "five", "pred_text": "six"},
    ]
    found = script.score([row | {"duration": 3.0, "time": 0.5} for row in rows], None)
    assert found["wer"] == pytest.approx(16.67, abs=4) and found["rtfx"] == 6.0


def test_names_are_those_of_the_leaderboard() -> None:
    path = script.manifest_path(Path("results"), "openai/whisper-tiny", "a/b", "c/d", "test.clean")
    assert path.name == "MODEL_openai-whisper-tiny_DATASET_a-b_c-d_test.clean.jsonl"


def test_a_missing_split_or_column_is_named(data: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"no train\.parquet"):
        list(script.read_samples(str(data), "librispeech", "train", streaming=True))
    import pyarrow
    from pyarrow import parquet

    path = data / "librispeech" / "other.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"words": "one"}]), path)
    with pytest.raises(typer.BadParameter, match="no column of text"):
        list(script.read_samples(str(data), "librispeech", "other", streaming=True))


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_the_hub_needs_a_package() -> None:
    with pytest.raises(typer.BadParameter, match="pip install datasets"):
        list(script.read_samples("a/b", "librispeech", "test", streaming=True))
