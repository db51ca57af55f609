"""What numbers a rule takes; others are errors when it is made."""

from __future__ import annotations

import math

from whisper_flash_attention.errors import OptionError


def check_whole(name: str, value: int, least: int) -> None:
    """Raise `OptionError` unless it is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}: give a whole number, {least} or more")


def check_positive(name: str, value: float) -> None:
    """Raise `OptionError` unless it is a number above 0."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionError(f"{name} is {value!r}: give a number above 0")


def check_tokens(name: str, tokens: tuple[int, ...]) -> None:
    """Raise `OptionError` unless it is a tuple of whole numbers."""
    if not isinstance(tokens, tuple) or not all(isinstance(token, int) for token in tokens):
        raise OptionError(f"{name} is {tokens!r}: give a tuple of token ids")
