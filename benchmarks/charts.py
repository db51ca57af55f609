"""Charts of the committed results, as SVG: time, memory, errors.

`tables.py readme --write` writes them. A chart has a background of its own and colours for light
and dark, so that it can be read on any page; bars of this package are solid and all others hatched,
so that it can be read in black and white.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
RESULTS, ASSETS = ROOT / "benchmarks" / "results", ROOT / "docs" / "assets"

WIDTH, MARGIN, LEFT, RIGHT = 720, 16, 96, 230
BAR, SPACE, GAP = 16, 3, 14
STYLE = """<style>
.page { fill: #ffffff } text { fill: #1f2328 }
.ours { fill: #a63c06 } .other { fill: url(#hatch); stroke: #57606a } .hatch { stroke: #57606a }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } text { fill: #e6edf3 }
.ours { fill: #ff9a5c } .other { stroke: #9198a1 } .hatch { stroke: #9198a1 }
}
</style>
<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse">
<path class="hatch" d="M0 5L5 0" stroke-width="1"/></pattern></defs>"""


@dataclass(frozen=True)
class Bar:
    """A bar's length, the text beside it, and whether it is of this package."""

    value: float
    note: str
    is_ours: bool


def draw(title: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Horizontal bars on one scale, in named groups."""
    longest = max(bar.value for _, bars in groups for bar in bars) or 1.0
    parts = [_text(MARGIN, 28, title, 15)]
    top = 44
    for name, bars in groups:
        parts.append(_text(MARGIN, top + BAR - 3, name, 13))
        for bar in bars:
            width = (WIDTH - LEFT - RIGHT) * bar.value / longest
            kind = "ours" if bar.is_ours else "other"
            shape = f'x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}"'
            parts.append(f'<rect class="{kind}" {shape}/>')
            parts.append(_text(LEFT + width + 6, top + BAR - 4, bar.note))
            top += BAR + SPACE
        top += GAP
    heading = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" '
        f'height="{top}" role="img" font-family="system-ui, sans-serif">\n'
        f"<title>{escape(title)}</title>\n{STYLE}\n"
        f'<rect class="page" width="{WIDTH}" height="{top}" rx="6"/>'
    )
    return "\n".join([heading, *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}">{escape(text)}</text>'


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


# Checkpoints with all of their decoder layers.
WHOLE = {"tiny": 4, "base": 6, "small": 12, "medium": 24}
LARGE = "32 clips of 30 s, 256 tokens each (NVIDIA H200, float16)"


def _whole_calls(field: str, unit: str, what: str) -> list[tuple[str, list[Bar]]]:
    """Stock and this package in the large setting."""
    rows = {
        (row["checkpoint"], row["decoder_layers"], row["system"]): row[field]
        for row in _read("h200/results.json")["rows"]
        if row["setting"] == "large" and row["status"] == "ok"
    }
    groups = []
    for name, layers in WHOLE.items():
        stock, ours = (rows[name, layers, system] for system in ("orig", "flash"))
        note = f"this package {ours:.2f} {unit}, {what.format(stock / ours, ours / stock)}"
        bars = [Bar(stock, f"stock {stock:.2f} {unit}", False), Bar(ours, note, True)]
        groups.append((name, bars))
    return groups


def speed() -> str:
    """Seconds per call."""
    groups = _whole_calls("seconds_per_batch", "s", "{0:.3g} x as fast")
    return draw(f"Seconds for {LARGE}", groups)


def memory() -> str:
    """GPU memory of the process."""
    groups = _whole_calls("vram_driver_gb", "GB", "{1:.0%}")
    return draw(f"GPU memory, GB, for {LARGE}", groups)


# Systems as charts and tables name them.
SYSTEM_NAMES = {
    "ours": "this package",
    "ours-sequential": "this package, sequential",
    "ours-batched": "this package, batched",
    "stock-long-form": "Transformers, long form",
    "stock-chunked": "Transformers, chunked",
    "openai-whisper": "openai-whisper",
    "faster-whisper": "faster-whisper",
    "faster-whisper-sequential": "faster-whisper, sequential",
    "faster-whisper-batched": "faster-whisper, batched",
    "whisper.cpp": "whisper.cpp",
    "whisperx": "whisperX",
    "vllm": "vLLM",
}
ON_CPU = "10 minutes of speech, files to text, two cores, float32"


def _peers(field: str, form: str) -> list[tuple[str, list[Bar]]]:
    """A field of all systems on a CPU."""
    rows = [
        row
        for row in _read("peers-cpu.json")["rows"]
        if row["status"] == "ok" and row["dtype"] == "float32"
    ]
    groups: dict[str, list[Bar]] = {}
    for row in sorted(rows, key=lambda row: -row["realtime_factor"]):
        is_ours = row["system"].startswith("ours")
        note = f"{SYSTEM_NAMES[row['system']]} {row[field]:{form}}"
        bars = groups.setdefault(row["checkpoint"].removeprefix("package:"), [])
        bars.append(Bar(row[field], note, is_ours))
    return sorted(groups.items(), reverse=True)


def peers() -> str:
    """Speed of all systems on a CPU."""
    return draw(f"Times real time: {ON_CPU}", _peers("realtime_factor", ".1f"))


def peers_memory() -> str:
    """Memory of all systems on a CPU."""
    return draw(f"Peak memory, GB: {ON_CPU}", _peers("peak_memory_gb", ".2f"))


def errors() -> str:
    """Word errors of all systems on a CPU."""
    return draw(f"Word error rate: {ON_CPU}", _peers("wer", ".1%"))


CHARTS: dict[str, Callable[[], str]] = {
    "speed": speed,
    "memory": memory,
    "peers": peers,
    "peers-memory": peers_memory,
    "errors": errors,
}


def path_of(name: str) -> Path:
    """The file of a chart."""
    return ASSETS / f"{name}.svg"


def write_charts() -> None:
    """Write all charts."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name, make in CHARTS.items():
        path_of(name).write_text(make(), "utf-8")
