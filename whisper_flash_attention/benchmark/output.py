"""The files that derive from the rows: JSON, CSV, Markdown and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from whisper_flash_attention.benchmark.plots import draw_plots
from whisper_flash_attention.benchmark.report import as_markdown
from whisper_flash_attention.benchmark.results import ResultRow, as_csv, as_json
from whisper_flash_attention.errors import MissingPackage
from whisper_flash_attention.terminal import print_line


def write_outputs(rows: Sequence[ResultRow], folder: Path, console: Console) -> list[Path]:
    """Write every derived file; nothing if there are no rows. Without matplotlib, no plots.

    Returns:
        The files that are there now, the records that they derive from first.
    """
    if not rows:
        return []
    texts = {
        "results.json": as_json(rows),
        "results.csv": as_csv(rows),
        "results.md": as_markdown(rows),
    }
    records = (folder / name for name in ("results.jsonl", "tokens.jsonl", "failures.log"))
    files = [path for path in records if path.exists()]
    for name, text in texts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        files.append(path)
    try:
        files += draw_plots(rows, folder)
    except MissingPackage as error:
        print_line(console, f"no plots: {error}")
    return files
