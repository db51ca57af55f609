"""What windows are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transcribe.test_segmentation import WORDS
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.prompts import Hints, Prompter

ENGLISH_ONLY = replace(WORDS, languages={}, tasks={})
HEADER = WORDS.prompt("en", "transcribe")


class Letters:
    """One token per letter; <> spells a special one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [WORDS.start if letter == "<" else ord(letter) for letter in text]


def prompter(**options: Any) -> Prompter:
    return Prompter(WORDS, Letters(), DecodeOptions(**options))


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def first(hints: Hints, said: list[int] | None = None, **options: Any) -> list[int]:
    return prompter(**options).prompt("en", "transcribe", said or [], hints, is_first=True)


def test_hotwords_stand_before_what_was_said() -> None:
    prompt = first(Hints(hotwords="ab "), letters(" c"))
    assert prompt == [WORDS.previous, *letters(" ab c"), *HEADER]
    later = prompter().prompt(
        "en", "transcribe", letters(" xc"), Hints(hotwords="ab"), is_first=False, forgotten=2
    )
    assert later == [WORDS.previous, *letters(" abc"), *HEADER]


def test_a_prefix_begins_the_first_answer_and_replaces_hotwords_there() -> None:
    hints = Hints(hotwords="ab", prefix="So")
    prompt = first(hints)
    assert prompt == [*HEADER, WORDS.timestamp_begin, *letters(" So")]
    assert prompt[WORDS.sample_begin(prompt) :] == [WORDS.timestamp_begin, *letters(" So")]
    plain = first(hints, without_timestamps=True)
    assert plain == [*HEADER, WORDS.no_timestamps, *letters(" So")]
    assert plain[WORDS.sample_begin(plain) :] == letters(" So")
    later = prompter().prompt("en", "transcribe", [], hints, is_first=False)
    assert later == [WORDS.previous, *letters(" ab"), *HEADER]


def test_the_initial_prompt_is_carried_on_where_that_is_asked() -> None:
    hints = Hints(initial_prompt="ab")
    said = letters(" ab") + [7] * 300
    carried = prompter(carry_initial_prompt=True).prompt(
        "en", "transcribe", said, hints, is_first=False
    )
    assert carried == [WORDS.previous, *letters(" ab"), *[7] * 220, *HEADER]
    forgotten = prompter(carry_initial_prompt=True).prompt(
        "en", "transcribe", said, hints, is_first=False, forgotten=len(said)
    )
    assert forgotten == [WORDS.previous, *letters(" ab"), *HEADER]
    once = prompter().prompt("en", "transcribe", said, hints, is_first=False)
    assert once == [WORDS.previous, *[7] * 223, *HEADER]


@given(
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 112),
    st.integers(0, 300),
    st.booleans(),
    st.booleans(),
)
def test_there_is_room_for_an_answer(
    hotwords: int, said: int, prefix: int, initial: int, is_first: bool, carried: bool
) -> None:
    hints = Hints("i" * initial, "h" * hotwords, "p" * max(0, prefix - 1))
    maker = prompter(carry_initial_prompt=carried)
    before = maker.tokens(hints.initial_prompt) + [7] * said
    prompt = maker.prompt("de", "translate", before, hints, is_first=is_first)
    assert len(prompt) <= WORDS.positions - 100
    begin = WORDS.sample_begin(prompt)
    assert prompt[begin - 3 : begin] == WORDS.prompt("de", "translate")
    told = prompt[1 : begin - 3]
    if told and not (carried and initial) and (not hotwords or (is_first and prefix > 1)):
        assert told == before[-223:]


def test_an_english_only_model_has_a_shorter_header() -> None:
    prompt = [*ENGLISH_ONLY.prompt("en", "transcribe", [5]), 50364, 9]
    assert ENGLISH_ONLY.sample_begin(prompt) == 3
    assert ENGLISH_ONLY.sample_begin([ENGLISH_ONLY.start]) == 1


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (Hints(prefix="p" * 120), "the prefix has 121 tokens: give at most 112"),
        (Hints(hotwords="a<"), "'a<' holds special tokens: give plain text"),
    ],
)
def test_texts_that_cannot_be_told_are_refused(hints: Hints, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        first(hints)
