"""The kinds of values that options take: how each is checked, parsed and described.

`options.py` declares options with these. Checks return the plain Python value, or raise
`OptionError`; parsers convert text of a command line or a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError

CHANNELS = ("mix", "each")
_CHANNEL = "mix, each, or the number of a channel, from 1"
_TRACK = "the number of a track, from 1, or a language"
# Vocabularies have about 52,000 tokens.
MOST_TOKEN = 1_000_000
# Of a day: no pause or stretch of speech is longer.
MOST_MILLISECONDS = 86_400_000


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that an option takes.

    Args:
        check: returns the plain Python value for an option's name and a given value; raises
            `OptionError` for an impossible one.
        expected: the possible values, in words.
        parse: converts text of a command line; raises `ValueError`. None for flags.
        metavar: the value in `--help`.
        is_list: whether the option may be repeated, or take several values with commas.
        choices: the possible values, where they have names.
    """

    check: Callable[[str, Any], Any]
    expected: str
    parse: Callable[[str], Any] | None = str
    metavar: str = "TEXT"
    is_list: bool = False
    choices: tuple[str, ...] = ()


def flag() -> Kind:
    return Kind(check.flag, "True or False", parse=None)


def text() -> Kind:
    return Kind(check.text, "text")


def choice(*names: str) -> Kind:
    return Kind(
        lambda name, value: check.one_of(name, value, names),
        ", ".join(names),
        metavar="NAME",
        choices=names,
    )


def whole_number(least: int, most: int | None = None) -> Kind:
    return Kind(
        lambda name, value: check.whole_number(name, value, least=least, most=most),
        f"a whole number, {least} {'or more' if most is None else f'to {most}'}",
        parse=int,
        metavar="N",
    )


def number(expected: str, metavar: str = "NUMBER", **bounds: float) -> Kind:
    return Kind(
        lambda name, value: check.number(name, value, expected, **bounds),
        expected,
        parse=float,
        metavar=metavar,
    )


def milliseconds() -> Kind:
    kind = number(f"milliseconds, 0 to {MOST_MILLISECONDS}", "MS", least=0, most=MOST_MILLISECONDS)

    def checked(name: str, value: Any) -> float:
        found: float = kind.check(name, value)
        return int(found) if found.is_integer() else found

    return replace(kind, check=checked)


def checked_channel(given: Any, name: str = "channel") -> int | str:
    """Return a `channel` as it is kept. Raises `OptionError` if it is none."""
    if isinstance(given, str) and given in CHANNELS:
        return str(given)
    return check.whole_number(name, given, least=1, expected=_CHANNEL)


def checked_track(given: Any, name: str = "audio_track") -> int | str | None:
    """Return an `audio_track` as it is kept. Raises `OptionError` if it is none."""
    if given is None:
        return None
    if isinstance(given, str) and check.text(name, given).strip():
        return given.strip()
    return check.whole_number(name, given, least=1, expected=_TRACK)


def checked_prompt(given: Any, name: str = "initial_prompt") -> str | tuple[int, ...]:
    """Return a prompt as it is kept: text, or ids of text tokens. Raises `OptionError`."""
    if isinstance(given, str):
        return check.text(name, given)
    expected = "text, or ids of tokens"
    return tuple(
        check.whole_number(name, each, least=0, most=MOST_TOKEN, expected=expected)
        for each in check.values(name, given, expected)
    )


def prompt() -> Kind:
    return Kind(lambda name, value: checked_prompt(value, name), "text; in Python token ids, too")


def channel() -> Kind:
    return Kind(lambda name, value: checked_channel(value, name), _CHANNEL, _number_or_text, "N")


def audio_track() -> Kind:
    return Kind(lambda name, value: checked_track(value, name), _TRACK, _number_or_text, "N")


def parse_channel(given: str) -> int | str:
    """Return the `channel` that a text of a command line or a table means.

    Raises `OptionError` if it is neither "mix" nor "each" nor a number from 1.
    """
    return checked_channel(_number_or_text(given))


def parse_audio_track(given: str) -> int | str | None:
    """Return the `audio_track` that a text of a command line or a table means.

    Raises `OptionError` if it is empty, or a number below 1.
    """
    return checked_track(_number_or_text(given))


def _number_or_text(given: str) -> int | str:
    plain = given.strip().lower()
    return int(plain) if re.fullmatch(r"-?[0-9]{1,9}", plain) else plain


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a parser of values with commas between; an empty text is an empty list."""
    return lambda given: tuple(map(convert, given.split(","))) if given.strip() else ()


def _list(
    convert: Callable[[str], Any],
    expected: str,
    metavar: str,
    checked: Callable[[str, Any], Any],
) -> Kind:
    """Values with commas between, in Python as text, too, as openai-whisper takes them."""
    parse = _list_of(convert)

    def checked_or_parsed(name: str, given: Any) -> Any:
        if isinstance(given, str):
            try:
                return checked(name, parse(given))
            except ValueError as error:
                if isinstance(error, OptionError):
                    raise
                raise OptionError(f"{name} is {check.shown(given)}: give {expected}") from error
        return checked(name, given)

    return Kind(checked_or_parsed, expected, parse, metavar, is_list=True)


def ascending_seconds() -> Kind:
    expected = "seconds from 0 on, each above the one before"

    def checked(name: str, given: Any) -> tuple[float, ...]:
        found = [
            check.number(name, each, expected, least=0)
            for each in check.values(name, given, expected)
        ]
        if found != sorted(set(found)):
            raise OptionError(f"{name} is {check.shown(given)}: give {expected}")
        return tuple(found)

    return _list(float, expected, "SECONDS", checked)


def token_ids() -> Kind:
    expected = "ids of tokens, -1 for the checkpoint's list"

    def checked(name: str, given: Any) -> tuple[int, ...]:
        # As openai-whisper and faster-whisper, for which None suppresses nothing.
        given = () if given is None else given
        return tuple(
            check.whole_number(name, each, least=-1, most=MOST_TOKEN, expected=expected)
            for each in check.values(name, given, expected)
        )

    return _list(int, expected, "IDS", checked)


def temperatures() -> Kind:
    expected = "numbers from 0 to 2, at least one"

    def checked(name: str, given: Any) -> float | tuple[float, ...]:
        """One number as it is, several as a tuple."""
        if not isinstance(given, Iterable):
            return check.number(name, given, expected, least=0, most=2)
        found = check.values(name, given, expected)
        if not found:
            raise OptionError(f"{name} is {check.shown(given)}: give {expected}")
        return tuple(check.number(name, each, expected, least=0, most=2) for each in found)

    return _list(float, expected, "NUMBER", checked)
