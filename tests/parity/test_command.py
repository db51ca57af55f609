"""The command `whisper-flash parity`: exit codes, what is printed, what is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from tests.parity.checkpoints import write_features
from whisper_flash_attention.audio import BundledClip
from whisper_flash_attention.cli import app
from whisper_flash_attention.parity import models as loading


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Ended:
    result = CliRunner().invoke(app, ["parity", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def break_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.OurWhisper.from_pretrained

    def broken(*args: object, **options: object) -> object:
        model = load(*args, **options)
        with torch.no_grad():
            model.model.decoder.layers[0].self_attn.v_proj.weight.mul_(-1.0)
        return model

    monkeypatch.setattr(loading.OurWhisper, "from_pretrained", broken)


def test_the_same_tokens_are_exit_code_0(
    english_folder: Path, feature_file: Path, tmp_path: Path
) -> None:
    written = tmp_path / "parity.json"
    ended = call(
        *("--model", english_folder, "--features", feature_file, "--device", "cpu"),
        *("--mode", "greedy", "--mode", "beams", "--output", written, "--limit", "2"),
    )
    assert ended.code == 0, ended.err
    assert "the same: 4 of 4 results identical\n" in ended.out
    assert "[1/2] greedy: clip0, clip1" in ended.err
    content = json.loads(written.read_text())
    assert content["same"] is True
    assert content["dtype"] == "float32"
    assert content["environment"]["torch"] == torch.__version__
    assert [row["mode"] for row in content["summary"]] == ["greedy", "beams"]
    assert [row["identical"] for row in content["summary"]] == [2, 2]
    assert len(content["results"]) == 4
    assert content["results"][0]["reference"] == content["results"][0]["ours"] != []
    assert set(content["logit_errors"]) == {"clip0", "clip1"}


def test_a_broken_model_is_exit_code_1_with_positions(
    english_folder: Path,
    feature_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_ours(monkeypatch)
    written = tmp_path / "parity.json"
    ended = call(
        *("--model", english_folder, "--features", feature_file, "--device", "cpu"),
        *("--mode", "greedy", "--output", written),
    )
    assert ended.code == 1
    assert "NOT the same: " in ended.out
    content = json.loads(written.read_text())
    assert content["same"] is False
    bad = [row for row in content["results"] if row["status"] == "unexplained"]
    assert bad
    for row in bad:
        position = row["position"]
        assert row["reference"][:position] == row["ours"][:position]
        assert f"unexplained: greedy, {row['recording']}, position {position}: stock" in ended.out


def test_real_weights_on_real_speech_with_a_bad_file_and_a_transcript(
    tiny_en: str, bundled_recordings: tuple[BundledClip, ...], tmp_path: Path
) -> None:
    recording = bundled_recordings[4]
    shutil.copy(recording.path, tmp_path / "talk.wav")
    (tmp_path / "talk.txt").write_text(f"{recording.transcript} Indeed")
    (tmp_path / "bad.wav").write_text("not sound")
    ended = call(
        *("--model", tiny_en, "--audio", tmp_path, "--device", "cpu"),
        *("--mode", "greedy"),
    )
    assert ended.code == 0, ended.err
    assert f"skipped: {tmp_path / 'bad.wav'}: " in ended.err
    assert "skipped: 1 that could not be read" in ended.out
    assert "the same: 1 of 1 results identical" in ended.out
    words = len(recording.transcript.split()) + 1
    greedy = next(line for line in ended.out.splitlines() if "greedy" in line)
    assert f"{100 / words:.2f} %" in greedy  # the missing word, and no other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "fast", "--audio", "x.wav"], "--mode is 'fast': give greedy"),
        (["--batch-size", "0", "--audio", "x.wav"], "--batch-size is 0"),
        (["--language", "germn", "--audio", "x.wav"], "did you mean german"),
        ([], "give either --audio"),
        (["--audio", "x.wav", "--features", "x.npz"], "give either --audio"),
        (["--audio", "x.wav", "--output", "no/such/folder/x.json"], "cannot be written"),
        (
            ["--audio", "x.wav", "--dtype", "int8"],
            "--compute-type int8 is for transcription",
        ),
        (["--audio", "x.wav", "--attention", "fast"], "--attention is 'fast': give auto"),
        (["--audio", "x.wav", "--model", "./nowhere"], "nowhere: does not exist"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    model = [] if "--model" in arguments else ["--model", "package:tiny.en"]
    ended = call(*model, *arguments, "--device", "cpu")
    assert ended.code == 2
    assert ended.out == ""
    line = ended.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def test_nothing_that_can_be_read_is_exit_code_2(english_folder: Path, tmp_path: Path) -> None:
    wrong = write_features(tmp_path / "wrong.npz", frames=100)
    ended = call("--model", english_folder, "--features", wrong, "--device", "cpu")
    assert ended.code == 2
    assert "nothing to compare" in ended.err.splitlines()[-1]


def test_recordings_need_a_processor_and_features_do_not(
    english_folder: Path, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    ended = call("--model", english_folder, "--audio", bundled_recordings[0].path)
    assert ended.code == 2
    assert "WhisperFeatureExtractor" in ended.err


def test_an_english_only_model_refuses_german(english_folder: Path, feature_file: Path) -> None:
    ended = call("--model", english_folder, "--features", feature_file, "--language", "de")
    assert ended.code == 2
    assert "--language de needs a multilingual model" in ended.err


def test_help_shows_examples_and_is_quick_for_it_imports_no_pytorch() -> None:
    assert "whisper-flash parity --model small --audio recordings" in call("--help").out
    code = (
        "import sys, whisper_flash_attention.cli.parity;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
