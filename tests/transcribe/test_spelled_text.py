"""A text as the tokens of its characters, and the words of that text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.spelled_text import MOST_BLANK, SpelledText
from whisper_flash_attention.transcribe.tokenizer import SplitWord


def spell(character: str) -> tuple[int, ...]:
    """Bytes."""
    return tuple(character.encode())


def split(*texts: str) -> list[SplitWord]:
    return [SplitWord(text, 1) for text in texts]


def spelled(*texts: str) -> SpelledText:
    found = SpelledText.of(split(*texts), spell)
    assert found is not None
    return found


def test_blanks_and_punctuation_are_silent() -> None:
    found = spelled("\u00ab", " Ja", ",", " \u00e9", "\u3002", " ")
    assert bytes(found.tokens).decode() == "\u00ab Ja, \u00e9\u3002"
    silent = [(2, True), (1, True), (2, False), (1, True), (1, True), (2, False), (3, True)]
    assert found.is_silent == tuple(each for count, each in silent for _ in range(count))
    assert found.words == ((0, 2), (2, 5), (5, 6), (6, 9), (9, 12), (12, 12))
    assert found.has_blank == (False, True, False, True, False, False)


def test_a_blank_that_is_a_word_belongs_to_the_next_one() -> None:
    """As between phrases in scripts without blanks between words."""
    found = spelled("\u0e01", " ", "\u0e02", "\u0e33")
    assert bytes(found.tokens).decode() == "\u0e01 \u0e02\u0e33"
    assert found.words == ((0, 3), (3, 3), (3, 7), (7, 10))
    assert found.has_blank == (False, False, True, False)
    assert found.is_silent == (*[False] * 3, True, *[False] * 6)


def test_what_cannot_be_spelled_is_nothing() -> None:
    assert SpelledText.of(split(" one"), lambda character: None) is None
    assert SpelledText.of(split(" ", ""), spell) is None
    assert SpelledText.of([], spell) is None


def test_a_word_takes_a_moment_of_its_blank() -> None:
    found = spelled(" a", " b", "!", " ")
    # The blanks begin at 0 and 0.4 s, the letters at 0.04 and 1 s, the end is at 1.4 s.
    assert found.has_blank == (True, True, False, False)
    starts = np.array([0, 2, 20, 50, 60, 70])
    assert found.times(starts) == [
        (0.0, 0.4),
        (pytest.approx(1 - MOST_BLANK), 1.2),
        (1.2, 1.4),
        (1.4, 1.4),
    ]


@given(st.lists(st.text("ab ,\u00e9\u0e01", max_size=9), max_size=12), st.integers(1, 12))
def test_parts_are_the_text_and_have_room(texts: list[str], room: int) -> None:
    found = SpelledText.of(split(*texts), spell)
    if found is None:
        assert not "".join(texts).strip(" ")
        return
    parts = found.parts(room)
    assert sum(parts, ()) == found.tokens
    assert all(0 < len(part) <= room for part in parts)
    ends = {first: after for first, after in found.words if first < after}
    if all(after - first <= room for first, after in ends.items()):
        cuts = [0, *np.cumsum([len(part) for part in parts]).tolist()]
        # A part ends before a word that does not fit any more.
        assert all(ends[cut] - begin > room for begin, cut in pairwise(cuts[:-1]))


@given(st.lists(st.text("ab ,", max_size=5), min_size=1, max_size=9), st.data())
def test_words_are_in_order(texts: list[str], data: st.DataObject) -> None:
    found = SpelledText.of(split(*texts), spell)
    if found is None:
        return
    size = len(found.tokens) + 1
    starts = sorted(data.draw(st.lists(st.integers(0, 1499), min_size=size, max_size=size)))
    times = [time for pair in found.times(np.array(starts)) for time in pair]
    assert times == sorted(times) and len(times) == 2 * len(texts)


@pytest.mark.parametrize(
    "text", [" It's 10%.", " na\u00efve \u2014 \u65e5\u672c\u8a9e", "\U0001f600"]
)
def test_a_vocabulary_spells_all_characters(transcriber: Transcriber, text: str) -> None:
    splitter = transcriber._splitter
    ids = [token for character in text for token in splitter.spell(character) or ()]
    assert transcriber.processor.tokenizer.decode(ids) == text
    assert all(splitter.spell(letter) is not None for letter in "az09.,'?! ")
    assert [len(splitter.spell(letter) or ()) for letter in " aZ"] == [1, 1, 1]


def test_bytes_that_are_no_character_are_spelled(transcriber: Transcriber) -> None:
    assert transcriber._splitter.spell("\ufffd") is not None
    assert transcriber._splitter.spell("\ud800") == transcriber._splitter.spell("?")
