"""Flags of the command line, generated from the dataclasses of `options.py`."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.languages import AUTO, CODES_BY_NAME
from whisper_flash_attention.options import (
    DECODING_PANEL,
    GROUPS,
    PRESETS,
    SEARCH_PANEL,
    DecodeOptions,
    Option,
    changed,
    declared,
    default_text,
    flags_of,
    is_optional,
    preset,
)

Options = TypeVar("Options")
Command = Callable[..., None]

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

# Python's names of options -> their flags.
_FLAGS = {each.name: flags_of(each)[0] for group in GROUPS for each, _ in declared(group)}


def model_names(incomplete: str) -> list[str]:
    """Names of models that begin with what was typed, for completion by shells."""
    from whisper_flash_attention.weights.packaged import packaged_names
    from whisper_flash_attention.weights.sources import SHORT_NAMES

    return completion((*SHORT_NAMES, *packaged_names()))(incomplete)


def completion(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what completes a value to one of these."""
    return lambda incomplete: [each for each in choices if each.startswith(incomplete)]


# Options whose values have names, but may be others.
_COMPLETIONS = {
    "source": model_names,
    # Shells take a blank for the end of a word.
    "language": completion((AUTO, *(name for name in CODES_BY_NAME if " " not in name))),
    "device": completion(("auto", "cpu", "cuda", "mps")),
}


Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        autocompletion=completion(tuple(PRESETS)),
        help="accurate (OpenAI's sequential algorithm with 5 beams), balanced (the same without "
        "beams) or fast (chunks of speech side by side, decoded once; needs the extra vad). "
        "Options beside it take precedence.",
        rich_help_panel=DECODING_PANEL,
    ),
]


# openai-whisper's way to list temperatures.
TemperatureIncrement = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER",
        help="Try the temperatures from --temperature (left out: 0) to 1 in these steps, as "
        "openai-whisper's option; none: only the first.",
        rich_help_panel=SEARCH_PANEL,
    ),
]


# Declare an option by what its value is called in `--help`.
number, named, file, folder = (
    functools.partial(typer.Option, metavar=metavar) for metavar in ("N", "NAME", "FILE", "FOLDER")
)
# Of several benchmarks.
Commit = Annotated[
    str | None, typer.Option(metavar="ID", help="Commit to record instead of git's.")
]
RandomWeights = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Random weights instead of a checkpoint: tiny, base, small, medium, large-v3 or "
        "large-v3-turbo.",
    ),
]
RowsOutput = Annotated[
    Path | None,
    file("--output", "-o", help="JSON file for the rows; rows that it has of other cases stay."),
]


