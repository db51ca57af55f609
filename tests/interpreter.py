"""Triton's interpreter without work that it repeats in every call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from whisper_flash_attention.kernels.launch import interpreted


@pytest.fixture(scope="session", autouse=True)
def patch_language_once() -> None:
    """Have the interpreter replace the functions of `triton.language` once in this process.

    It does so in every launch and in every call of a device function, by a search through the whole
    language, which takes a third of the time of small kernels. Nothing is compiled in a process
    that interprets, so the replacements may stay.
    """
    if not interpreted():
        return
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another release of Triton
    patch_all, patched = interpreter._patch_lang, list[ModuleType]()

    def patch(function: Callable[..., Any]) -> Any:
        names = function.__globals__.values()
        found = [each for each in names if each is language or each is language.core]
        if any(each not in patched for each in found):
            patch_all(function)
            patched.extend(found)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch
