"""The command `whisper-flash doctor`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

from typing import Annotated

import typer

from whisper_flash_attention.cli.parameters import EXIT_FAILED


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what can run here, and what cannot and why.

    Device, versions, optional packages with the command that installs them, the packaged weights,
    and each attention back-end with its reasons. Exit code 1 if something needed is broken.

    \b
    Examples:
      whisper-flash doctor
      whisper-flash doctor --json
    """
    from whisper_flash_attention.doctor import examine, print_report

    report = examine()
    print_report(report, as_json=as_json)
    if not report.usable:
        raise typer.Exit(EXIT_FAILED)
