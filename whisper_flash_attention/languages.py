"""Names and codes of the languages that Whisper knows."""

from __future__ import annotations

import difflib

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError


def language_code(language: str) -> str:
    """Return Whisper's code of a language that is given by name or code, in any case.

    Raises `OptionError`, with the nearest names, if Whisper does not know it.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    wanted = check.text("language", language).strip().lower()
    codes = set(TO_LANGUAGE_CODE.values())
    if wanted in codes:
        return wanted
    if wanted in TO_LANGUAGE_CODE:
        return str(TO_LANGUAGE_CODE[wanted])
    near = difflib.get_close_matches(wanted, [*TO_LANGUAGE_CODE, *sorted(codes)], n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise OptionError(
        f"unknown language {language!r}; {hint}"
        f"Whisper knows {len(codes)}, by name ('german') or code ('de')"
    )


def language_name(code: str) -> str:
    """Return the English name of a language, in lower case, by Whisper's code."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return str(LANGUAGES[code])
