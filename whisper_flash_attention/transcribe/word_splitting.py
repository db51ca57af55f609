"""From tokens to the words that they spell, as OpenAI's `whisper/tokenizer.py` splits them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

# Languages written without blanks: every character that is whole is a word.
UNSPACED = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
# What `bytes.decode` puts where bytes are no character.
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class SplitWord:
    """A word: its text, with the blank before it, and how many tokens it takes."""

    text: str
    count: int


@dataclass(frozen=True, slots=True)
class _Token:
    """The bytes of a token; and what it spells by itself, if that is whole characters."""

    data: bytes
    word: SplitWord | None


class WordSplitter:
    """Splits text tokens of one vocabulary into words, and remembers tokens that it has met.

    Args:
        tokenizer: Transformers' Whisper tokenizer, whose tokens are GPT-2's: bytes in disguise.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._met: dict[int, _Token] = {}

    def words(self, tokens: Sequence[int], language: str) -> list[SplitWord]:
        """The words of text tokens, in a language given by its code.

        A word begins with a blank or is punctuation, which thus stands alone; in `UNSPACED`
        languages it is what the fewest tokens spell that end with a whole character. No token is
        lost: the counts add up to `len(tokens)`.
        """
        characters = self._characters(tokens)
        if language in UNSPACED:
            return characters
        words: list[SplitWord] = []
        for each in characters:
            if not words or _begins_word(each.text):
                words.append(each)
            else:
                words[-1] = SplitWord(words[-1].text + each.text, words[-1].count + each.count)
        return words

    def _characters(self, tokens: Sequence[int]) -> list[SplitWord]:
        """The shortest runs of tokens that end where a character does."""
        parts = self._look_up(tokens)
        alone = [part.word for part in parts if part.word is not None]
        if len(alone) == len(parts):
            return alone
        whole = _decode(b"".join(part.data for part in parts))
        found: list[SplitWord] = []
        run, count, offset = b"", 0, 0
        for part in parts:
            run, count = run + part.data, count + 1
            text = _decode(run)
            bad = text.find(REPLACEMENT)
            # A bad character is final only where it is one in the whole text, too.
            if bad < 0 or whole[offset + bad : offset + bad + 1] == REPLACEMENT:
                found.append(SplitWord(text, count))
                offset += len(text)
                run, count = b"", 0
        if count:
            found.append(SplitWord(_decode(run), count))
        return found

    def _look_up(self, tokens: Sequence[int]) -> list[_Token]:
        met = self._met
        new = [token for token in tokens if token not in met]
        for token, name in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            data = token_bytes(name)
            text = _decode(data)
            met[token] = _Token(data, None if REPLACEMENT in text else SplitWord(text, 1))
        return [met[token] for token in tokens]


@lru_cache(maxsize=1 << 16)
def _begins_word(text: str) -> bool:
    """Whether text begins a word, where words have blanks between them."""
    # Whether it is *within* the string: also a blank alone, or ").", is punctuation.
    return text.startswith(" ") or text.strip() in string.punctuation


def token_bytes(name: str) -> bytes:
    """The bytes of the text that a token stands for, by its name in the vocabulary."""
    disguised = _disguised_bytes()
    return bytes(disguised[character] for character in name)


def _decode(some: bytes) -> str:
    return some.decode("utf-8", errors="replace")


@cache
def _disguised_bytes() -> dict[str, int]:
    """GPT-2's byte for each character of a token's name (OpenAI's `gpt-2/src/encoder.py`).

    Bytes that print stand for themselves; the others, in order, for the characters from 256 on.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
