"""Tables and plots of rows with fixed numbers."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmark.rows import failed_row, make_row
from whisper_flash_attention.benchmark.report import (
    SHORT,
    as_markdown,
    as_renderable,
    build_tables,
    draw_plots,
    geometric_mean,
    ratio,
    write_outputs,
)
from whisper_flash_attention.errors import MissingPackage


def lines_of(*rows: Any) -> list[dict[str, str]]:
    """The lines of the only table, by column; the two columns of a pair as "X", "X Flash"."""
    (table,) = build_tables(rows)
    names, previous = [], ""
    for name in table.header:
        names.append(f"{previous} Flash" if name == "Flash" else name)
        previous = name.removesuffix(" Orig")
    return [dict(zip(names, line, strict=True)) for line in table.lines]


def test_a_line_has_both_systems_and_their_ratio() -> None:
    line, mean = lines_of(
        make_row("orig", 0.08), make_row("flash", 0.01, vram_driver_gb=1.4, seconds_total=1.1)
    )
    assert line == {
        "Checkpoint": "tiny",
        "Decoder layers": "4",
        "Parameters": "37.8 M",
        "Compression": "1.00",
        "VRAM (GB) Orig": "2.80",
        "VRAM (GB) Flash": "1.40",
        "Loop (s) Orig": "8.0",
        "Loop (s) Flash": "1.1",
        "Batch (s) Orig": "0.08",
        "Batch (s) Flash": "0.01",
        "Orig/Flash": "8.00 x",
        "Roofline (s)": "0.0006",
        "Flash at": "6.0%",
    }
    assert mean["Checkpoint"] == "geometric mean"
    assert mean["Orig/Flash"] == "8.00 x"


def test_the_mean_of_ratios_is_geometric_and_leaves_failures_out() -> None:
    *_, mean = lines_of(
        make_row("orig", 0.08),
        make_row("flash", 0.01),
        make_row("orig", 0.08, decoder_layers=2),
        make_row("flash", 0.04, decoder_layers=2),
        make_row("orig", 0.08, checkpoint="base"),
        failed_row("flash", "out of memory", checkpoint="base"),
    )
    assert mean["Orig/Flash"] == "4.00 x"
    assert geometric_mean([8.0, 2.0, None]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None


def test_other_systems_get_columns_of_their_own() -> None:
    line, mean = lines_of(
        make_row("orig", 0.08), make_row("sdpa", 0.04), failed_row("static", "boom")
    )
    assert line["sdpa batch (s)"] == "0.04"
    assert line["static batch (s)"] == "failed"
    assert line["Batch (s) Flash"] == line["Orig/Flash"] == "-"
    assert mean["sdpa batch (s)"] == "2.00 x"
    assert mean["static batch (s)"] == "-"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"batch_size": 2, "tokens_checked": 5000},
        {"new_tokens": 24, "tokens_checked": 2400},
        {"tokens_checked": 2499},
        {"features": "librispeech: clips"},
        {"device": "cuda:1"},
        {"environment": {"device_name": "NVIDIA L4"}},
        {"decoder_layers": 2},
        {"status": "failed"},
        {"status": "skipped"},
    ],
)
def test_no_ratio_between_rows_that_did_not_do_the_same_work(change: dict[str, Any]) -> None:
    assert ratio(make_row("orig"), make_row("flash", 0.01)) == pytest.approx(8.0)
    assert ratio(make_row("orig"), make_row("flash", 0.01, **change)) is None
    assert ratio(make_row("orig", **change), make_row("flash", 0.01)) is None
    assert ratio(None, make_row("flash")) is None


def test_fewer_batches_still_compare_and_are_noted() -> None:
    few = make_row("flash", 0.01, batches=10, tokens_checked=250)
    assert ratio(make_row("orig"), few) == pytest.approx(8.0)
    assert "10 batches were run in some rows, where the setting has 100" in as_markdown([few])


def test_settings_and_dtypes_get_tables_of_their_own() -> None:
    rows = [make_row("orig"), make_row("orig", setting="large"), make_row("orig", dtype="float32")]
    titles = [table.title for table in build_tables(rows)]
    assert len(titles) == 3
    assert titles[0] == "default: batch 1, 25 new tokens, float16 on NVIDIA H100 80GB HBM3"


def test_a_failure_has_its_reason_once() -> None:
    rows = [failed_row("flash", "out of memory", decoder_layers=n) for n in (4, 2)]
    page = as_markdown(rows)
    assert page.count("out of memory") == 1
    assert "flash failed on tiny 4, tiny 2: out of memory" in page


def test_ids_that_differ_in_half_precision_are_explained() -> None:
    rows = [make_row("orig"), make_row("flash", tokens_equal_to_orig=0.9)]
    page = as_markdown(rows)
    assert "ids of flash equal to orig's in the first batch: 90.0%" in page
    assert "rounding decides" in page
    assert "WARNING" not in page


def test_ids_that_differ_in_float32_are_a_warning() -> None:
    page = as_markdown([make_row("flash", dtype="float32", tokens_equal_to_orig=0.99)])
    assert "WARNING: Token ids of flash equal to orig's in the first batch: 99.0%" in page


def test_equal_ids_need_no_excuse() -> None:
    page = as_markdown([make_row("flash", dtype="float32", tokens_equal_to_orig=1.0)])
    assert "100.0%" in page
    assert "WARNING" not in page
    assert "rounding" not in page


def test_several_commits_are_listed() -> None:
    page = as_markdown([make_row("orig"), make_row("flash", environment={"commit": "abc"})])
    assert "several commits: abc, v0.1.0" in page


def test_a_cpu_has_rss_instead_of_vram() -> None:
    line, *_ = lines_of(make_row("orig", device="cpu", vram_driver_gb=None, rss_peak_gb=1.25))
    assert line["RSS (GB) Orig"] == "1.25"


def test_markdown_has_as_many_cells_in_every_line() -> None:
    page = as_markdown([make_row("orig"), make_row("flash", 0.01), failed_row("sdpa", "a | b")])
    counts = {line.count(" | ") for line in page.splitlines() if line.startswith("| ")}
    assert len(counts) == 1


def test_the_console_shows_what_markdown_shows() -> None:
    rows = [make_row("orig"), make_row("flash", 0.01), failed_row("sdpa", "need [flash]")]
    wide = Console(width=250, no_color=True)
    with wide.capture() as shown:
        wide.print(as_renderable(rows))
    (table,) = build_tables(rows)
    for line in table.lines:
        for cell in line:
            assert SHORT.get(cell, cell) in shown.get()
    assert "need [flash]" in shown.get()


def test_a_table_of_orig_and_flash_fits_a_narrow_terminal() -> None:
    rows = [
        make_row(system, seconds, checkpoint="medium", decoder_layers=24, seconds_total=60.0)
        for system, seconds in (("orig", 12.3), ("flash", 4.56))
    ]
    narrow = Console(width=80, no_color=True)
    with narrow.capture() as shown:
        narrow.print(as_renderable(rows))
    assert "2.80 → 2.80" in shown.get()
    assert "12.3 → 4.56" in shown.get()
    assert "…" not in shown.get()


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


def test_a_system_alone_has_its_numbers_written_on_it(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_plots([make_row("orig", 0.0812)], tmp_path)
    picture = (tmp_path / "plot-default.svg").read_text()
    for words in ("Orig", "0.0812", "VRAM, driver (GB)", "4 layers"):
        assert words in picture


def test_two_systems_are_shown_by_their_ratio(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_plots(
            [
                make_row("orig", 0.0812, vram_driver_gb=2.0),
                make_row("flash", 0.0123, vram_driver_gb=1.5),
                make_row("orig", decoder_layers=2),
            ],
            tmp_path,
        )
    picture = (tmp_path / "plot-default.svg").read_text()
    for words in (
        "times as fast as stock",
        ">6.6<",
        "VRAM, driver, of stock",
        ">0.75<",
        "4 layers",
    ):
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
def test_without_matplotlib_everything_else_is_written_and_reported(tmp_path: Path) -> None:
    console = Console(width=200)
    with console.capture() as output:
        files = write_outputs([make_row("orig")], tmp_path, console)
    assert {path.name for path in files} == {*("results.json", "results.csv", "results.md")}
    assert "no plots: matplotlib is not installed: pip install" in output.get()
    assert "[plots]" in output.get()
