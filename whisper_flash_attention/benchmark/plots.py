"""Bars per model, Orig beside Flash: time per batch and memory. Readable in black and white."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_flash_attention.benchmark.report import FLASH, ORIG
from whisper_flash_attention.benchmark.results import ResultRow
from whisper_flash_attention.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES: dict[str, dict[str, Any]] = {
    ORIG: {"label": "Orig", "color": "white", "edgecolor": "black", "hatch": "////"},
    FLASH: {"label": "Flash", "color": "0.25", "edgecolor": "black"},
}
BAR = 0.38
FORMATS = ("png", "svg")

Value = Callable[[ResultRow], float | None]


def draw_plots(rows: Sequence[ResultRow], folder: Path) -> list[Path]:
    """One figure per setting, device and dtype that has rows of Orig or Flash.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage(
            "matplotlib is not installed: pip install 'whisper-flash-attention[plots]'"
        ) from error
    groups: dict[tuple[str, ...], list[ResultRow]] = {}
    for row in rows:
        if row.system in STYLES and row.status == "ok":
            groups.setdefault(_group(row), []).append(row)
    settings = [name for name, *_ in groups]
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "whisper-flash"}):
        for key, group in groups.items():
            name = key[0] if settings.count(key[0]) == 1 else "-".join(key)
            files += _draw(group, folder, f"plot-{name}")
    return files


def _group(row: ResultRow) -> tuple[str, ...]:
    work = f"{row.batch_size}x{row.new_tokens}"
    return (row.setting, row.device.replace(":", ""), row.dtype, work)


def _draw(rows: Sequence[ResultRow], folder: Path, name: str) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys((row.checkpoint, row.decoder_layers) for row in rows))
    figure = Figure(figsize=(max(6.4, 1.6 + 0.85 * len(models)), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(2, 1)
    first = rows[0]
    figure.suptitle(
        f"{first.setting}: batch {first.batch_size}, {first.new_tokens} new tokens, {first.dtype}\n"
        f"{first.environment['device_name']}"
    )
    _bars(time, rows, models, lambda row: row.seconds_per_batch, "seconds per batch (median)")
    on_gpu = first.device.startswith("cuda")
    if on_gpu:
        _bars(memory, rows, models, lambda row: row.vram_driver_gb, "VRAM, driver (GB)")
    else:
        _bars(memory, rows, models, lambda row: row.rss_peak_gb, "peak RSS (GB)")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    files = [folder / f"{name}.{form}" for form in FORMATS]
    for path in files:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
    return files


def _bars(
    axes: Axes,
    rows: Sequence[ResultRow],
    models: Sequence[tuple[str, int]],
    value: Value,
    label: str,
) -> None:
    """Grouped bars with their values on them, one group per model."""
    for offset, (system, style) in zip((-BAR / 2, BAR / 2), STYLES.items(), strict=True):
        heights = {
            models.index((row.checkpoint, row.decoder_layers)): value(row) or 0.0
            for row in rows
            if row.system == system
        }
        places = [place + offset for place in heights]
        drawn = axes.bar(places, list(heights.values()), BAR, **style)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=7, padding=2)
    axes.set_xticks(range(len(models)), [f"{name}\n{layers} layers" for name, layers in models])
    axes.set_ylabel(label)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
