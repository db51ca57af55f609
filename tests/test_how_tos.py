"""Commands and blocks of Python in README.md and the guide run, with tiny.en for every model."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.audio.encoding import read_wave, write_wave
from tests.documents import commands, page, python_blocks
from whisper_flash_attention.audio import SAMPLING_RATE, BundledClip
from whisper_flash_attention.cli import app
from whisper_flash_attention.transcribe import Transcriber, loading, transcriber

pytestmark = pytest.mark.usefixtures("windows_are_encoded_once")


@pytest.fixture(scope="module")
def loaded(tiny_en: str) -> Any:
    return loading.load(tiny_en, device="cpu")


@pytest.fixture
def place(
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundled_recordings: tuple[BundledClip, ...],
) -> Path:
    """A folder with what the how-tos name; every model is tiny.en."""
    short, other = bundled_recordings[1].path, bundled_recordings[4].path
    for name in ("talk.wav", "podcasts/2026/one.wav", "recordings/one.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(short, tmp_path / name)
    shutil.copy(other, tmp_path / "call.wav")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transcriber, "load", lambda source, **options: loaded)
    return tmp_path


def run_commands(text: str, name: str = "transcribe") -> int:
    """Run the commands of this name on local files; returns how many there are."""
    found = [shlex.split(each, comments=True) for each in commands(text)]
    found = [words for words in found if words[0] == name and "://" not in words[1]]
    for words in found:
        given = None
        if ">" in words:  # standard output
            words = words[: words.index(">")]
        if "<" in words:  # standard input
            given = Path(words[words.index("<") + 1]).read_bytes()
            words = words[: words.index("<")]
        result = CliRunner().invoke(app, words, input=given)
        assert result.exit_code == 0, f"{words}: {result.output}"
    return len(found)


def run_blocks(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in python_blocks(text):
        exec(compile(block, "page", "exec"), names)
    return names


@pytest.fixture
def kept_log_level() -> Iterator[None]:
    log = logging.getLogger("whisper_flash_attention")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def folder(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as a Transformers folder."""
    path = tmp_path_factory.mktemp("whisper")
    whole = Transcriber(*loaded)
    for part in (whole.model, whole.processor):
        part.save_pretrained(path)
    return str(path)


def test_the_readme(
    place: Path,
    folder: str,
    bundled_recordings: tuple[BundledClip, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = bundled_recordings[1].path
    for name in ("talk.mp3", "lecture.mp4"):  # the contents tell what a file is
        shutil.copy(clip, place / name)
    text = page("README.md")
    assert run_commands(text) == 5
    assert (place / "subtitles" / "talk.srt").is_file()
    run_blocks(text.replace("openai/whisper-small", folder))
    assert capsys.readouterr().out.count("He was not") >= 2


def test_the_overview(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(page("index.md"))
    assert "He was not" in capsys.readouterr().out


def test_transcription(place: Path) -> None:
    names = run_blocks(page("transcribe.md"))
    assert len({each.text for each in names["transcriptions"]}) == 1
    assert names["first"].segments[0].words and names["quick"].text


@pytest.mark.usefixtures("kept_log_level")
def test_the_drop_in_class(place: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks(page("drop-in.md").replace("openai/whisper-small", folder))
    assert "He was not" in capsys.readouterr().out
    assert names["output"].shape == (2, 100, 6, 64)


def test_the_drop_in_class_reads_long_recordings_to_their_end(
    place: Path,
    folder: str,
    bundled_recordings: tuple[BundledClip, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = [read_wave(clip.path) for clip in bundled_recordings]
    while sum(map(len, samples)) < 35 * SAMPLING_RATE:
        samples = [*samples, *samples]
    write_wave(place / "talk.wav", np.concatenate([*samples, samples[1]])[None], SAMPLING_RATE)
    block = python_blocks(page("drop-in.md"))[0]
    run_blocks(f"```python\n{block}```\n".replace("openai/whisper-small", folder))
    text = capsys.readouterr().out
    assert "He was not" in text[-200:]


def test_the_command_line(place: Path) -> None:
    assert run_commands(page("command-line.md")) == 10
    assert (place / "everything" / "one.lrc").is_file()


def test_subtitles(place: Path) -> None:
    text = page("subtitles.md")
    assert run_commands(text) == 7
    assert r"\k" in (place / "karaoke" / "one.ass").read_text("utf-8")
    run_blocks(text)
    assert (place / "talk.vtt").read_text("utf-8").startswith("WEBVTT")


def test_a_folder_of_podcasts(place: Path) -> None:
    text = page("podcasts.md")
    assert run_commands(text) == 5
    for name in ("texts/2026/one.txt", "texts/2026/one.srt", "quick/2026/one.txt"):
        assert (place / name).read_text(), name
    assert "-->" in (place / "subtitles" / "2026" / "one.vtt").read_text()
    run_blocks(text)
    assert json.loads((place / "podcasts" / "2026" / "one.json").read_text())["language"] == "en"


def test_a_whole_archive(place: Path) -> None:
    (place / "calls.csv").write_text("id,path\na,call.wav\nb,call.wav\nc,call.wav\n")
    text = page("archive.md")
    assert run_commands(text, "batch") == 6
    assert "-->" in (place / "subtitled" / "subtitles" / "one.srt").read_text()
    [shard] = (place / "texts").glob("part-*.jsonl")
    names = run_blocks(text.replace("part-000000-1000-1a2b3c4d.jsonl", shard.name))
    assert list(names["rows"]["id"]) == ["one.wav"] and len(names["rows"]["segments"][0]) > 0


def test_a_notebook(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page("notebook.md")
    assert run_commands(text) == 0
    names = run_blocks(text)
    assert names["words"][0]["end"] > 0 and names["segments"][0]["text"]
    assert "  " in capsys.readouterr().out.splitlines()[0]
    for name in ("transcription", "careful", "named", "quick", "first", "second"):
        assert names[name].text, name


def test_coming_from_another_tool(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(place / "talk.wav", place / "talk.mp3")
    text = page("coming-from.md")
    assert run_commands(text) == 2
    assert "-->" in (place / "subtitles" / "talk.srt").read_text()
    capsys.readouterr()
    run_blocks(text)
    assert capsys.readouterr().out.count("He was not") >= 4


def test_features_for_a_comparison(place: Path) -> None:
    shutil.copy(place / "talk.wav", place / "talk.flac")
    run_blocks(page("parity.md"))
    assert (place / "features.npz").is_file()
