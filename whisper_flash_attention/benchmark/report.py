"""Tables and plots of rows, and the files that derive from them: JSON, CSV, Markdown, PNG and SVG.

A ratio appears only where two rows did the same work on the same machine and both ended well. Plots
show Orig beside Flash per model, time per batch and memory, readable in black and white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from whisper_flash_attention.benchmark.results import ResultRow, as_csv, as_json
from whisper_flash_attention.errors import MissingPackage
from whisper_flash_attention.terminal import print_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ORIG, FLASH = "orig", "flash"
NONE = "-"

GEOMETRIC_MEAN = "geometric mean"

# Shorter names for terminals of 80 columns.
SHORT = {
    "Checkpoint": "Model",
    "Decoder layers": "",
    "Parameters": "Param.",
    "Compression": "Com-\npr.",
    "VRAM (GB) Orig": "VRAM (GB)\nOrig",
    "RSS (GB) Orig": "RSS (GB)\nOrig",
    "Loop (s) Orig": "Loop (s)\nOrig",
    "Batch (s) Orig": "Batch (s)\nOrig",
    "Orig/Flash": "Orig/\nFlash",
    "Roofline (s)": "Roof\n(s)",
    "Flash at": "Flash\nat",
    GEOMETRIC_MEAN: "geo. mean",
}

Line = dict[str, ResultRow]  # the rows of one model by system


@dataclass(frozen=True)
class Table:
    """One table: everything that was measured at one setting on one device in one dtype."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def same_work(a: ResultRow | None, b: ResultRow | None) -> bool:
    """Whether two rows are comparable: ok, same machine, same work, tokens counted."""
    if a is None or b is None or a.status != "ok" or b.status != "ok":
        return False

    def work(row: ResultRow) -> tuple[object, ...]:
        machine = (row.device, row.environment["device_name"], row.dtype)
        model = (row.checkpoint, row.decoder_layers)
        counted = row.tokens_checked == row.batches * row.batch_size * row.new_tokens
        return (machine, model, row.batch_size, row.new_tokens, row.features, counted)

    return work(a) == work(b) and work(a)[-1] is True


def ratio(base: ResultRow | None, other: ResultRow | None) -> float | None:
    """The speed-up of `other` over `base`, by medians; None if they are not comparable."""
    if base is None or other is None or not same_work(base, other):
        return None
    assert base.seconds_per_batch and other.seconds_per_batch, "rows that are ok have times"
    return base.seconds_per_batch / other.seconds_per_batch


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the values that are not None; None if there are none."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def build_tables(rows: Sequence[ResultRow]) -> list[Table]:
    """A table for every setting, device and dtype among the rows, in their order."""
    groups: dict[tuple[object, ...], list[ResultRow]] = {}
    for row in rows:
        machine = (row.device, row.environment["device_name"], row.dtype)
        groups.setdefault((row.setting, row.batch_size, row.new_tokens, machine), []).append(row)
    return [_table(group) for group in groups.values()]


