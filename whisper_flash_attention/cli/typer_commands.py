"""Typer's commands with plain help, one-line errors, and the spellings of other tools.

Help is plain text: option names are never cut, defaults are shown, and square brackets are not
markup. What `spelling` knows is respelled before Click parses it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.terminal import printable

EXIT_ERROR = 2
WIDTH = 100  # of help, where a terminal has room for it

# A mistake on the command line: a class of Typer's own copy of Click.
_UsageError: Any = typer.BadParameter.__base__


class Command(TyperCommand):
    """A command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Imported here: the list of commands is shown without the options.
        from whisper_flash_attention.cli.spelling import respelled

        parameters = self.get_params(ctx)
        for each in parameters:
            _take_text(each)
        options = [each for each in parameters if isinstance(each, TyperOption)]
        try:
            return super().parse_args(ctx, respelled(args, options))
        except _UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WhisperFlashError as error:
            from whisper_flash_attention.cli.parameters import in_flags

            message = in_flags(" ".join(str(error).split()), _flags(self.get_params(ctx)))
            raise WhisperFlashError(message) from error

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _format_options(self.get_params(ctx), formatter)

    def main(self, *args: Any, **extra: Any) -> Any:
        return _main(super().main, *args, **extra)


class Group(TyperGroup):
    """Commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(EXIT_ERROR)
        for each in self.get_params(ctx):
            _take_text(each)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _format_options(self.get_params(ctx), formatter)

    def main(self, *args: Any, **extra: Any) -> Any:
        return _main(super().main, *args, **extra)


def _flags(parameters: Sequence[Any]) -> dict[str, str]:
    """The flags of a command by the names of their options in Python."""
    found: dict[str, str] = {}
    for each in parameters:
        if isinstance(each, TyperOption):
            names = [name for name in each.opts if name.startswith("--")]
            flag = "/".join((names[0], *each.secondary_opts))
            python_names = (name[2:].replace("-", "_") for name in names)
            found |= dict.fromkeys((each.name, *python_names), flag)
    return found


def _take_text(parameter: Any) -> None:
    """Have text taken as it is, for which newer Typers import Pydantic and build a schema."""
    if hasattr(parameter, "get_runtime_param") and "get_runtime_param" not in vars(parameter):
        coercion = _TextCoercion(parameter.type_descriptor.annotation, parameter.get_runtime_param)
        parameter.get_runtime_param = lambda: coercion


@dataclass(frozen=True)
class _TextCoercion:
    """Turns what was given into a value of a parameter's `kind`, if need be by Typer's `usual`."""

    kind: Any
    usual: Callable[[], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        if self.kind is str and isinstance(value, str):
            return value
        if self.kind == list[str] and isinstance(value, tuple | list):
            return list(value)
        if self.kind is Path and (not os.path.lexists(value) or os.access(value, os.R_OK)):
            return Path(value)  # Typer reports what cannot be read
        return self.usual().coerce(value, param=param, ctx=ctx)


def settings() -> dict[str, Any]:
    """Return the arguments that every `typer.Typer` of the command line takes."""
    return {
        "pretty_exceptions_enable": False,
        "rich_markup_mode": None,
        "context_settings": {
            "help_option_names": ["-h", "--help"],
            "max_content_width": WIDTH,
        },
    }


def _main(run: Any, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
    """Run a command; a mistake on the command line is one line on standard error."""
    try:
        code = run(*args, standalone_mode=False, **extra)
    except _UsageError as error:
        typer.echo(f"error: {_one_line(error)}", err=True)
        code = EXIT_ERROR
    if standalone_mode:
        sys.exit(code)
    return code


def _one_line(error: Any) -> str:
    """A usage error, what may have been meant, and where the options are listed."""
    message = printable(" ".join(error.message.split()) or error.format_message())
    # Imported here: a command without a mistake needs nothing of it.
    from whisper_flash_attention.cli.spelling import INSTEAD, TOO_MANY

    command = error.ctx.info_name if "unexpected extra argument" in message else ""
    if instead := INSTEAD.get(getattr(error, "option_name", "")) or TOO_MANY.get(command):
        message += f"; {instead}"
    elif near := sorted(getattr(error, "possibilities", None) or ()):
        message += f"; did you mean {' or '.join(near)}?"
    elif error.message and type(error) is typer.BadParameter:
        message = printable(" ".join(error.format_message().split()))
    message = f"{message[:1].lower()}{message[1:].rstrip('.')}"
    place = error.ctx.command_path if error.ctx is not None else "whisper-flash"
    return f"{message} ({place} --help lists what there is)"


def _format_options(parameters: Sequence[Any], formatter: Any) -> None:
    """Write arguments and options under the headings of their panels."""
    shown = [each for each in parameters if not getattr(each, "hidden", False)]
    order = list(dict.fromkeys(["Arguments", "Options", *map(_heading, shown)]))
    shown.sort(key=lambda each: order.index(_heading(each)))
    for heading, rows in groupby(shown, _heading):
        with formatter.section(heading):
            formatter.write_dl([(_names(each), _help(each)) for each in rows], col_max=26)


def _heading(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or "Options"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar}{' ...' if parameter.nargs != 1 else ''}"
    # The short name first, as is usual.
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        names += f" / {', '.join(parameter.secondary_opts)}"
    is_flag = parameter.is_flag or parameter.count
    return names if is_flag else f"{names} {parameter.metavar or 'TEXT'}"


def _help(parameter: Any) -> str:
    help_text = parameter.help or ""
    default = parameter.default
    if isinstance(parameter.show_default, str):
        shown = parameter.show_default
    elif default is None or default in (False, [], ()) or callable(default):
        shown = ""
    elif isinstance(default, list | tuple):
        shown = ",".join(map(str, default))
    else:
        shown = "on" if default is True else f"{default}"
    return f"{help_text} [default: {shown}]" if shown else help_text
