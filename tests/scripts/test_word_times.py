"""`benchmarks/word_times.py`: alignments, and the errors of boundaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.loading import load_script

script: Any = load_script("word_times")
Word = script.Word


def test_alignments_are_read_in_seconds_and_in_samples(tmp_path: Path) -> None:
    recording = tmp_path / "a.wav"
    assert script.read_alignment(recording) is None
    expected = [Word("she", 0.5, 1.25), Word("had", 1.25, 2.0)]
    recording.with_suffix(".wrd").write_text("8000 20000 she\n20000 32000 had\n\n")
    assert script.read_alignment(recording) == expected
    recording.with_suffix(".wrd").write_text("0.5 1.25  she\n1.25 2  had\n")
    assert script.read_alignment(recording) == expected
    words = [
        {"word": "She", "case": "success", "start": 0.5, "end": 1.25},
        {"word": "had", "case": "not-found-in-audio"},
    ]
    other = tmp_path / "b.mp3"
    other.with_suffix(".json").write_text(json.dumps({"words": words}))
    assert script.read_alignment(other) == [Word("She", 0.5, 1.25)]


def test_errors_are_those_of_words_that_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = [Word("she", 0.5, 1.0), Word("had", 1.0, 1.5), Word("your", 1.5, 2.0)]
    found = [Word(" She", 0.4, 1.0), Word(" has", 1.0, 1.5), Word(" your,", 1.6, 2.2)]
    pairs = script.boundary_errors(reference, found)
    assert [pytest.approx(pair) for pair in pairs] == [(-0.1, 0.0), (0.1, 0.2)]
    monkeypatch.setitem(script.SYSTEMS, "ours", ("ours", lambda model: lambda path: found))
    row = script.measure("ours", "tiny", [(Path("a.wav"), reference)])
    assert row["found"] == pytest.approx(2 / 3)
    for name in ("mean_error_ms", "median_error_ms", "mean_start_error_ms", "mean_end_error_ms"):
        assert row[name] == pytest.approx(100), name
    assert row["within"]["0.05"] == 0.25
