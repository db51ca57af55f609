"""What a window is told before it results: words to listen for, what was said before, a prefix.

    <|startofprev|> hotwords, initial prompt, what was said before <|startoftranscript|> language
    task <|0.00|> prefix

The model takes what follows <|startofprev|> for the text before this window, and goes on in its
spelling and style; it takes the prefix for the beginning of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.tokenizer import Vocabulary


@dataclass(frozen=True, slots=True)
class PromptFields:
    """What the windows of one recording are told.

    Args:
        initial_prompt: what the first one is told was said before.
        hotwords: all of them are told these, before what was said before.
        prefix: the first one's result begins with it.
    """

    initial_prompt: str | None = None
    hotwords: str | None = None
    prefix: str | None = None


class PromptBuilder:
    """Makes prompts.

    Args:
        tokenizer: a Whisper tokenizer.
        options: whether timestamps are said and the initial prompt is carried on.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: Any, options: DecodeOptions) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._options = options

    def tokens(self, text: str | None) -> list[int]:
        """The tokens of a text that follows another, none if there is none.

        Raises:
            OptionError: the text spells a special token.
        """
        plain = (text or "").strip()
        if not plain:
            return []
        tokens: list[int] = self._tokenizer.encode(f" {plain}", add_special_tokens=False)
        if max(tokens) >= self._vocabulary.end:
            raise OptionError(f"{plain!r} holds special tokens: give plain text")
        return tokens

    def prompt(
        self,
        language: str,
        task: str,
        said: Sequence[int],
        prompt_fields: PromptFields,
        *,
        is_first: bool,
        forgotten: int = 0,
    ) -> list[int]:
        """The prompt of a window.

        Args:
            said: tokens so far, those of the initial prompt first.
            is_first: of its recording.
            forgotten: so many of `said` are not told.

        Raises:
            OptionError: a text spells a special token, or the prefix is too long.
        """
        words = self._vocabulary
        prefix = self._prefix(prompt_fields.prefix) if is_first else []
        always = [] if prefix else self.tokens(prompt_fields.hotwords)
        if self._options.carry_initial_prompt:
            initial = self.tokens(prompt_fields.initial_prompt)
            always += initial
            forgotten = max(forgotten, len(initial))
        always = always[: words.room_before]
        room = words.room_before - len(always)
        before = always + list(said[forgotten:])[max(0, len(said) - forgotten - room) :]
        plain = self._options.without_timestamps
        prompt = words.prompt(language, task, before, without_timestamps=plain)
        return prompt + prefix

    def _prefix(self, text: str | None) -> list[int]:
        tokens = self.tokens(text)
        most = self._vocabulary.positions // 4
        if len(tokens) > most:
            raise OptionError(f"the prefix has {len(tokens)} tokens: give at most {most}")
        if not tokens or self._options.without_timestamps:
            return tokens
        return [self._vocabulary.timestamp_begin, *tokens]