def takes(command: str, *groups: type) -> Callable[[Command], Command]:
    """Add flags for the options that `groups` declare for this command.

    The decorated function takes them as `**given`: the values of those that were given, by name.
    Its own parameters come first where they are positional, and after the flags where they are
    keyword-only.

    Raises, when the command runs:
        OptionError: a value is not of the option's kind.
    """
    options = [pair for group in groups for pair in declared(group) if command in pair[1].commands]

    def decorate(function: Command) -> Command:
        own = [
            each
            for each in inspect.signature(function, eval_str=True).parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        first = [each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        parameters = [
            *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in first),
            *(_parameter(*pair) for pair in options),
            *(each for each in own if each not in first),
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            for each, about in options:
                value = values.pop(each.name)
                if value is not None and value != []:
                    values[each.name] = _parsed(each, about, value)
            function(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def in_flags(message: str, flags: Mapping[str, str] = _FLAGS) -> str:
    """Return a message or a help text with flags in place of Python's options.

    `beam_size` becomes `--beam-size`, `vad_filter=False` becomes `--no-vad`.

    Args:
        message: a line.
        flags: by the names in Python; `--vad/--no-vad` has an opposite.
    """

    def in_place_of(found: re.Match[str]) -> str:
        name = found["set"] or found["first"] or found["name"]
        positive, _, negative = flags[name].partition("/")
        value = found[2] if found["set"] else "True"
        if value == "False":
            return negative or f"{positive} False"
        return positive if value == "True" else f"{positive} {value.strip(chr(34) + chr(39))}"

    return _pattern(tuple(flags)).sub(in_place_of, message)


@functools.cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds `name=value`, a name that begins a message, or one that can be no other word."""
    value = r"""=(True|False|"[^"]*"|'[^']*'|[\w.+-]+)"""
    every, long = "|".join(names), "|".join(name for name in names if "_" in name) or "(?!)"
    return re.compile(
        rf"(?<![\w/.\\'\"-])(?:(?P<set>{every}){value}|(?P<first>^(?:{every})(?= is ))"
        rf"|(?P<name>{long}))(?![\w/]|\.\w)"
    )


def options_of(group: type[Options], given: Mapping[str, Any]) -> Options:
    """Return an instance of a dataclass of options from the values that were given."""
    return group(**_of(group, given))


def decode_options(
    preset_name: str, given: Mapping[str, Any], temperature_increment: str | None = None
) -> DecodeOptions:
    """Return a preset's options, with the values that were given in place of the preset's.

    Words cannot be highlighted without their times.
    """
    options = _of(DecodeOptions, given)
    if temperature_increment is not None:
        first = options.get("temperature", (0.0,))
        options["temperature"] = _temperatures(first, temperature_increment)
    if given.get("highlight_words"):
        options["word_timestamps"] = True
    return changed(preset(preset_name), options)


def _temperatures(given: tuple[float, ...], increment: str) -> tuple[float, ...]:
    flag = "--temperature-increment-on-fallback"
    if len(given) != 1:
        raise OptionError(f"{flag} beside several temperatures: give --temperature one number")
    [first] = given
    if increment.strip().lower() == "none":
        return given
    try:
        step = float(increment)
    except ValueError:
        step = 0.0
    if not 0.01 <= step <= 2:
        raise OptionError(f"{flag} is {increment!r}: give a number from 0.01 to 2, or none")
    # As NumPy's `arange(first, 1 + 1e-6, step)`.
    count = max(1, math.ceil((1 + 1e-6 - first) / step))
    return tuple(round(first + place * step, 6) for place in range(count))


def _of(group: type, given: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each, _ in declared(group)}
    return {name: value for name, value in given.items() if name in names}


def _parameter(each: Field[Any], about: Option) -> inspect.Parameter:
    """A flag whose value is text, or True or False; None where it is not given."""
    settings: dict[str, Any] = {"help": in_flags(about.help), "show_default": _shown_default(each)}
    kind: Any = bool
    if about.kind.parse is not None:
        kind = list[str] if about.kind.is_list else str
        settings["metavar"] = about.kind.metavar
    if about.kind.choices:
        settings["autocompletion"] = completion(about.kind.choices)
    elif each.name in _COMPLETIONS:
        settings["autocompletion"] = _COMPLETIONS[each.name]
    if about.panel:
        settings["rich_help_panel"] = about.panel
    flag = typer.Option(*flags_of(each), **settings)
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, flag],
    )


def _shown_default(each: Field[Any]) -> str | bool:
    """The default as `--help` shows it, and where a preset has another, that of the preset."""
    text = default_text(each)
    shown = {"True": "on", "False": ""}.get(text, text)
    if each.name in DecodeOptions.__dataclass_fields__:
        others = (
            f"{value} with --preset {name}"
            for name, options in PRESETS.items()
            if (value := getattr(options, each.name)) != each.default
        )
        shown = "; ".join(filter(None, (shown, *others)))
    return shown or False


def _parsed(each: Field[Any], about: Option, value: Any) -> Any:
    if about.kind.parse is None:
        return value
    text = ",".join(value) if isinstance(value, list) else value
    if is_optional(each) and each.default is not None and text.strip().lower() == "none":
        return None
    try:
        return about.kind.parse(text)
    except ValueError as error:
        flag = flags_of(each)[0]
        raise OptionError(f"{flag} is {text!r}: give {about.kind.expected}") from error
