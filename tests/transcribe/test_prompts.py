"""Prompts of windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transcribe.test_segmentation import WORDS
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.prompts import PromptBuilder

ENGLISH_ONLY = replace(WORDS, languages={}, tasks={})
HEADER = WORDS.prompt("en", "transcribe")


class Letters:
    """One token per letter; <> spells a special one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [WORDS.start if letter == "<" else ord(letter) for letter in text]


def prompt_builder(**options: Any) -> PromptBuilder:
    return PromptBuilder(WORDS, Letters(), DecodeOptions(**options))


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def first(texts: RecordingOptions, context: list[int] | None = None, **options: Any) -> list[int]:
    return prompt_builder(**options).prompt(texts, "en", context or [], is_first=True)


def test_hotwords_stand_before_the_context() -> None:
    prompt = first(RecordingOptions(hotwords="ab "), letters(" c"))
    assert prompt == [WORDS.previous, *letters(" ab c"), *HEADER]
    later = prompt_builder().prompt(
        RecordingOptions(hotwords="ab"), "en", letters(" xc"), is_first=False, context_start=2
    )
    assert later == [WORDS.previous, *letters(" abc"), *HEADER]


def test_a_prefix_begins_the_first_result_and_replaces_hotwords_there() -> None:
    texts = RecordingOptions(hotwords="ab", prefix="So")
    prompt = first(texts)
    assert prompt == [*HEADER, WORDS.timestamp_begin, *letters(" So")]
    assert prompt[WORDS.sample_begin(prompt) :] == [WORDS.timestamp_begin, *letters(" So")]
    plain = first(texts, without_timestamps=True)
    assert plain == [*HEADER, WORDS.no_timestamps, *letters(" So")]
    assert plain[WORDS.sample_begin(plain) :] == letters(" So")
    later = prompt_builder().prompt(texts, "en", [], is_first=False)
    assert later == [WORDS.previous, *letters(" ab"), *HEADER]


def test_the_initial_prompt_is_carried_where_that_is_an_option() -> None:
    texts = RecordingOptions(initial_prompt="ab")
    context = letters(" ab") + [7] * 300
    carried = prompt_builder(carry_initial_prompt=True).prompt(texts, "en", context, is_first=False)
    assert carried == [WORDS.previous, *letters(" ab"), *[7] * 220, *HEADER]
    dropped = prompt_builder(carry_initial_prompt=True).prompt(
        texts, "en", context, is_first=False, context_start=len(context)
    )
    assert dropped == [WORDS.previous, *letters(" ab"), *HEADER]
    once = prompt_builder().prompt(texts, "en", context, is_first=False)
    assert once == [WORDS.previous, *[7] * 223, *HEADER]


@given(
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 112),
    st.integers(0, 300),
    st.booleans(),
    st.booleans(),
)
def test_there_is_room_for_a_result(
    hotwords: int, context: int, prefix: int, initial: int, is_first: bool, carried: bool
) -> None:
    texts = RecordingOptions(
        task="translate",
        initial_prompt="i" * initial,
        hotwords="h" * hotwords,
        prefix="p" * max(0, prefix - 1),
    )
    maker = prompt_builder(carry_initial_prompt=carried)
    before = maker.tokens(texts.initial_prompt) + [7] * context
    prompt = maker.prompt(texts, "de", before, is_first=is_first)
    assert len(prompt) <= WORDS.positions - 100
    begin = WORDS.sample_begin(prompt)
    assert prompt[begin - 3 : begin] == WORDS.prompt("de", "translate")
    kept = prompt[1 : begin - 3]
    if kept and not (carried and initial) and (not hotwords or (is_first and prefix > 1)):
        assert kept == before[-223:]


def test_an_english_only_model_has_a_shorter_header() -> None:
    prompt = [*ENGLISH_ONLY.prompt("en", "transcribe", [5]), 50364, 9]
    assert ENGLISH_ONLY.sample_begin(prompt) == 3
    assert ENGLISH_ONLY.sample_begin([ENGLISH_ONLY.start]) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (RecordingOptions(prefix="p" * 120), "the prefix has 121 tokens: give at most 112"),
        (RecordingOptions(hotwords="a<"), "'a<' holds special tokens: give plain text"),
    ],
)
def test_texts_that_cannot_be_kept_are_refused(texts: RecordingOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        first(texts)
