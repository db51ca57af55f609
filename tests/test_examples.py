"""The programs in `examples/` run as a reader would run them, with tiny.en."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from whisper_flash_attention.audio import BundledClip

EXAMPLES = REPOSITORY / "examples"
MOST_LINES = 40
pytestmark = pytest.mark.usefixtures("windows_are_encoded_once")


@pytest.fixture
def run_example(
    tiny_en: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """A function that runs an example in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: Any) -> str:
        command = [name, *map(str, arguments), "--model", tiny_en]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_examples_are_short() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in paths] == ["batch", "drop_in", "subtitles", "transcribe", "words"]
    for path in paths:
        assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES, path.name


def test_drop_in(run_example: Callable[..., str]) -> None:
    assert "Dashwood" in run_example("drop_in.py")


def test_transcribe(run_example: Callable[..., str]) -> None:
    printed = run_example("transcribe.py")
    assert printed.startswith("   0.00") and "Dashwood" in printed


def test_subtitles(run_example: Callable[..., str], tmp_path: Path) -> None:
    run_example("subtitles.py")
    lines = (tmp_path / "subtitles.srt").read_text("utf-8").splitlines()
    assert "-->" in lines[1] and max(map(len, lines)) <= 42


def test_words(
    run_example: Callable[..., str], bundled_recordings: tuple[BundledClip, ...]
) -> None:
    lines = run_example("words.py", bundled_recordings[1].path).splitlines()
    assert lines[0].endswith("He") and lines[-1].endswith("man.")


def test_batch(
    run_example: Callable[..., str],
    tmp_path: Path,
    bundled_recordings: tuple[BundledClip, ...],
) -> None:
    clip = bundled_recordings[1].path
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / clip.name).write_bytes(clip.read_bytes())
    printed = run_example("batch.py", "recordings", "texts")
    assert printed.startswith(f"{clip.name}: He was not an")
    assert (tmp_path / "texts" / "subtitles" / "austen_0880.srt").is_file()
