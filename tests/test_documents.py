"""Snippets in README.md and docs/ can be parsed and imported; commands, links and paths exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import REPOSITORY
from tests.documents import PAGES, commands, label, python_blocks
from whisper_flash_attention.cli import app

pages = pytest.mark.parametrize("path", PAGES, ids=label)


@pages
def test_python_can_be_parsed_and_imports_of_this_package_exist(path: Path) -> None:
    for block in python_blocks(path.read_text("utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("whisper_"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@cache
def help_of(*words: str) -> str:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--help"]).output


@pages
def test_commands_have_the_options_shown(path: Path) -> None:
    for command in commands(path.read_text("utf-8")):
        words = shlex.split(command, comments=True)
        is_part = words[0] == "benchmark" and not words[1].startswith("-")
        name = words[:2] if is_part else words[:1]
        text = help_of(*name)
        for word in words:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert re.search(rf"(?<![\w-]){word}(?![\w-])", text), f"{name} has no {word}"


@pages
def test_links_to_files_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pages
def test_links_do_not_leave_the_site(path: Path) -> None:
    """A page of the site cannot link to a file beside `docs/`."""
    docs = REPOSITORY / "docs"
    if docs not in path.parents:
        return
    for target in re.findall(r"\]\(([^)#]+)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).resolve().is_relative_to(docs), target


@pages
def test_scripts_and_results_that_are_named_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    for target in re.findall(r"`((?:benchmarks|examples|tools)/[\w./-]+)`", text):
        assert (REPOSITORY / target).exists(), target


MODULE = re.compile(
    r"`((?:audio|batch|benchmark|engine|flash_attention|hf|kernels|parity|transcribe|weights)"
    r"/\w*)(?:\.py)?`"
)


@pages
def test_modules_of_the_package_that_are_named_exist(path: Path) -> None:
    package = REPOSITORY / "whisper_flash_attention"
    for name in MODULE.findall(path.read_text("utf-8")):
        assert (package / name).is_dir() or (package / f"{name}.py").is_file(), name
