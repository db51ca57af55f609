"""The README says what the committed results say, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from tests.conftest import REPOSITORY
from tests.scripts.loading import load_script
from whisper_flash_attention.cli import app

README = (REPOSITORY / "README.md").read_text()


def test_the_table_of_results_is_made_from_the_committed_results() -> None:
    tables = load_script("tables")
    assert tables.between_marks(README, "results") == tables.readme_table(tables.read_results())


def test_every_command_shown_has_the_options_shown() -> None:
    lines = [line.strip() for line in README.splitlines()]
    shown = [line for line in lines if line.startswith("whisper-flash ")]
    assert len(shown) >= 4
    for line in shown:
        _, command, *words = shlex.split(line, comments=True)
        text = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
        for option in (word for word in words if word.startswith("--")):
            assert option in text, f"{command} has no {option}"


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        if "://" not in target:
            assert (REPOSITORY / Path(target)).exists(), target
