"""`benchmarks/invented.py`: sounds, what counts as a word, and rows that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.scripts.loading import load_script

script: Any = load_script("invented")


def test_sounds_are_many_different_and_the_same_in_every_run() -> None:
    sounds = script.make_sounds()
    again = script.make_sounds()
    assert len(sounds) >= 30
    kinds = ("silence", "white noise", "hum", "tone", "typing", "chords", "breath")
    for kind in kinds:
        assert any(kind in name for name in sounds), kind
    for name, samples in sounds.items():
        assert samples.dtype == np.float32 and np.isfinite(samples).all(), name
        assert np.abs(samples).max() <= 0.8, name
        assert samples.any() == (not name.startswith("silence,")), name
        assert np.array_equal(samples, again[name]), name
        assert samples.size / 16_000 == float(name.rsplit(", ", 1)[1].removesuffix(" s")), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" ♪♪ ... ", 0),
        ("[Music] (buzzing) *", 0),
        ("Thank you.", 2),
        ("ご視聴ありがとう", 8),
        ("Je m'appelle", 3),
    ],
)
def test_words_are_counted_in_any_script_without_descriptions_of_sounds(
    text: str, words: int
) -> None:
    assert script.count_words(text) == words


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def load(model: str, **options: Any) -> Any:
        calls.append(model)
        return lambda samples: "Thank you." if samples.any() else ""

    monkeypatch.setitem(script.SYSTEMS, "ours-sequential", ("torch", load, {}))
    monkeypatch.setitem(script.SYSTEMS, "openai-whisper", ("not-a-package", load, {}))
    tones = {"quiet, 1 s": np.zeros(16_000, np.float32), "loud, 1 s": np.ones(16_000, np.float32)}
    monkeypatch.setattr(script, "make_sounds", lambda: tones)
    path = tmp_path / "rows.json"
    flags = ["--system", "ours-sequential", "--system", "openai-whisper", "--output", str(path)]
    for models in (("a",), ("a", "b"), ("b",)):
        named = [word for model in models for word in ("--model", model)]
        result = CliRunner().invoke(script.app, [*named, *flags])
        assert result.exit_code == 0, result.output
        tones["later, 1 s"] = np.zeros(16_000, np.float32)
    assert calls == ["a", "a", "b"]
    assert "pip install not-a-package" in result.output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["checkpoint"], row["invented_words"]) for row in rows] == [("a", 2), ("b", 2)]
    assert [len(row["clips"]) for row in rows] == [3, 3]
    assert rows[0]["sounds_with_words"] == 1 and rows[0]["environment"]["torch"]
