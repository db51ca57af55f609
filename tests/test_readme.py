"""README.md and docs/benchmarks.md show what the committed results say."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.documents import PAGES, README, label
from tests.scripts.loading import load_script

MOST_LINES = 130
RESULTS = REPOSITORY / "benchmarks" / "results"
SCRIPT, CHARTS, MARKS = map(load_script, ("tables", "charts", "_pages"))


@pytest.mark.parametrize("name", SCRIPT.BLOCKS)
def test_tables_are_made_from_the_committed_results(name: str) -> None:
    page, make = SCRIPT.BLOCKS[name]
    assert MARKS.between_marks(page.read_text("utf-8"), name) == make()


@pytest.mark.parametrize("name", CHARTS.CHARTS)
def test_charts_are_made_from_the_committed_results(name: str) -> None:
    chart = CHARTS.path_of(name).read_text("utf-8")
    assert chart == CHARTS.CHARTS[name]()
    root = ET.fromstring(chart)
    kinds = {each.get("class") for each in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert kinds == {"page", "ours", "other"}
    width = float(root.get("width", 0))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        length = 0.56 * float(text.get("font-size", 0)) * len(text.text or "")
        assert float(text.get("x", 0)) + length <= width, text.text


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_results_that_pages_cite_are_in_the_table_of_sources(path: Path) -> None:
    text = path.read_text("utf-8")
    cited = set(re.findall(r"`(?:benchmarks/results/)?([\w./-]+\.json)`", text))
    cited |= {f"{name}/results.json" for name in re.findall(r"`benchmarks/results/([\w-]+)`", text)}
    for name in cited:
        file = RESULTS / name
        if file.is_file() and SCRIPT.environments(json.loads(file.read_text("utf-8"))):
            assert name in SCRIPT.SOURCES, name


def test_all_rows_of_the_predecessor_were_measured() -> None:
    rows = [line for line in SCRIPT.predecessor_tables().splitlines() if "→" in line]
    measured = [line for line in rows if not line.startswith(("| default", "| large"))]
    assert len(measured) == 26 and not any(" - " in line for line in measured)


def test_numbers_in_the_readme_are_those_of_the_results() -> None:
    text = README.read_text("utf-8")
    files = [
        json.loads((RESULTS / name).read_text("utf-8"))
        for (checkpoint, _), names in SCRIPT.PARITY.items()
        if "float32" in checkpoint
        for name in names
    ]
    modes = {
        (file["model"], file["device"], row["mode"]): row
        for file in files
        for row in file["summary"]
    }
    total = sum(row["identical"] for row in modes.values())
    assert f"{total} of {total}" in text
    assert all(row["identical"] == 51 for row in modes.values())
    rows = SCRIPT.read_results()
    for wanted in ("large", "default"):
        shares = [
            100 * row["vram_driver_gb"] / rows[name, checkpoint, layers, "orig"]["vram_driver_gb"]
            for (name, checkpoint, layers, system), row in rows.items()
            if name == wanted and system == "flash"
        ]
        assert len(shares) == 13
        assert f"{min(shares):.0f} to {max(shares):.0f} %" in text


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= MOST_LINES
