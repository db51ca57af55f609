"""`benchmarks/word_times.py`: what it computes from words and times."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        return importlib.import_module("word_times")
    finally:
        sys.path.pop(0)


def test_times_are_compared_where_words_are_the_same(script: ModuleType) -> None:
    word = script.Word
    ours = [word("One,", 0.0, 0.5), word("two", 0.5, 1.0), word("four", 2.0, 2.5)]
    theirs = [
        *(word("one", 0.1, 0.5), word("too", 0.5, 1.0)),
        *(word("three", 1.0, 2.0), word("Four.", 2.0, 2.7)),
    ]
    row = script.compare("a.wav", "en", ours, theirs)
    assert (row.ours, row.theirs, row.same) == (3, 4, 2)
    assert (row.starts, row.ends, row.both) == (2, 1, 1)
    assert row.differences == [(-0.1, 0.0), (0.0, -0.2)]
    sums = script.totals([row, row])
    assert sums["words_same"] == 4
    assert (sums["starts_within"], sums["ends_within"], sums["both_within"]) == (1, 0.5, 0.5)
    assert script.totals([])["both_within"] is None
