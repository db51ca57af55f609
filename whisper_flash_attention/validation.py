"""Checks of option values: each returns the plain Python value, or raises `OptionError`.

Numbers of any library are accepted (`np.float32(1)`, `np.int64(5)`, `Fraction(1, 2)`) and converted
to `int` or `float`. A bool is not a number, nor is text.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

from whisper_flash_attention.errors import OptionError

# A list of options may be any iterable; an infinite one must not be read forever.
MOST_VALUES = 100_000

Value = TypeVar("Value")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """Return a value for messages: its `repr`, shortened, or its type if that fails."""
    try:
        return _short.repr(value)
    # The value may be of any class, and a number of thousands of digits has no `repr`.
    except Exception:
        return f"a {type(value).__name__}"


def number(
    name: str,
    value: Any,
    expected: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
) -> float:
    """Return a finite number within [least, most] and above `above`.

    Args:
        name: of the option.
        value: what was given for it.
        expected: what to give, for the message.
        least, most, above: the range.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if math.isfinite(found) and least <= found <= most and found > above:
            return found
    raise OptionError(f"{name} is {shown(value)}: give {expected}")


def whole_number(
    name: str, value: Any, *, least: int, most: int | None = None, expected: str | None = None
) -> int:
    """Return a whole number within [least, most]; a float is none, even if it has no fraction."""
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        found = int(value)
        if found >= least and (most is None or found <= most):
            return found
    if expected is None:
        limit = "or more" if most is None else f"to {most}"
        expected = f"a whole number, {least} {limit}"
    raise OptionError(f"{name} is {shown(value)}: give {expected}")


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool") and type(value).__module__ == "numpy":
        return bool(value)
    raise OptionError(f"{name} is {shown(value)}: give True or False")


def text(name: str, value: Any) -> str:
    """Return text that can be written in UTF-8."""
    if not isinstance(value, str):
        raise OptionError(f"{name} is {shown(value)}: give text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{name} is {shown(value)}, which holds half of a character (a lone surrogate), as "
            "text does that was not decoded as UTF-8: give whole characters"
        ) from error
    return str(value)


def one_of(name: str, value: Any, possible: Collection[str]) -> str:
    """Return one of several names."""
    if isinstance(value, str) and value in possible:
        return str(value)
    raise OptionError(f"{name} is {shown(value)}: give {alternatives([*possible])}")


def alternatives(names: Sequence[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def instance(name: str, value: Any, kind: type[Value]) -> Value:
    """Return a value of this class."""
    if isinstance(value, kind):
        return value
    raise OptionError(f"{name} is {shown(value)}: give {kind.__name__}")


def optional(check: Callable[..., Value], name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Return None for None, and what the check returns for anything else."""
    return None if value is None else check(name, value, *args, **kwargs)


def values(name: str, given: Any, expected: str) -> list[Any]:
    """Return the entries of an iterable other than text and bytes, at most `MOST_VALUES`."""
    if not isinstance(given, str | bytes | bytearray | memoryview) and isinstance(given, Iterable):
        try:
            found = list(islice(given, MOST_VALUES + 1))
        except TypeError:  # arrays without dimensions are iterables that cannot be iterated over
            found = [None] * (MOST_VALUES + 1)
        if len(found) <= MOST_VALUES:
            return found
    raise OptionError(f"{name} is {shown(given)}: give {expected}")
