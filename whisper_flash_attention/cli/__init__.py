"""The command line: `main.py` is the application, and each command has a file of its own.

Flags that are options of Python, too, are generated from `options.py` by `parameters.py`. Nothing
below knows Typer. A command's file is imported when the command runs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from whisper_flash_attention._version import __version__

if TYPE_CHECKING:
    from whisper_flash_attention.cli.main import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line of this process."""
    if sys.argv[1:] == ["--version"]:  # Typer takes longer to import than Python to start
        print(f"whisper-flash {__version__}")
        return
    from whisper_flash_attention.cli.process import hurry, leave

    arguments = sys.argv[1:]
    hurry(arguments)
    from whisper_flash_attention.cli.main import app

    try:
        app(prog_name="whisper-flash")
    except SystemExit as end:
        leave(arguments, end.code)
        raise


def __getattr__(name: str) -> object:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from whisper_flash_attention.cli.main import app

    return app