def as_markdown(rows: Sequence[ResultRow]) -> str:
    """All tables as one Markdown page, with the machine and how to read them."""
    parts = ["# Benchmark", describe_machine(rows)]
    for table in build_tables(rows):
        grid = [table.header, tuple("---" for _ in table.header), *table.lines]
        parts.append(f"## {table.title}")
        parts.append("\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in grid))
        parts.append("\n".join(f"- {note}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def as_renderable(rows: Sequence[ResultRow]) -> RenderableType:
    """All tables for a rich console."""
    parts: list[RenderableType] = [Text(describe_machine(rows)), Text()]
    for table in build_tables(rows):
        grid = RichTable(
            title=table.title,
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for column, name in enumerate(_compact([SHORT.get(name, name) for name in table.header])):
            side: JustifyMethod = "right" if column else "left"
            grid.add_column(Text(name), justify=side, no_wrap=True)
        for line in table.lines:
            grid.add_row(*map(Text, _compact([SHORT.get(cell, cell) for cell in line])))
        parts += [grid, *(Text(f"- {note}") for note in table.notes), Text()]
    return Group(*parts)


def describe_machine(rows: Sequence[ResultRow]) -> str:
    """The machine and the software of the newest row, in a sentence."""
    at = max(rows, key=lambda row: row.environment["date"]).environment
    gpu = f", driver {at['driver']}, CUDA {at['cuda']}" if at["driver"] else ""
    triton = f", Triton {at['triton']}" if at["triton"] else ""
    return (
        f"{at['device_name']}{gpu}; PyTorch {at['torch']}{triton}, Transformers "
        f"{at['transformers']}, Python {at['python']}, {at['threads']} threads of {at['cpu']}; "
        f"commit {at['commit']}, {at['date']}."
    )


def _compact(cells: Sequence[str]) -> tuple[str, ...]:
    """A line for a terminal: the model in one cell, and Orig and Flash in one, "2.80 → 1.40"."""
    checkpoint, layers, parameters, compression, *rest = cells
    pairs = [
        f"{orig} → {flash}" if orig else ""
        for orig, flash in zip(rest[:6:2], rest[1:6:2], strict=True)
    ]
    return (f"{checkpoint} {layers}".rstrip(), parameters, compression, *pairs, *rest[6:])


def _table(rows: Sequence[ResultRow]) -> Table:
    lines: dict[tuple[str, int], Line] = {}
    for row in rows:
        lines.setdefault((row.checkpoint, row.decoder_layers), {})[row.system] = row
    systems = dict.fromkeys(row.system for row in rows)
    others = [name for name in systems if name not in (ORIG, FLASH)]
    first = rows[0]
    memory = "VRAM" if first.device.startswith("cuda") else "RSS"
    header = (
        *("Checkpoint", "Decoder layers", "Parameters", "Compression"),
        *(f"{memory} (GB) Orig", "Flash", "Loop (s) Orig", "Flash"),
        *("Batch (s) Orig", "Flash", "Orig/Flash", "Roofline (s)", "Flash at"),
        *(f"{name} batch (s)" for name in others),
    )
    body = [_line(line, others) for line in lines.values()]
    means = _means(list(lines.values()), others)
    if means:
        body.append(means)
    title = (
        f"{first.setting}: batch {first.batch_size}, {first.new_tokens} new tokens, {first.dtype} "
        f"on {first.environment['device_name']}"
    )
    return Table(title, header, tuple(body), tuple(_notes(rows)))


def _line(line: Line, others: Sequence[str]) -> tuple[str, ...]:
    orig, flash = line.get(ORIG), line.get(FLASH)
    first = next(iter(line.values()))
    share = None
    if flash is not None and flash.seconds_per_batch:
        share = flash.roofline_seconds_per_batch / flash.seconds_per_batch
    return (
        *(first.checkpoint, str(first.decoder_layers), f"{first.parameters / 1e6:.1f} M"),
        f"{first.compression:.2f}",
        *(_memory(orig), _memory(flash)),
        *(_loop(orig), _loop(flash)),
        *(_batch(orig), _batch(flash)),
        _times(ratio(orig, flash)),
        f"{first.roofline_seconds_per_batch:.3g}",
        _number(share, "{:.0%}" if share is None or share >= 0.1 else "{:.1%}"),
        *(_batch(line.get(name)) for name in others),
    )


def _means(lines: Sequence[Line], others: Sequence[str]) -> tuple[str, ...] | None:
    """The last line: geometric means of every system's speed-up over orig."""
    flash = geometric_mean(ratio(line.get(ORIG), line.get(FLASH)) for line in lines)
    rest = [
        geometric_mean(ratio(line.get(ORIG), line.get(name)) for line in lines) for name in others
    ]
    if flash is None and not any(rest):
        return None
    faster = [_times(value) for value in rest]
    return (GEOMETRIC_MEAN, *[""] * 9, _times(flash), "", "", *faster)


def _notes(rows: Sequence[ResultRow]) -> Iterable[str]:
    first = rows[0]
    yield (
        "Batch: median seconds of one call (features to the device, `generate`, wait); Loop: all "
        "timed calls; Roofline: what the bytes and operations of a call need at "
        f"{first.ceilings['bytes_per_second'] / 1e9:,.0f} GB/s copied and "
        f"{first.ceilings['flops_per_second'] / 1e9:,.0f} GFLOP/s multiplied, both measured here; "
        "Flash at: the roofline's share of Flash's time; the last line: times faster than Orig."
    )
    yield f"Features: {'; '.join(sorted({row.features for row in rows}))}."
    yield from _memory_notes(rows)
    yield from _first_call_note(rows)
    for ran, wanted in sorted({(row.batches, row.setting_batches) for row in rows}):
        if ran != wanted:
            yield f"{ran} batches were run in some rows, where the setting has {wanted}."
    code = {str(row.environment["commit"]) for row in rows}
    if len(code) > 1:
        yield f"The rows come from several commits: {', '.join(sorted(code))}."
    yield from _token_notes(rows)
    yield from _failure_notes(rows)


def _failure_notes(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Why rows are not ok, each reason once."""
    models: dict[tuple[str, str, str | None], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reason = (row.system, row.status, row.error)
            models.setdefault(reason, []).append(f"{row.checkpoint} {row.decoder_layers}")
    for (system, status, error), where in models.items():
        yield f"{system} {status} on {', '.join(where)}: {error}"


def _first_call_note(rows: Sequence[ResultRow]) -> Iterable[str]:
    """The slowest first call of every system, which is not timed."""
    slowest: dict[str, float] = {}
    for row in rows:
        if row.first_call_seconds is not None:
            slowest[row.system] = max(slowest.get(row.system, 0.0), row.first_call_seconds)
    if slowest:
        calls = ", ".join(f"{system} {seconds:.2g} s" for system, seconds in slowest.items())
        yield f"Slowest first call, before the clock: {calls}."


def _memory_notes(rows: Sequence[ResultRow]) -> Iterable[str]:
    if not rows[0].device.startswith("cuda"):
        yield "RSS: the most memory that the row's process occupied, its libraries included."
        return
    sources = sorted({row.vram_source for row in rows if row.vram_source})
    if sources:
        yield f"VRAM as the driver counts it: {', '.join(sources)}."


def _token_notes(rows: Sequence[ResultRow]) -> Iterable[str]:
    """How many ids equal orig's, system by system."""
    for system in dict.fromkeys(row.system for row in rows):
        compared = [
            row for row in rows if row.system == system and row.tokens_equal_to_orig is not None
        ]
        if system == ORIG or not compared:
            continue
        shares = [
            row.tokens_equal_to_orig for row in compared if row.tokens_equal_to_orig is not None
        ]
        mean = sum(shares) / len(shares)
        note = f"Token ids of {system} equal to orig's in the first batch: {mean:.1%}"
        note += f" (lowest row {min(shares):.1%})." if len(shares) > 1 else "."
        if min(shares) == 1.0:
            yield note
        elif compared[0].dtype == "float32":
            yield f"WARNING: {note} In float32 they should all be equal."
        else:
            yield (
                f"{note} With random weights the best two tokens are often nearly equal, and in "
                f"{compared[0].dtype} rounding decides; all that follows a flipped token differs."
            )


def _memory(row: ResultRow | None) -> str:
    if row is None:
        return NONE
    on_gpu = row.device.startswith("cuda")
    return _number(row.vram_driver_gb if on_gpu else row.rss_peak_gb, "{:.2f}")


def _loop(row: ResultRow | None) -> str:
    return NONE if row is None else _number(row.seconds_total, "{:.1f}")


def _batch(row: ResultRow | None) -> str:
    if row is None:
        return NONE
    return row.status if row.status != "ok" else _number(row.seconds_per_batch, "{:.3g}")


def _times(value: float | None) -> str:
    return _number(value, "{:.2f} x" if value is None or value < 10 else "{:.1f} x")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


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

    def seconds(row: ResultRow) -> float | None:
        return row.seconds_per_batch

    def gigabytes(row: ResultRow) -> float | None:
        return row.vram_driver_gb if on_gpu else row.rss_peak_gb

    on_gpu = first.device.startswith("cuda")
    kind = "VRAM, driver" if on_gpu else "peak RSS"
    if {row.system for row in rows} == set(STYLES):
        _ratios(time, rows, models, lambda stock, ours: _over(seconds(stock), seconds(ours)))
        time.set_ylabel("times as fast as stock")
        _ratios(memory, rows, models, lambda stock, ours: _over(gigabytes(ours), gigabytes(stock)))
        memory.set_ylabel(f"{kind}, of stock's")
        memory.axhline(1.0, color="black", linewidth=0.8, linestyle="dashed")
    else:
        _bars(time, rows, models, seconds, "seconds per batch (median)")
        _bars(memory, rows, models, gigabytes, f"{kind} (GB)")
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    files = [folder / f"{name}.{form}" for form in FORMATS]
    for path in files:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
    return files


def _over(above: float | None, below: float | None) -> float:
    return above / below if above and below else 0.0


def _ratios(
    axes: Axes,
    rows: Sequence[ResultRow],
    models: Sequence[tuple[str, int]],
    ratio: Callable[[ResultRow, ResultRow], float],
) -> None:
    """A bar for each model that both systems ran, with its ratio on it."""
    found = {(row.system, row.checkpoint, row.decoder_layers): row for row in rows}
    heights: list[float] = []
    for model in models:
        stock, ours = (found.get((system, *model)) for system in STYLES)
        heights.append(ratio(stock, ours) if stock and ours else 0.0)
    drawn = axes.bar(range(len(models)), heights, 2 * BAR, **list(STYLES.values())[1])
    axes.bar_label(drawn, [f"{each:.3g}" if each else "" for each in heights], padding=2)
    _label_models(axes, models)


def _label_models(axes: Axes, models: Sequence[tuple[str, int]]) -> None:
    axes.set_xticks(range(len(models)), [f"{name}\n{layers} layers" for name, layers in models])
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


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
        positions = [position + offset for position in heights]
        drawn = axes.bar(positions, list(heights.values()), BAR, **style)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=7, padding=2)
    axes.set_ylabel(label)
    _label_models(axes, models)


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
