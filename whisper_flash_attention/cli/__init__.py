"""The command line: `main.py` is the application, and each command has a file of its own.

Flags that are options of Python, too, are generated from `options.py` by `parameters.py`. Nothing
below knows Typer.
"""

from whisper_flash_attention.cli.main import app, main

__all__ = ["app", "main"]
