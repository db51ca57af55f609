"""The command `whisper-flash`: transcribe, batch, parity, doctor, benchmark.

Text goes to standard output, everything else (which path ran, progress, errors) to standard error.
Exit codes: 0 done; 1 some recordings could not be transcribed, `doctor` found something broken, or
`parity` a difference; 2 an error, reported in one line; 130 interrupted. PyTorch and Transformers
are imported by the commands, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from whisper_flash_attention._version import __version__
from whisper_flash_attention.cli.batch import batch_command
from whisper_flash_attention.cli.doctor import doctor_command
from whisper_flash_attention.cli.parameters import EXIT_INTERRUPTED
from whisper_flash_attention.cli.parity import parity_command
from whisper_flash_attention.cli.transcribe import transcribe_command
from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.terminal import printable

EXIT_ERROR = 2


# A mistake on the command line: a class of Typer's own copy of Click.
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _printable_mistakes() -> Iterator[None]:
    """Have messages about the command line quote what was given in its printable form."""
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _printable_mistakes():
            return super().parse_args(ctx, args)


class _Group(TyperGroup):
    """Commands whose errors are one line on standard error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _printable_mistakes():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_mistakes():
                return super().invoke(ctx)
        except WhisperFlashError as error:
            typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    cls=_Group,
    name="whisper-flash",
    help="Whisper with memory-efficient attention: transcribe recordings, and measure how fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("transcribe")(transcribe_command)
app.command("batch")(batch_command)
app.command("parity")(parity_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="whisper-flash")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"whisper-flash {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def benchmark(context: typer.Context) -> None:
    """Measure this package: against stock, row by row; `throughput`; `mlperf`."""
    # Their options are declared beside them, and imported only when they are run.
    from whisper_flash_attention.cli.benchmark import (
        benchmark_command,
        mlperf_command,
        throughput_command,
    )

    command = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )
    others = {"throughput": throughput_command, "mlperf": mlperf_command}
    name, arguments = "whisper-flash benchmark", context.args
    if arguments and arguments[0] in others:
        command.command(cls=_Command)(others[arguments[0]])
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    else:
        command.command(cls=_Command)(benchmark_command)
    command(args=arguments, prog_name=name)
