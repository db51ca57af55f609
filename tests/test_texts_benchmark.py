"""`benchmarks/texts.py`: what it computes from texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def texts() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        import texts
    finally:
        sys.path.pop(0)
    return texts


@pytest.fixture
def spoken(texts: ModuleType) -> ModuleType:
    return sys.modules["spoken"]


def test_recordings_are_found_with_their_transcripts(spoken: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one.wav").touch()
    (tmp_path / "two.wav").touch()
    (tmp_path / "two.txt").write_text("Zwei.")
    one, two = spoken.find_spoken([str(tmp_path)], "de")
    assert (one.path.name, one.language, one.transcript) == ("one.wav", "de", None)
    assert two.transcript == "Zwei."
    row = {"file": "two.wav", "language": "en", "transcript": ""}
    (tmp_path / "index.json").write_text(json.dumps([row]))
    (only,) = spoken.find_spoken([str(tmp_path)], "de")
    assert only == spoken.Spoken(tmp_path / "two.wav", "en", None)


def test_words_are_counted_without_punctuation_and_case(spoken: ModuleType) -> None:
    assert spoken.normalised("It's ONE: two!").split() == ["it's", "one", "two"]
    assert spoken.normalised("今日は、晴れ。", "ja").split() == list("今日は晴れ")


def test_rates_and_differences(texts: ModuleType, spoken: ModuleType) -> None:
    sound = np.zeros(2 * 16_000, np.float32)
    sound[:16_000] = np.sin(np.arange(16_000))
    systems = {
        "stock": lambda samples: [(0.0, 1.0, " one two"), (1.0, 2.0, " you")],
        "sequential": lambda samples: [(0.0, 2.0, "one two")],
        "batched": lambda samples: [(0.0, 2.0, "one")],
    }
    rows = texts.compare(spoken.Spoken(Path("a.wav"), "en", "One, two."), sound, systems)
    assert [row.same for row in rows] == [None, False, None]
    assert texts.differing(rows) == {"a.wav, sequential": "in digital silence alone"}
    rates = texts.rates(rows)
    assert [rates[name]["all"] for name in systems] == [0.5, 0.0, 0.5]
    assert rates["stock"]["short"] == 0.5 and rates["stock"]["long"] is None
    sound[16_000:] = 0.1 * sound[:16_000]
    rows = texts.compare(spoken.Spoken(Path("a.wav"), "en", None), sound, systems)
    assert texts.differing(rows) == {"a.wav, sequential": "unexplained"}
    assert texts.rates(rows)["stock"] == {"recordings": 0, "all": None, "long": None, "short": None}


def test_what_is_heard_in_silence_alone_is_told_of_either_system(
    texts: ModuleType, spoken: ModuleType
) -> None:
    sound = np.zeros(2 * 16_000, np.float32)
    sound[:16_000] = np.sin(np.arange(16_000))
    systems = {
        "sequential": lambda samples: [(0.0, 2.0, "one two")],
        "openai-whisper": lambda samples: [(0.0, 1.0, " one two"), (1.0, 2.0, " you")],
    }
    rows = texts.compare(spoken.Spoken(Path("a.wav"), "en", None), sound, systems)
    assert texts.differing(rows) == {"a.wav, openai-whisper": "in digital silence alone"}
    sound[16_000:] = 0.1 * sound[:16_000]
    padded = {"openai-whisper, padded": systems["sequential"]}
    rows = texts.compare(spoken.Spoken(Path("a.wav"), "en", None), sound, systems | padded)
    assert texts.differing(rows) == {"a.wav, openai-whisper": "not when padded with silence"}
