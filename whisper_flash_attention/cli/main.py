"""The command `whisper-flash`: transcribe, batch, serve, parity, doctor, benchmark.

Text goes to standard output, everything else (which path ran, progress, errors) to standard error.
Exit codes: 0 done; 1 some recordings could not be transcribed, `doctor` found something broken, or
`parity` a difference; 2 an error, reported in one line; 130 interrupted. A command's module is
imported when the command is given, so that `--help` is quick.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer

from whisper_flash_attention._version import __version__
from whisper_flash_attention.cli.typer_commands import EXIT_ERROR, Command, Group, settings
from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.terminal import printable


@dataclass(frozen=True)
class _Home:
    """Where a command is: a module of this room, and the function there."""

    module: str
    function: str

    def load(self) -> Command:
        """Import the command."""
        function = getattr(
            import_module(f"whisper_flash_attention.cli.{self.module}"), self.function
        )
        alone = typer.Typer(add_completion=False, **settings())
        alone.command(cls=Command)(function)
        command: Any = typer.main.get_command(alone)
        found: Command = command
        return found


class LazyCommand(Command):
    """A command that is imported when it is given arguments.

    Args:
        summary: the first line of its help.
        home, parts: the command, and those that stand for it if their name follows.
    """

    def __init__(self, name: str, summary: str, home: _Home, **parts: _Home) -> None:
        super().__init__(name, help=summary, rich_markup_mode=None)
        self.home = home
        self._parts = parts

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """The context of the command itself, or of one of its parts."""
        home = self._parts.get(args[0]) if args else None
        if home is None:
            home = self.home
        else:
            info_name, args = f"{info_name} {args[0]}", args[1:]
        return home.load().make_context(info_name, args, parent, **extra)


COMMANDS = (
    LazyCommand(
        "transcribe",
        "Turn recordings into text or subtitles.",
        _Home("transcribe", "transcribe_command"),
    ),
    LazyCommand(
        "batch",
        "Transcribe a whole archive, on this machine or on many.",
        _Home("batch", "batch_command"),
    ),
    LazyCommand(
        "serve",
        "Serve OpenAI's audio API, on one running batch.",
        _Home("serve", "serve_command"),
    ),
    LazyCommand(
        "parity",
        "Compare our tokens with those of stock Transformers.",
        _Home("parity", "parity_command"),
    ),
    LazyCommand(
        "doctor",
        "Say what can run here, and what cannot and why.",
        _Home("doctor", "doctor_command"),
    ),
    LazyCommand(
        "benchmark",
        "Measure this package against stock Whisper, row by row.",
        _Home("benchmark", "benchmark_command"),
        throughput=_Home("throughput", "throughput_command"),
        mlperf=_Home("mlperf", "mlperf_command"),
        serve=_Home("serving", "serve_benchmark_command"),
        peers=_Home("peers", "peers_command"),
    ),
)


class _Main(Group):
    """The commands, whose errors are one line on standard error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in COMMANDS:
            self.add_command(command)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and os.path.exists(args[0]):
            ctx.fail(
                f"no such command {args[0]!r}; to transcribe it: whisper-flash transcribe {args[0]}"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WhisperFlashError as error:
            typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            from whisper_flash_attention.cli.parameters import EXIT_INTERRUPTED

            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    cls=_Main,
    name="whisper-flash",
    help="Fast OpenAI Whisper on PyTorch: transcribe, serve, compare and measure.",
    **settings(),
)


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
