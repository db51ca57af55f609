"""The command `whisper-flash`: transcribe, batch, parity, doctor, benchmark.

Text goes to standard output, everything else (which path ran, progress, errors) to standard error.
Exit codes: 0 done; 1 some recordings could not be transcribed, `doctor` found something broken, or
`parity` a difference; 2 an error, reported in one line; 130 interrupted. PyTorch and Transformers
are imported by the commands, so that `--help` is quick.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whisper_flash_attention._version import __version__
from whisper_flash_attention.cli.batch import batch_command
from whisper_flash_attention.cli.doctor import doctor_command
from whisper_flash_attention.cli.parameters import EXIT_INTERRUPTED, in_flags
from whisper_flash_attention.cli.parity import parity_command
from whisper_flash_attention.cli.transcribe import transcribe_command
from whisper_flash_attention.cli.typer_commands import EXIT_ERROR, Command, Group, settings
from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.terminal import printable


class _Main(Group):
    """The commands, whose errors are one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WhisperFlashError as error:
            message = in_flags(" ".join(str(error).split()))
            typer.echo(f"error: {printable(message)}", err=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    cls=_Main,
    name="whisper-flash",
    help="Whisper with memory-efficient attention: transcribe recordings, and measure how fast.",
    **settings(),
)
app.command("transcribe", cls=Command)(transcribe_command)
app.command("batch", cls=Command)(batch_command)
app.command("parity", cls=Command)(parity_command)
app.command("doctor", cls=Command)(doctor_command)


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
    """Measure this package against stock Whisper, row by row; `throughput`: from sound to text."""
    # Its options are declared beside it, and imported only when it is run.
    from whisper_flash_attention.cli.benchmark import benchmark_command, throughput_command

    command = typer.Typer(add_completion=False, **settings())
    name, arguments = "whisper-flash benchmark", context.args
    if arguments[:1] == ["throughput"]:
        command.command(cls=Command)(throughput_command)
        name, arguments = f"{name} throughput", arguments[1:]
    else:
        command.command(cls=Command)(benchmark_command)
    command(args=arguments, prog_name=name)
