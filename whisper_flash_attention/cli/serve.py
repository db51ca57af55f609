"""The command `whisper-flash serve`: OpenAI's audio API over HTTP.

Exit codes: 0 stopped by SIGTERM, after the requests under way; 2 misuse, or the model cannot be
loaded; 130 interrupted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from whisper_flash_attention.cli.parameters import EXIT_INTERRUPTED, model_names, options_of, takes
from whisper_flash_attention.errors import MissingPackage
from whisper_flash_attention.options import ModelOptions, ServeOptions
from whisper_flash_attention.terminal import print_line


@takes("serve", ModelOptions, ServeOptions)
def serve_command(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            *("--model", "-m"),
            metavar="[NAME=]SOURCE",
            autocompletion=model_names,
            help="Checkpoint, as of transcribe, and the name by which clients ask for it. "
            "Repeatable: the first is loaded at once, the others with their first request. Left "
            "out: small.",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Serve OpenAI's audio API, on one running batch.

    Requests of a model join its batch as they come. The page at the root tries it in a
    browser. SIGTERM ends the server after the requests under way.

    \b
    Examples:
      whisper-flash serve --model turbo
      whisper-flash serve --model whisper-1=small --model tiny.en --idle-unload 600
      whisper-flash serve --host 0.0.0.0 --api-key secret
      curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@talk.mp3

    Exit codes: 0 stopped by SIGTERM; 2 misuse, or no model; 130 interrupted.
    """
    try:
        from whisper_flash_attention.serve.process import run_server
        from whisper_flash_attention.serve.scheduler import Scheduler
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"serve needs the package {error.name}, which is not installed: "
            "pip install 'whisper-flash-attention[serve]'"
        ) from error

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    options = options_of(ServeOptions, given)
    shared = options_of(ModelOptions, given)
    sources = dict(map(_named, model or [shared.source]))
    schedulers = {
        name: Scheduler(
            name,
            replace(shared, source=source),
            slots=options.slots,
            idle_unload=options.idle_unload,
        )
        for name, source in sources.items()
    }
    try:
        run_server(options, schedulers, lambda line: print_line(console, line))
    except KeyboardInterrupt as error:
        print_line(console, "interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _named(given: str) -> tuple[str, str]:
    """The name of a model and its source; a path with "=" in a folder's name has no name."""
    name, mark, source = given.partition("=")
    return (name, source) if mark and name and "/" not in name else (given, given)
