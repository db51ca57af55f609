"""The prompt of a window: hotwords, the context before it, language and task, a prefix.

    <|startofprev|> hotwords, context <|startoftranscript|> language task <|0.00|> prefix

The context is the initial prompt and the tokens of previous windows. The model takes what follows
<|startofprev|> for the text before this window, and continues in its spelling and style; it takes
the prefix for the beginning of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.validation import shown


class PromptBuilder:
    """Builds prompts.

    Args:
        tokenizer: a Whisper tokenizer.
        options: `without_timestamps` and `carry_initial_prompt` determine the prompts.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: Any, options: DecodeOptions) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._options = options

    def tokens(self, text: str | Sequence[int] | None) -> list[int]:
        """Encode a text that follows another; an empty one has no tokens.

        Args:
            text: or ids of its tokens.

        Raises:
            OptionError: the text contains a special token.
        """
        if text is not None and not isinstance(text, str):
            if any(token >= self._vocabulary.end for token in text):
                raise OptionError(f"the ids {shown(text)} hold special tokens: give those of text")
            return list(text)
        plain = (text or "").strip()
        if not plain:
            return []
        tokens: list[int] = self._tokenizer.encode(f" {plain}", add_special_tokens=False)
        if max(tokens) >= self._vocabulary.end:
            raise OptionError(f"{plain!r} holds special tokens: give plain text")
        return tokens

    def prompt(
        self,
        options: RecordingOptions,
        language: str,
        context: Sequence[int],
        *,
        is_first: bool,
        context_start: int = 0,
    ) -> list[int]:
        """The prompt of a window.

        Args:
            options: of the recording.
            language: code of the language spoken in the window.
            context: tokens of the recording so far, those of the initial prompt first.
            is_first: whether the window is the first of its recording.
            context_start: tokens of `context` before this one are left out.

        Raises:
            OptionError: a text contains a special token, or the prefix is too long.
        """
        words = self._vocabulary
        prefix = self._prefix(options.prefix) if is_first else []
        always = [] if prefix else self.tokens(options.hotwords)
        if self._options.carry_initial_prompt:
            initial = self.tokens(options.initial_prompt)
            always += initial
            context_start = max(context_start, len(initial))
        always = always[: words.room_before]
        room = words.room_before - len(always)
        recent = list(context[context_start:])[max(0, len(context) - context_start - room) :]
        plain = self._options.without_timestamps
        prompt = words.prompt(language, options.task, always + recent, without_timestamps=plain)
        return prompt + prefix

    def _prefix(self, text: str | None) -> list[int]:
        tokens = self.tokens(text)
        most = self._vocabulary.positions // 4
        if len(tokens) > most:
            raise OptionError(f"the prefix has {len(tokens)} tokens: give at most {most}")
        if not tokens or self._options.without_timestamps:
            return tokens
        return [self._vocabulary.timestamp_begin, *tokens]
