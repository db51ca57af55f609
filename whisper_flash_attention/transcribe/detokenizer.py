"""Text of tokens by a table of bytes: as the tokenizer decodes them, at a fraction of its time.

Beside a GPU that transcribes thousands of seconds per second a tokenizer's own preparations are
what the host spends its time on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from whisper_flash_attention.transcribe.spelling import token_bytes


class Detokenizer:
    """A Whisper tokenizer, of which `decode` is quick for text tokens.

    Args:
        tokenizer: Transformers' Whisper tokenizer; ids below its end's are text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)

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
        if skip_special_tokens:
            tokens = [token for token in tokens if token < end]
        elif max(tokens, default=0) >= end:
            text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
            return text
        return b"".join(map(table.__getitem__, tokens)).decode("utf-8", errors="replace")
