"""`benchmarks/texts.py`: recordings, and what is computed from texts, words and times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.scripts.loading import load_script

texts: Any = load_script("texts")


def test_recordings_are_found_with_their_transcripts(tmp_path: Path) -> None:
    (tmp_path / "one.wav").touch()
    (tmp_path / "two.wav").touch()
    (tmp_path / "two.txt").write_text("Zwei.")
    one, two = texts.find_spoken([str(tmp_path)], "de")
    assert (one.path.name, one.language, one.transcript) == ("one.wav", "de", None)
    assert two.transcript == "Zwei."
    row = {"file": "two.wav", "language": "en", "transcript": ""}
    (tmp_path / "index.json").write_text(json.dumps([row]))
    (only,) = texts.find_spoken([str(tmp_path)], "de")
    assert only == texts.Spoken(tmp_path / "two.wav", "en", None)


def test_words_are_counted_without_punctuation_and_case() -> None:
    assert texts.normalised("It's ONE: two!").split() == ["it's", "one", "two"]
    assert texts.normalised("今日は、晴れ。", "ja").split() == list("今日は晴れ")


def test_rates_and_differences() -> None:
    sound = np.zeros(2 * 16_000, np.float32)
    sound[:16_000] = np.sin(np.arange(16_000))
    systems = {
        "stock": lambda samples: [(0.0, 1.0, " one two"), (1.0, 2.0, " you")],
        "sequential": lambda samples: [(0.0, 2.0, "one two")],
        "batched": lambda samples: [(0.0, 2.0, "one")],
    }
    rows = texts.compare_texts(texts.Spoken(Path("a.wav"), "en", "One, two."), sound, systems)
    assert [row["same"] for row in rows] == [None, False, None]
    assert texts.differing(rows) == {"a.wav, sequential": "in digital silence alone"}
    rates = texts.rates(rows)
    assert [rates[name]["all"] for name in systems] == [0.5, 0.0, 0.5]
    assert rates["stock"]["short"] == 0.5 and rates["stock"]["long"] is None
    sound[16_000:] = 0.1 * sound[:16_000]
    rows = texts.compare_texts(texts.Spoken(Path("a.wav"), "en", None), sound, systems)
    assert texts.differing(rows) == {"a.wav, sequential": "unexplained"}
    assert texts.rates(rows)["stock"] == {"recordings": 0, "all": None, "long": None, "short": None}


def test_text_in_silence_alone_is_reported_of_either_system() -> None:
    sound = np.zeros(2 * 16_000, np.float32)
    sound[:16_000] = np.sin(np.arange(16_000))
    systems = {
        "sequential": lambda samples: [(0.0, 2.0, "one two")],
        "openai-whisper": lambda samples: [(0.0, 1.0, " one two"), (1.0, 2.0, " you")],
    }
    rows = texts.compare_texts(texts.Spoken(Path("a.wav"), "en", None), sound, systems)
    assert texts.differing(rows) == {"a.wav, openai-whisper": "in digital silence alone"}
    sound[16_000:] = 0.1 * sound[:16_000]
    padded = {"openai-whisper, padded": systems["sequential"]}
    rows = texts.compare_texts(texts.Spoken(Path("a.wav"), "en", None), sound, systems | padded)
    assert texts.differing(rows) == {"a.wav, openai-whisper": "not when padded with silence"}


def test_times_are_compared_where_words_are_the_same() -> None:
    word = texts.TimedWord
    ours = [word("One,", 0.0, 0.5), word("two", 0.5, 1.0), word("four", 2.0, 2.5)]
    theirs = [
        *(word("one", 0.1, 0.5), word("too", 0.5, 1.0)),
        *(word("three", 1.0, 2.0), word("Four.", 2.0, 2.7)),
    ]
    row = texts.compare_words("a.wav", "en", ours, theirs)
    assert (row["ours"], row["theirs"], row["same"]) == (3, 4, 2)
    assert (row["starts"], row["ends"], row["both"]) == (2, 1, 1)
    assert row["differences"] == [(-0.1, 0.0), (0.0, -0.2)]
    sums = texts.totals([row, row])
    assert sums["words_same"] == 4
    assert (sums["starts_within"], sums["ends_within"], sums["both_within"]) == (1, 0.5, 0.5)
    assert texts.totals([])["both_within"] is None


def test_long_form_has_times_and_texts_of_all_systems() -> None:
    systems = {"stock": lambda samples: "one  two", "batched": lambda samples: "one two"}
    rows = texts.time_systems(systems, np.zeros(10, np.float32), 3)
    assert [len(row["seconds"]) for row in rows.values()] == [3, 3]
    assert rows["batched"]["same_as_stock"] is True
    assert rows["batched"]["text"] == "one two"


def test_recordings_are_joined_by_language_and_noises_are_finite() -> None:
    samples = np.ones(100 * 16_000, np.float32)
    spoken = [(texts.Spoken(Path(f"{i}.wav"), "en", f"word {i}"), samples) for i in range(3)]
    [(whole, joined)] = texts.joined_recordings(spoken)
    assert (whole.path.name, whole.language, whole.transcript) == (
        "joined en 1",
        "en",
        "word 0 word 1",
    )
    assert joined.size == 200 * 16_000
    noises = texts.generate_noises(2)
    assert len(noises) == 16
    for wave in noises.values():
        assert wave.dtype == np.float32 and np.abs(wave).max() <= 1.0


def test_lost_words_are_counted_against_both_texts() -> None:
    sound = np.sin(np.arange(32_000)).astype(np.float32)
    systems = {
        "sequential": lambda samples: [(0.0, 2.0, "one two three")],
        "batched": lambda samples: [(0.0, 2.0, "one three four")],
    }
    rows = texts.compare_texts(texts.Spoken(Path("joined en 1"), "en", "one two"), sound, systems)
    assert [(row["deletions"], row["insertions"]) for row in rows] == [(0, 1), (0, 1)]
    assert texts.lost_words(rows)["batched"]["found_words_joined"] == 3
    assert texts.lost_words(rows)["sequential"]["deletions_of_sequential_joined"] == 0
