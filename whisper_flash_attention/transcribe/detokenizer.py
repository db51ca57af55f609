"""Text of tokens by a table of bytes: as the tokenizer decodes them, at a fraction of its time.

Beside a GPU that transcribes thousands of seconds per second a tokenizer's own preparations are
what the host spends its time on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from whisper_flash_attention.transcribe.word_splitting import token_bytes


class Detokenizer:
    """A Whisper tokenizer, of which `decode` is quick for text tokens.

    Args:
        tokenizer: Transformers' Whisper tokenizer; ids below its end's are text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._prompt = int(tokenizer.convert_tokens_to_ids("<|startofprev|>"))

    @cached_property
    def _bytes(self) -> list[bytes]:
        return [
            token_bytes(name) for name in self._tokenizer.convert_ids_to_tokens(range(self._end))
        ]

    def encode(self, text: str, **options: Any) -> list[int]:
        """As the tokenizer's own."""
        tokens: list[int] = self._tokenizer.encode(text, **options)
        return tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; with `skip_special_tokens` without special ones and timestamps.

        As the tokenizer's own, which is asked where other than text is to be spelled.
        """
        end, table = self._end, self._bytes
        plain = self._bare(tokens) if skip_special_tokens else tokens
        if max(plain, default=0) >= end:
            text: str = self._tokenizer.decode(
                list(tokens),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
            return text
        return b"".join(map(table.__getitem__, plain)).decode("utf-8", errors="replace")

    def _bare(self, tokens: Sequence[int]) -> Sequence[int]:
        """Without what is no text at the ends, where timestamps are; not without what is a prompt.

        The tokenizer drops the text of a prompt, too.
        """
        first, last = 0, len(tokens)
        if last and tokens[0] == self._prompt:
            return tokens
        while first < last and tokens[first] >= self._end:
            first += 1
        while first < last and tokens[last - 1] >= self._end:
            last -= 1
        return tokens[first:last]
