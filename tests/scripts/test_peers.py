"""`benchmarks/peers.py`: recordings, ratios of pairs, and the fields of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.loading import load_script
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings

peers: Any = load_script("peers")
spoken: Any = load_script("_spoken")


def row(system: str, audio: str, seconds: list[float]) -> dict[str, Any]:
    return {"system": system, "audio": audio, "checkpoint": "tiny", "seconds": seconds}


def test_ratios_are_those_of_pairs_of_one_type_and_mode() -> None:
    rows = [
        row("ours-float32-sequential", "a", [1.0, 2.0, 3.0]),
        row("faster-whisper-float32-sequential", "a", [1.5, 2.0, 6.0]),
        row("faster-whisper-float32-sequential", "b", [9.0, 9.0, 9.0]),
        row("faster-whisper-int8-batched", "a", [9.0, 9.0, 9.0]),
    ]
    (only,) = peers.ratios(rows)
    assert only["median_of_ratios"] == pytest.approx(1.5)
    assert (only["audio"], only["dtype"], only["mode"]) == ("a", "float32", "sequential")


def test_recordings_are_joined_to_a_length(tmp_path: Path) -> None:
    clips = [spoken.Spoken(clip.path, "en", None) for clip in bundled_recordings()]
    joined = peers.join_recordings(clips, 25.0, tmp_path / "joined.flac")
    assert load_audio(joined.path).size == 25 * 16_000
    assert (joined.language, joined.transcript) == ("en", None)


def test_a_file_has_the_transcript_of_its_folders_index(tmp_path: Path) -> None:
    path = tmp_path / "one.wav"
    path.touch()
    listed = {"file": "one.wav", "language": "de", "transcript": "Eins."}
    (tmp_path / "index.json").write_text(json.dumps([listed]))
    assert spoken.find_spoken([str(path)], "en") == [spoken.Spoken(path, "de", "Eins.")]


class FakeWorker:
    """A system that needs no model."""

    load_seconds = 0.5

    def __init__(self, name: str) -> None:
        self.system = peers.SYSTEMS[name]
        self.settings = {"beam_size": 1}

    def call(self, path: Path, language: str | None) -> tuple[float, str, float]:
        return 2.0, "one too", 0.25


def test_rows_have_words_and_times(tmp_path: Path) -> None:
    clip = bundled_recordings()[0].path
    workers = [FakeWorker("ours-float32-batched")]
    (found,) = peers.measure_recording(
        spoken.Spoken(clip, "en", "One two."), workers, "package:tiny.en", 3
    )
    seconds = load_audio(clip).size / 16_000
    assert found["realtime_factor"] == pytest.approx(seconds / 2)
    assert (found["wer"], found["invented_words"], found["batch_size"]) == (0.5, None, 8)
    (silent,) = peers.measure_recording(
        spoken.Spoken(clip, "none", None), workers, "package:tiny.en", 1
    )
    assert (silent["wer"], silent["invented_words"]) == (None, 2)
