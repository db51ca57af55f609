"""Plots are drawn for what can be compared, or their absence is explained."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmark.rows import failed_row, make_row
from whisper_flash_attention.benchmark.report import draw_plots, write_outputs
from whisper_flash_attention.errors import MissingPackage


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)


def test_every_setting_gets_a_picture(tmp_path: Path) -> None:
    rows = [make_row("orig"), make_row("flash", 0.01), make_row("orig", setting="large")]
    files = draw_plots(rows, tmp_path)
    names = {"plot-default.png", "plot-default.svg", "plot-large.png", "plot-large.svg"}
    assert {path.name for path in files} == names
    assert (tmp_path / "plot-default.png").read_bytes().startswith(b"\x89PNG")


def test_both_systems_and_their_numbers_are_written_on_it(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_plots([make_row("orig", 0.0812), make_row("flash", 0.0123)], tmp_path)
    picture = (tmp_path / "plot-default.svg").read_text()
    for words in ("Orig", "Flash", "0.0812", "0.0123", "VRAM, driver (GB)", "4 layers"):
        assert words in picture


def test_a_cpu_plot_shows_rss(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_plots([make_row("orig", device="cpu", vram_driver_gb=None)], tmp_path)
    assert "peak RSS (GB)" in (tmp_path / "plot-default.svg").read_text()


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    pictures = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw_plots([make_row("orig")], tmp_path / name)
        pictures.append((tmp_path / name / "plot-default.svg").read_bytes())
    assert pictures[0] == pictures[1]


def test_tables_that_share_a_setting_get_longer_names(tmp_path: Path) -> None:
    files = draw_plots([make_row("orig"), make_row("orig", dtype="float32")], tmp_path)
    assert "plot-default-cuda-float32-1x25.png" in {path.name for path in files}


def test_nothing_to_show_gives_no_picture(tmp_path: Path) -> None:
    assert draw_plots([failed_row("orig", "boom"), make_row("sdpa")], tmp_path) == []


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPackage, match=r"whisper-flash-attention\[plots\]"):
        draw_plots([make_row("orig")], tmp_path)


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_everything_else_is_written_and_said(tmp_path: Path) -> None:
    console = Console(width=200)
    with console.capture() as said:
        files = write_outputs([make_row("orig")], tmp_path, console)
    assert {path.name for path in files} == {*("results.json", "results.csv", "results.md")}
    assert "no plots: matplotlib is not installed: pip install" in said.get()
    assert "[plots]" in said.get()
