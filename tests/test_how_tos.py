"""Commands and blocks of Python in the how-tos run, with tiny.en for the models that they name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import REPOSITORY
from whisper_flash_attention.audio import Recording
from whisper_flash_attention.cli import app
from whisper_flash_attention.transcribe import loading


@pytest.fixture(scope="module")
def loaded(tiny_en: str) -> Any:
    return loading.load(tiny_en, device="cpu")


@pytest.fixture
def place(
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundled_recordings: tuple[Recording, ...],
) -> Path:
    """A folder with what the how-tos name; every model is tiny.en."""
    short, other = bundled_recordings[1].path, bundled_recordings[4].path
    (tmp_path / "podcasts" / "2026").mkdir(parents=True)
    for name, clip in (("talk.wav", short), ("call.wav", other), ("podcasts/2026/one.wav", short)):
        shutil.copy(clip, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda source, **options: loaded)
    return tmp_path


def read(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text("utf-8")


def run_commands(text: str) -> int:
    commands = re.findall(r"^    whisper-flash (.+)$", text, flags=re.MULTILINE)
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, f"{command}: {result.output}"
    return len(commands)


def run_blocks(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "how-to", "exec"), names)
    return names


def test_a_folder_of_podcasts(place: Path) -> None:
    text = read("podcasts.md")
    assert run_commands(text) == 5
    for name in ("texts/2026/one.txt", "texts/2026/one.srt", "quick/2026/one.txt"):
        assert (place / name).read_text(), name
    assert "-->" in (place / "subtitles" / "2026" / "one.vtt").read_text()
    run_blocks(text)
    assert json.loads((place / "podcasts" / "2026" / "one.json").read_text())["language"] == "en"


def test_a_notebook(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = read("notebook.md")
    assert run_commands(text) == 0
    names = run_blocks(text)
    assert names["words"][0]["end"] > 0 and names["segments"][0]["text"]
    assert "  " in capsys.readouterr().out.splitlines()[0]
    for name in ("transcription", "careful", "named", "quick", "first", "second"):
        assert names[name].text, name
