"""The README's table: committed results beside the figures that the predecessor published.

python benchmarks/readme_table.py            # print it
python benchmarks/readme_table.py --write    # put it into README.md, between its two marks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h100" / "results.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

# What the predecessor published for its default and its large setting: VRAM in GB, Orig and Flash,
# and seconds for the whole loop (100 batches of 1 clip, 10 batches of 32), Orig and Flash. Random
# weights, float16; its GPU is not named.
Figures = tuple[float, float, float, float]
PUBLISHED: dict[tuple[str, int], tuple[Figures, Figures]] = {
    ("tiny", 4): ((1.38, 1.39, 17.0, 16.4), (3.23, 2.09, 16.1, 20.7)),
    ("tiny", 2): ((1.35, 1.36, 9.3, 11.0), (3.27, 1.95, 9.6, 11.2)),
    ("base", 6): ((1.52, 1.53, 19.4, 21.3), (3.98, 2.83, 21.4, 24.8)),
    ("base", 4): ((1.49, 1.5, 14.5, 15.4), (3.95, 2.38, 15.2, 20.3)),
    ("base", 2): ((1.45, 1.46, 9.3, 9.7), (3.91, 2.14, 10.1, 11.5)),
    ("small", 12): ((2.27, 2.27, 39.4, 43.2), (5.99, 6.07, 39.1, 58.5)),
    ("small", 6): ((2.03, 2.04, 23.3, 24.2), (5.73, 3.86, 22.6, 31.8)),
    ("small", 4): ((1.95, 1.96, 17.5, 17.5), (5.64, 3.05, 19.0, 24.3)),
    ("small", 2): ((1.87, 1.88, 12.0, 12.7), (5.55, 2.89, 12.5, 15.2)),
    ("medium", 24): ((4.21, 4.21, 76.0, 86.6), (9.19, 13.63, 78.0, 175.5)),
    ("medium", 6): ((3.05, 3.06, 25.4, 27.3), (7.97, 5.26, 29.6, 51.8)),
    ("medium", 4): ((2.92, 2.93, 20.2, 19.5), (7.83, 4.38, 25.3, 38.1)),
    ("medium", 2): ((2.79, 2.8, 14.0, 14.3), (7.7, 4.15, 19.2, 24.3)),
}
BATCHES = {"default": 100, "large": 10}

COLUMNS = (
    "{setting}",
    "seconds per call, Orig → Flash",
    "Orig/Flash",
    "VRAM, GB",
    "published: seconds per call",
    "Orig/Flash",
    "VRAM, GB",
)

Measured = dict[tuple[str, str, int, str], dict[str, Any]]


def read_results(path: Path = RESULTS) -> Measured:
    """Rows that were measured, by (setting, checkpoint, decoder layers, system)."""
    rows = json.loads(path.read_text())["rows"]
    return {
        (row["setting"], row["checkpoint"], row["decoder_layers"], row["system"]): row
        for row in rows
        if row["status"] == "ok"
    }


def table(measured: Measured) -> str:
    """Both settings in Markdown; what was not measured shows a dash."""
    return "\n\n".join(_setting_table(measured, setting) for setting in BATCHES)


def _setting_table(measured: Measured, setting: str) -> str:
    names = [name.format(setting=setting) for name in COLUMNS]
    lines = [names, ["---"] * len(names)]
    for (checkpoint, layers), both in PUBLISHED.items():
        orig_gb, flash_gb, orig, flash = both[list(BATCHES).index(setting)]
        pair = [measured.get((setting, checkpoint, layers, s)) for s in ("orig", "flash")]
        lines.append(
            [
                f"{checkpoint} {layers}",
                *_compare(pair, "seconds_per_batch", ".3g"),
                _compare(pair, "vram_driver_gb", ".2f")[0],
                f"{orig / BATCHES[setting]:.3g} → {flash / BATCHES[setting]:.3g}",
                f"{orig / flash:.2f} x",
                f"{orig_gb:.2f} → {flash_gb:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _compare(pair: list[dict[str, Any] | None], field: str, form: str) -> tuple[str, str]:
    """`Orig → Flash` of one field, and their ratio."""
    texts = ["-" if row is None else f"{row[field]:{form}}" for row in pair]
    orig, flash = pair
    ratio = "-" if orig is None or flash is None else f"{orig[field] / flash[field]:.3g} x"
    return " → ".join(texts), ratio


def between_marks(text: str) -> str:
    """What the README shows now."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def main(
    write: Annotated[bool, typer.Option("--write", help="Put the table into README.md.")] = False,
) -> None:
    """Print the README's table of results, or put it in its place."""
    made = table(read_results())
    if not write:
        print(made)
        return
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    typer.run(main)
