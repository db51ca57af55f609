"""Words from tokens: blanks, punctuation, and characters of several tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.transcribe.tokenizer import WordSplitter
from whisper_flash_attention.weights import load_processor


@pytest.fixture(scope="module")
def tokenizer(base: str) -> Any:
    return load_processor(base).tokenizer


@pytest.fixture(scope="module")
def splitter(tokenizer: Any) -> WordSplitter:
    return WordSplitter(tokenizer)


def split(splitter: WordSplitter, tokenizer: Any, text: str, language: str) -> list[str]:
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    words = splitter.words(tokens, language)
    assert sum(word.count for word in words) == len(tokens)
    return [word.text for word in words]


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("", "en", []),
        (" Hello, world!", "en", [" Hello", ",", " world", "!"]),
        ("Elle est l'amie.", "fr", ["Elle", " est", " l", "'amie", "."]),
        (" ill-disposed - no", "en", [" ill", "-disposed", " -", " no"]),
        (" 🎉 done", "en", [" 🎉", " done"]),
        ("\ufffd odd", "en", ["\ufffd", " odd"]),
    ],
)
def test_words_begin_with_blanks_and_punctuation_stands_alone(
    splitter: WordSplitter, tokenizer: Any, text: str, language: str, words: list[str]
) -> None:
    assert split(splitter, tokenizer, text, language) == words


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("甚至出现交易几乎停滞的情况", "zh"),
        ("彼は日本語を話します。", "ja"),
        ("สวัสดีครับ", "th"),
        ("ສະບາຍດີ", "lo"),
        ("မင်္ဂလာပါ", "my"),
        ("你哋好嗎", "yue"),
    ],
)
def test_characters_are_never_cut(
    splitter: WordSplitter, tokenizer: Any, text: str, language: str
) -> None:
    words = split(splitter, tokenizer, text, language)
    assert "".join(words) == text
    assert len(words) > 3
    assert not any("\ufffd" in word for word in words)
    # The same tokens in a language with blanks: one word, but for its punctuation.
    assert len(split(splitter, tokenizer, text, "en")) <= 2


def test_bytes_that_are_no_character_are_words_of_their_own(splitter: WordSplitter) -> None:
    """The tokens and words are those of OpenAI's `tests/test_tokenizer.py`."""
    words = splitter.words([8404, 871, 287, 6, 246, 526, 3210, 20378], "ja")
    assert [word.text for word in words] == [
        *(" elle", " est", " l", "'", "\ufffd", "é", "rit", "oire")
    ]


@given(st.lists(st.integers(0, 50256), max_size=12), st.sampled_from(["en", "ja"]))
def test_no_token_is_lost(
    splitter: WordSplitter, tokenizer: Any, tokens: list[int], language: str
) -> None:
    words = splitter.words(tokens, language)
    assert sum(word.count for word in words) == len(tokens)
    if "\ufffd" not in (text := "".join(word.text for word in words)):
        assert text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
