from __future__ import annotations

import random

import jiwer
import pytest

from whisper_flash_attention.parity.report import WordErrors, edit_distance


def test_rates_are_those_of_jiwer() -> None:
    numbers = random.Random(0)
    pairs = [
        tuple(" ".join(numbers.choices("abcd", k=numbers.randint(1, 12))) for _ in range(2))
        for _ in range(50)
    ]
    errors = WordErrors()
    for reference, found in pairs:
        errors.add(reference, found)
    references, found = zip(*pairs, strict=True)
    assert errors.rate == pytest.approx(jiwer.wer(list(references), list(found)))


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_known_distances(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


def test_no_words_have_no_rate() -> None:
    errors = WordErrors()
    errors.add("", "something")
    assert errors.rate is None
