"""Triton's interpreter without work that it repeats in every call, or does for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from whisper_flash_attention.kernels.launch import interpreted


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Have the interpreter do less in this process: kernels take half the time.

    Nothing is compiled in a process that interprets, so the replacements may stay.
    """
    if not interpreted():
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another release of Triton
    _patch_language_once(interpreter)
    _keep_types(interpreter)
    # Without `debug` the interpreter computes whether integers overflow, and drops the result.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _patch_language_once(interpreter: Any) -> None:
    """Replace the functions of `triton.language` once.

    The interpreter does so in every launch and in every call of a device function, by a search
    through the whole language.
    """
    from triton import language

    patch_all, patched = interpreter._patch_lang, list[ModuleType]()

    def patch(function: Callable[..., Any]) -> Any:
        names = function.__globals__.values()
        found = [each for each in names if each is language or each is language.core]
        if any(each not in patched for each in found):
            patch_all(function)
            patched.extend(found)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch


def _keep_types(interpreter: Any) -> None:
    """Look up the NumPy type of a Triton type in a table that is made once, not for every array."""
    from triton import language

    make = interpreter._get_np_dtype
    kept = cache(make)

    def numpy_type(kind: Any) -> Any:
        scalar = kind.scalar
        return (make if isinstance(scalar, language.pointer_type) else kept)(scalar)

    interpreter._get_np_dtype = numpy_type
