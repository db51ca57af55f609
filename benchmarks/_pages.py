"""Committed results, tables in Markdown, and their places in pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What windows in memory take, cited by README.md and docs/scale.md.
THROUGHPUT = "throughput-h100.json"


def read_json(name: str) -> Any:
    """A file of `benchmarks/results`."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def between_marks(text: str, name: str) -> str:
    """The text of a page between the marks of this name."""
    begin, end = _marks(name)
    return text.split(begin)[1].split(end)[0].strip("\n")


def print_or_write(tables: str, page: Path, name: str, write: bool) -> None:
    """Print the tables, or put them between the marks of this name in a page."""
    if not write:
        typer.echo(tables)
        return
    begin, end = _marks(name)
    text = page.read_text("utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n{tables}\n{end}{after}", encoding="utf-8")


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
