"""Text by a table of bytes, against the tokenizer's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.transcribe.tokenizer import Detokenizer
from whisper_flash_attention.weights import load_processor

TOKENIZERS: dict[str, tuple[Any, Detokenizer]] = {}


@pytest.fixture(scope="module", autouse=True)
def tokenizers(base: str, tiny_en: str) -> None:
    for source in (base, tiny_en):
        tokenizer = load_processor(source).tokenizer
        TOKENIZERS[source] = tokenizer, Detokenizer(tokenizer)
        TOKENIZERS[source][1].decode([1])


@pytest.mark.parametrize("source", ["package:base", "package:tiny.en"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_is_that_of_the_tokenizer(source: str, data: st.DataObject) -> None:
    tokenizer, quick = TOKENIZERS[source]
    # Parts of characters, text, and special tokens and timestamps.
    ids = st.integers(0, 300) | st.integers(0, len(tokenizer) - 1) | st.integers(50256, 50400)
    tokens = data.draw(st.lists(ids, max_size=30))
    text = [token for token in tokens if token < tokenizer.eos_token_id]
    plain = {"clean_up_tokenization_spaces": False}
    assert quick.decode(text) == tokenizer.decode(text, **plain)
    assert quick.decode(tokens) == tokenizer.decode(tokens, **plain)
    skipped = tokenizer.decode(tokens, skip_special_tokens=True, **plain)
    assert quick.decode(tuple(tokens), skip_special_tokens=True) == skipped


def test_a_character_is_not_put_together_across_a_timestamp() -> None:
    tokenizer, quick = TOKENIZERS["package:base"]
    halves = [126, 50364, 94]
    found = quick.decode(halves, skip_special_tokens=True)
    assert found == tokenizer.decode(halves, skip_special_tokens=True) == "\ufffd\ufffd"
    assert quick.decode([50364, 126, 94, 50365], skip_special_tokens=True) == "¡"


@pytest.mark.parametrize("source", ["package:base", "package:tiny.en"])
@pytest.mark.parametrize("ids", [(0,), (0, 50258, 1), (50364, 0), ()])
def test_the_text_of_a_prompt_is_left_out(source: str, ids: tuple[int, ...]) -> None:
    tokenizer, quick = TOKENIZERS[source]
    tokens = [tokenizer.convert_tokens_to_ids("<|startofprev|>"), *ids]
    wanted = tokenizer.decode(tokens, skip_special_tokens=True)
    assert quick.decode(tokens, skip_special_tokens=True) == wanted


def test_prompts_are_encoded_as_ever() -> None:
    tokenizer, quick = TOKENIZERS["package:base"]
    wanted = tokenizer.encode(" Names.", add_special_tokens=False)
    assert quick.encode(" Names.", add_special_tokens=False) == wanted
