"""The tables of pages, from committed results.

    python benchmarks/tables.py readme            # print those of README.md and docs/benchmarks.md
    python benchmarks/tables.py readme --write    # put them, and charts.py's, into their places
    python benchmarks/tables.py scale             # print the tables of docs/scale.md
    python benchmarks/tables.py scale --write     # put them into docs/scale.md

`readme`: our results beside the figures that the predecessor published. `scale`: what an archive on
many GPUs needs. Measured, from benchmarks/results: speed of a GPU (throughput-h100.json), of a core
that decodes (front-end.json), of one driver that writes (archive-rows-cpu.json). Assumed, by
`Assumptions`: the archive, its format, failures. The time of a whole archive is simulated: workers
take groups, longest recordings first, fail now and then, and a lost group is done again.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from _harness import app_of
from charts import SYSTEM_NAMES, WHOLE, write_charts

from whisper_flash_attention.benchmark.peer_systems import SYSTEMS
from whisper_flash_attention.benchmark.peers import speed_of_ours

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, SCALE_PAGE = ROOT / "README.md", ROOT / "docs" / "scale.md"
PAGE = ROOT / "docs" / "benchmarks.md"

Write = Annotated[bool, typer.Option("--write", help="Put the tables into their page.")]


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


# --- README.md and docs/benchmarks.md -----------------------------------------------------------

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

# Modes compared, and the files of `whisper-flash parity` with their rows.
PARITY = {
    ("tiny.en, float32", "CPU"): ("parity-tiny.en.json", "parity-tiny.en-search.json"),
    ("base, float32", "CPU"): ("parity-base.json", "parity-base-sampled.json"),
    ("base, float32", "H100"): ("parity-base-float32-h100.json",),
    ("tiny.en, float16", "H100"): ("parity-tiny.en-float16-h100.json",),
    ("base, float16", "H100"): ("parity-base-float16-h100.json",),
    ("tiny.en, bfloat16", "H100"): ("parity-tiny.en-bfloat16-h100.json",),
}

THROUGHPUT = "throughput-h100.json"
# A row of the later file replaces the same of the one before.
FILES = ("files-h100.json", "files-h200.json")
# Its two rows differ in the detector.
DETECTOR = "files-detector-h200.json"
# Entries of `benchmark throughput --from files`, and what users call them.
ENTRIES = {
    "memory": "arrays in memory",
    "transcribe": "`transcribe`",
    "transcribe_each": "`transcribe_each`",
    "command": "the command",
    "batch-local": "`batch`",
    "batch-ray": "`batch` on Ray",
}
PEERS, PEERS_GPU = "peers-cpu.json", "peers-h200.json"
MEMORY = "memory-h200.json"

Results = dict[tuple[str, str, int, str], dict[str, Any]]


def read_json(name: str) -> Any:
    """A file of `benchmarks/results`."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def read_results() -> Results:
    """Measured rows of whole calls, by (setting, checkpoint, decoder layers, system)."""
    return {
        (row["setting"], row["checkpoint"], row["decoder_layers"], row["system"]): row
        for row in read_json("h200/results.json")["rows"]
        if row["status"] == "ok"
    }


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def predecessor_tables() -> str:
    """Both settings beside the predecessor's figures, with a dash where not measured."""
    measured = read_results()
    return "\n\n".join(_setting_table(measured, setting) for setting in BATCHES)


def _setting_table(measured: Results, setting: str) -> str:
    rows = []
    for (checkpoint, layers), both in PUBLISHED.items():
        orig_gb, flash_gb, orig, flash = both[list(BATCHES).index(setting)]
        pair = [measured.get((setting, checkpoint, layers, s)) for s in ("orig", "flash")]
        rows.append(
            [
                f"{checkpoint} {layers}",
                *_compare(pair, "seconds_per_batch", ".3g"),
                _compare(pair, "vram_driver_gb", ".2f")[0],
                f"{orig / BATCHES[setting]:.3g} → {flash / BATCHES[setting]:.3g}",
                f"{orig / flash:.2f} x",
                f"{orig_gb:.2f} → {flash_gb:.2f}",
            ]
        )
    return markdown([name.format(setting=setting) for name in COLUMNS], rows)


def _compare(pair: list[dict[str, Any] | None], field: str, form: str) -> tuple[str, str]:
    """`Orig → Flash` of one field, and their ratio."""
    texts = ["-" if row is None else f"{row[field]:{form}}" for row in pair]
    orig, flash = pair
    ratio = "-" if orig is None or flash is None else f"{orig[field] / flash[field]:.3g} x"
    return " → ".join(texts), ratio


def _seconds(setting: str, checkpoint: str, layers: int) -> tuple[float, float]:
    """Seconds per call of stock and of this package."""
    measured = read_results()
    orig, flash = (
        measured[setting, checkpoint, layers, system]["seconds_per_batch"]
        for system in ("orig", "flash")
    )
    return orig, flash


def headline() -> str:
    """The README's one number."""
    stock, ours = _seconds("large", "medium", 24)
    return (
        f"**{stock / ours:.3g} times as fast as stock Transformers**: {ours:.2g} s instead of "
        f"{stock:.3g} s for 32 clips of 30 s with\nWhisper medium on an NVIDIA H200 (float16, 256 "
        "tokens per clip, stock with eager attention)."
    )


def summary() -> str:
    """The README's few rows: whole calls on a GPU, and one on a CPU."""
    cases = [
        ("default", "tiny", 4, "tiny, 1 clip, 25 tokens"),
        ("default", "medium", 24, "medium, 1 clip, 25 tokens"),
        ("large", "tiny", 4, "tiny, 32 clips, 256 tokens each"),
        ("large", "medium", 24, "medium, 32 clips, 256 tokens each"),
    ]
    rows = [
        [f"{label}; H200, float16", *_times(*_seconds(setting, checkpoint, layers))]
        for setting, checkpoint, layers, label in cases
    ]
    (cpu,) = (row for row in read_json("cpu.json")["rows"] if row["model"] == "package:base")
    pair = (median(cpu["stock_seconds"]), median(cpu["our_seconds"]))
    rows.append(["base, a recording of 10 s; 2 CPU cores, float32", *_times(*pair)])
    return markdown(["`generate`", "stock Transformers", "this package", "faster"], rows)


def _times(stock: float, ours: float) -> tuple[str, str, str]:
    return f"{stock:.3g} s", f"{ours:.3g} s", f"{stock / ours:.3g} x"


def encoder() -> str:
    """The encoder alone."""
    rows = read_json("encoder-h100.json")["rows"]
    found = {(row["checkpoint"], row["batch_size"], row["system"]): row for row in rows}
    lines = []
    for checkpoint, batch in sorted({key[:2] for key in found}, key=_by_size):
        orig, sdpa, flash = (found[checkpoint, batch, s] for s in ("orig", "sdpa", "flash"))
        lines.append(
            [
                f"{checkpoint}, {batch} clip{'s' if batch > 1 else ''}",
                *(f"{1e3 * row['seconds_per_batch']:.3g}" for row in (orig, sdpa, flash)),
                f"{100 * flash['matmul_share']:.0f} %",
                " → ".join(f"{row['activation_bytes'] / 1e6:.0f}" for row in (sdpa, flash)),
            ]
        )
    heading = ["encoder, ms", "stock, eager", "stock, SDPA", "this package"]
    return markdown([*heading, "of the matmul ceiling", "activations, MB, SDPA → ours"], lines)


def _by_size(case: tuple[str, int]) -> tuple[int, int]:
    return list(WHOLE).index(case[0]), case[1]


def throughput() -> str:
    """Recordings in memory that become text, in times real time."""
    rows = read_json(THROUGHPUT)["rows"]
    found = {(r["checkpoint"], r["batch_size"], r["word_timestamps"]): r for r in rows}
    cases = ((128, False), (128, True), (1, False))
    lines = [
        [name, *(f"{found[name, *case]['realtime_factor']:,.0f}" for case in cases)]
        for name in ("tiny", "large-v3-turbo", "large-v3")
    ]
    heading = ["times real time", "128 windows at a time", "with word timestamps", "one at a time"]
    return markdown(heading, lines)


def _files_rows(setting: str) -> list[dict[str, Any]]:
    rows = (row for name in FILES for row in read_json(name)["rows"])
    return [row for row in rows if row["setting"] == setting]


def _gpu(row: Mapping[str, Any]) -> str:
    """The short name of a row's GPU: H100, H200."""
    return str(row["environment"]["device_name"].split()[1])


def files() -> str:
    """Files on disk that become written text, in times real time."""
    cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in _files_rows("files"):
        hours = f"{row['recordings']:,} files, {row['audio_seconds'] / 3_600:.1f} h"
        case = (row["checkpoint"], row["mode"], hours, row["container"])
        cases.setdefault(case, {})[row["entry"]] = row
    entries = [name for name in ENTRIES if any(name in found for found in cases.values())]
    lines = []
    for (checkpoint, mode, hours, container), found in cases.items():
        speeds = [found.get(name) for name in entries]
        gpu = _gpu(next(iter(found.values())))
        cells = ["" if row is None else f"{row['realtime_factor']:,.0f}" for row in speeds]
        lines.append([f"{checkpoint}, {mode}, {hours} of {container} ({gpu})", *cells])
    return markdown(["times real time", *(ENTRIES[name] for name in entries)], lines)


def decoding() -> str:
    """Decoding of files alone, in times real time."""
    found: dict[str, dict[int, float]] = {}
    for row in _files_rows("decode"):
        found.setdefault(row["container"], {})[row["threads"]] = row["realtime_factor"]
    counts = sorted({count for each in found.values() for count in each})
    lines = [
        [name, *(f"{each[count]:,.0f}" if count in each else "" for count in counts)]
        for name, each in found.items()
    ]
    heading = [f"{count} process{'es' if count > 1 else ''}" for count in counts]
    return markdown(["decoding alone, times real time", *heading], lines)


def files_sentence() -> str:
    """The README's number of files to text."""
    found = {
        (row["container"], row["entry"]): row
        for row in _files_rows("files")
        if row["checkpoint"] == "large-v3-turbo" and row["mode"] == "batched"
        if row["recordings"] == 96
    }
    row, memory = found["flac", "command"], found["flac", "memory"]
    share = row["realtime_factor"] / memory["realtime_factor"]
    speeds = {row.get("vad", False): row["realtime_factor"] for row in read_json(DETECTOR)["rows"]}
    kept = speeds[True] / speeds[False]
    return (
        f"From files: the command turns {row['recordings']} flac files, "
        f"{row['audio_seconds'] / 3_600:.0f} hours, into text in {row['seconds']:.1f} s with\n"
        f"large-v3-turbo on an {_gpu(row)}: {row['realtime_factor']:,.0f} times real time, "
        f"{share:.0%} of the speed from memory (random\nweights, 100 tokens in each window). "
        f"With the voice activity detector it keeps {kept:.0%} of its speed."
    )


def peers_sentence() -> str:
    """The README's comparison with other systems."""
    return textwrap.fill(
        f"{_peers_on_gpu()} {_peers_on_cpu()}", 100, break_long_words=False, break_on_hyphens=False
    )


def _peers_on_cpu() -> str:
    rows = [row for row in read_json(PEERS)["rows"] if row["status"] == "ok"]
    # Over the fastest of the others, by checkpoint, dtype and mode.
    least: dict[tuple[str, str, bool], float] = {}
    others = set()
    for row in rows:
        same = [each for each in rows if _by_case(each) == _by_case(row)]
        if row["system"].startswith("ours") or (ratio := speed_of_ours(same, row)) is None:
            continue
        case = (*_by_case(row), SYSTEMS[row["system"]].is_batched)
        least[case] = min(ratio, least.get(case, ratio))
        others.add(SYSTEM_NAMES[row["system"]].partition(",")[0])
    *most, last = sorted(others, key=str.lower)
    lowest, highest = min(least.values()), max(least.values())
    return (
        f"On two CPU cores it is {lowest:.2f} to {highest:.2f} times as fast as the fastest "
        f"of {', '.join(most)} and {last} in the same mode (tiny.en and base, float32 and int8, as "
        "far as measured; [memory and errors]"
        "(docs/benchmarks.md#beside-other-systems-files-to-text))."
    )


def _peers_on_gpu() -> str:
    rows = [row for row in read_json(PEERS_GPU)["rows"] if row["status"] == "ok"]
    ratios: dict[str, list[float]] = {}
    for row in rows:
        same = [each for each in rows if _by_case(each) == _by_case(row)]
        if row["system"].startswith("ours") or (ratio := speed_of_ours(same, row)) is None:
            continue
        ratios.setdefault(SYSTEM_NAMES[row["system"]].partition(",")[0], []).append(ratio)
    compared = " and ".join(
        f"{min(found):.1f} to {max(found):.1f} times as fast as {name}"
        for name, found in sorted(ratios.items())
    )
    *most, last = sorted({row["batch_size"] for row in rows})
    return (
        f"On an {_gpu(rows[0])} it is {compared}, from a flac file, "
        f"{', '.join(map(str, most))} or {last} windows at a time (large-v3-turbo and large-v3, "
        "random weights)."
    )


def peers() -> str:
    """Systems from files to text: their speed, memory and errors, and how much faster ours is."""
    rows = read_json(PEERS)["rows"]
    lines = []
    for row in sorted(rows, key=_by_case):
        if row["status"] != "ok":
            continue
        ratio = speed_of_ours([each for each in rows if _by_case(each) == _by_case(row)], row)
        first, memory = row["first_text_seconds"], row["peak_memory_gb"]
        lines.append(
            [
                row["checkpoint"].removeprefix("package:"),
                row["dtype"],
                f"{SYSTEM_NAMES[row['system']]} {row['version']}",
                f"{row['realtime_factor']:.1f}",
                "" if row["system"].startswith("ours") or ratio is None else f"{ratio:.2f}",
                "" if first is None else f"{first:.2f}",
                "" if memory is None else f"{memory:.2f}",
                f"{row['wer']:.1%}",
                str(row["invented_words"]),
            ]
        )
    heading = ["checkpoint", "dtype", "system", "x real time", "ours is N x as fast"]
    heading.append("first text, s")
    text = markdown([*heading, "memory, GB", "word errors", "words where nobody speaks"], lines)
    reasons = {row["system"]: row["reason"] for row in rows if row["status"] != "ok"}
    measured = {row["system"] for row in rows if row["status"] == "ok"}
    without = [f"{each} ({why})" for each, why in reasons.items() if each not in measured]
    return f"{text}\n\nWithout figures: {', '.join(without)}." if without else text


def _by_case(row: Mapping[str, Any]) -> tuple[str, str]:
    """What rows that are compared have in common."""
    return row["checkpoint"], row["dtype"]


def peers_gpu() -> str:
    """Systems from one file to text on a GPU: random weights, a given number of tokens a window."""
    rows = read_json(PEERS_GPU)["rows"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["checkpoint"], row["batch_size"])):
        same = [each for each in rows if _by_case(each) == _by_case(row)]
        what = [
            row["checkpoint"],
            str(row["batch_size"]),
            f"{SYSTEM_NAMES[row['system']]} {row['version']}",
        ]
        if row["status"] != "ok":
            # Its first sentence: the rest has sizes of single allocations.
            lines.append([*what, row["reason"].partition(". ")[0], "", "", "", ""])
            continue
        ratio = speed_of_ours(same, row)
        memory = row["peak_vram_gb"]
        lines.append(
            [
                *what,
                f"{row['realtime_factor']:,.0f}",
                "" if row["system"].startswith("ours") or ratio is None else f"{ratio:.1f}",
                f"{row['first_text_seconds']:.2f}",
                "" if memory is None else f"{memory:.1f}",
                f"{row['tokens']:,}",
            ]
        )
    heading = ["checkpoint", "windows at a time", "system", "x real time", "ours is N x as fast"]
    return markdown([*heading, "first text, s", "GPU memory, GB", "tokens"], lines)


def memory() -> str:
    """One clip on a GPU: what the driver counts, and the allocator's peak beside the weights."""
    rows = [row for row in read_json(MEMORY)["summary"] if row["variant"] == "as it is"]
    systems = {
        name: {(row["checkpoint"], row["layers"]): row for row in rows if row["system"] == name}
        for name in ("orig", "flash")
    }
    lines = []
    for case, stock in systems["orig"].items():
        ours = systems["flash"][case]
        line = [f"{case[0]} {case[1]}"]
        for field in ("driver", "aside"):
            before, after = stock[field], ours[field]
            line += [f"{before:,.0f} → {after:,.0f}", f"{after / before:.0%}"]
        lines.append([*line, f"{100 * ours['plan_error']:+.1f} %"])
    heading = ["driver, MB", "of stock", "beside weights, MB", "of stock", "`plan` is off by"]
    return markdown(["decoder", *heading], lines)


def cpu() -> str:
    """Whole calls on two cores of a CPU."""
    lines = []
    for row in read_json("cpu.json")["rows"]:
        stock, ours = median(row["stock_seconds"]), median(row["our_seconds"])
        lines.append(
            [
                row["model"].removeprefix("package:"),
                *_times(stock, ours),
                f"{row['stock_peak_mib']:.0f} → {row['our_peak_mib']:.0f}",
                "yes" if row["ids_equal"] else "no",
            ]
        )
    heading = ["checkpoint", "stock, eager", "this package", "faster"]
    return markdown([*heading, "peak memory, MiB", "same token ids"], lines)


def parity() -> str:
    """Token ids compared with stock's over a folder of recordings."""
    lines = []
    for (checkpoint, where), names in PARITY.items():
        files = [read_json(name) for name in names]
        modes = {row["mode"]: row for file in files for row in file["summary"]}
        identical = sum(row["identical"] for row in modes.values())
        gaps = [
            result["tie"]["gap"]
            for file in files
            for result in file["results"]
            if result["status"] == "explained"
        ]
        total = identical + sum(
            row[kind] for row in modes.values() for kind in ("explained", "unexplained", "failed")
        )
        rest = f"near-ties, gaps up to {max(gaps):.2g}" if gaps else ""
        if total > identical + len(gaps):
            rest = "unexplained differences"
        lines.append([checkpoint, where, ", ".join(modes), f"{identical} of {total}", rest])
    return markdown(["checkpoint", "device", "modes", "identical ids", "the rest"], lines)


# Results that README.md and pages of docs/ show or cite.
SOURCES = (
    "h200/results.json",
    "encoder-h100.json",
    THROUGHPUT,
    *FILES,
    DETECTOR,
    PEERS,
    PEERS_GPU,
    MEMORY,
    "mlperf-h200.json",
    "mlperf-h100.json",
    "serve-h100.json",
    "serve-h200.json",
    "serve-queued-h200.json",
    "serve-cpu.json",
    "start-up-tiny-h100.json",
    "start-up-medium-h100.json",
    "capacity-h100.json",
    "cpu.json",
    *dict.fromkeys(name for names in PARITY.values() for name in names),
    "texts-tiny.en-cpu.json",
    "texts-base-cpu.json",
    "word-times-tiny.en-cpu.json",
    "word-times-base-cpu.json",
    "word-errors-cpu.json",
    "invented-cpu.json",
    "lost-words-tiny.en-h100.json",
    "lost-words-base-h100.json",
    "long-form-tiny.en-cpu.json",
    "short-windows-tiny.en-cpu.json",
    "short-windows-base-cpu.json",
    "start-cpu.json",
    "cpu-step.json",
    "cpu-products.json",
    "encoder-cpu.json",
    "encoder-fidelity-tiny.en-h100.json",
    "front-end.json",
    "decoders-cpu.json",
    "detector-cpu.json",
    "ray-groups-h200.json",
    "archive-cpu.json",
    "archive-rows-cpu.json",
    "decode-step-h100.json",
    "attention-h100.json",
    "absorbed-h100.json",
    "absorbed-1280-h100.json",
    "absorbed-wide-h200.json",
    "absorbed-ring-h200.json",
    "memory-account-h100.json",
    "memory-release-h200.json",
    "house-h100.json",
    "house-large-h200.json",
    "h100-static/results.json",
    "h100-backends/results.json",
)


def environments(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments of a file of results; none where it records none.

    A row without one has that of the file. Files of two parts, before and after a change, have one
    in each, beside the part's commit.
    """
    top = document.get("environment")
    if rows := document.get("rows"):
        found = [row.get("environment", top) for row in rows]
    elif top is None:
        parts = (part for part in document.values() if isinstance(part, dict))
        found = [p["environment"] | {"commit": p["commit"]} for p in parts if "environment" in p]
    else:
        found = [top]
    return [each for each in found if each is not None]


def sources() -> str:
    """The day, the commit and the machine of each file of results."""
    lines = []
    for name in SOURCES:
        found = environments(read_json(name))
        fields = ([each[key] for each in found] for key in ("date", "commit", "device_name"))
        days, commits, devices = (dict.fromkeys(values) for values in fields)
        lines.append(
            [
                f"`{name}`",
                ", ".join(sorted({day[:10] for day in days})),
                ", ".join(commits),
                ", ".join(devices),
            ]
        )
    return markdown(["results", "day", "commit", "device"], lines)


# The page of each block, by the name in its marks.
BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "headline": (README, headline),
    "summary": (README, summary),
    "predecessor": (PAGE, predecessor_tables),
    "encoder": (PAGE, encoder),
    "throughput": (PAGE, throughput),
    "files-sentence": (README, files_sentence),
    "peers-sentence": (README, peers_sentence),
    "files": (PAGE, files),
    "decoding": (PAGE, decoding),
    "memory": (PAGE, memory),
    "peers-cpu": (PAGE, peers),
    "peers-gpu": (PAGE, peers_gpu),
    "cpu": (PAGE, cpu),
    "parity": (PAGE, parity),
    "sources": (PAGE, sources),
}


def readme(write: Write = False) -> None:
    """Print the tables of README.md and docs/benchmarks.md, or write them and the charts."""
    # All of them before the first is written: a row that is wrong leaves the pages as they were.
    made = {name: make() for name, (_, make) in BLOCKS.items()}
    for name, (page, _) in BLOCKS.items():
        print_or_write(made[name], page, name, write)
    if write:
        write_charts()


# --- docs/scale.md -------------------------------------------------------------------------------

GPUS = 1_000
SIMULATED = (1, 8, 64, GPUS)
SAMPLE_BYTES = 16_000 * 4  # of a second of decoded audio


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about archives and failures.

    419 unexpected interruptions in 54 days on 16,384 H100s (The Llama 3 Herd of Models, arXiv
    2407.21783, section 3.3.4) are one in 50,700 hours of a GPU.
    """

    archive_hours: float = 100_000.0
    recording_seconds: float = 600.0  # mean; lengths are distributed log-normally
    spread: float = 1.0  # standard deviation of the lengths' logarithm
    bytes_per_second: float = 16_000.0  # of the recordings' format: mp3 at 128 kbit/s
    codec: str = "mp3"  # the row of front-end.json
    group_hours: float = 4.0  # of `whisper-flash batch`
    start_seconds: float = 60.0  # from a worker's start to its first group
    hours_between_failures: float = 16_384 * 54 * 24 / 419
    gpus_per_machine: int = 8  # which fail together
    shard_seconds: float = 30.0  # of rows that a driver holds before it writes them
    driver_seconds: float = 300.0  # until a driver that died has been restarted


@dataclass(frozen=True)
class Measured:
    """Measured speeds and sizes."""

    gpu: dict[str, float]  # times real time with the largest batch, by model
    core: float  # times real time that a core decodes
    rows: float  # per second that one driver writes
    row_bytes: float  # of results per second of audio


def read_measured(assumed: Assumptions) -> Measured:
    """Read the committed results."""
    decoding = read_json("front-end.json")["decoding"]
    (core,) = (row["times_real"] for row in decoding if row["format"] == assumed.codec)
    writing = read_json("archive-rows-cpu.json")["writing"]
    best: dict[str, tuple[int, float]] = {}
    for row in read_json(THROUGHPUT)["rows"]:
        if row["status"] == "ok" and row["system"] == "flash" and not row["word_timestamps"]:
            found = (row["batch_size"], row["realtime_factor"])
            best[row["checkpoint"]] = max(found, best.get(row["checkpoint"], (0, 0.0)))
    gpu = {name: best[name][1] for name in sorted(best, key=lambda name: -best[name][1])}
    rate, size = writing["rows_per_second"], writing["bytes_per_audio_second"]
    return Measured(gpu, core, rate, size)


def demand(measured: Measured, assumed: Assumptions) -> str:
    """A table of the demand of `GPUS` that are all busy, by model."""
    heading = [f"{GPUS:,} GPUs with", "audio, h/s", "files/s", "of one driver's rows/s"]
    heading += ["cores that decode, per GPU", "from storage, GB/s", "decoded, GB/s"]
    heading += ["results, MB/s", f"{assumed.archive_hours:,.0f} h at full speed"]
    rows = []
    for model, rate in measured.gpu.items():
        audio = GPUS * rate  # seconds of audio per second
        files = audio / assumed.recording_seconds
        rows.append(
            [
                f"{model}, {rate:,.0f} x real time",
                f"{audio / 3_600:,.0f}",
                f"{files:,.0f}",
                f"{files / measured.rows:.0%}",
                f"{rate / measured.core:.1f}",
                f"{audio * assumed.bytes_per_second / 1e9:.1f}",
                f"{audio * SAMPLE_BYTES / 1e9:.0f}",
                f"{audio * measured.row_bytes / 1e6:,.0f}",
                f"{assumed.archive_hours * 60 / audio:.1f} min",
            ]
        )
    return markdown(heading, rows)


def failures(measured: Measured, assumed: Assumptions) -> str:
    """A table of the cost of failures of `GPUS` per day, by model."""
    a_day = GPUS * 24 / assumed.hours_between_failures
    heading = [f"a day of {GPUS:,} GPUs", "failures", "a group takes, s", "GPU hours lost by them"]
    rows = []
    for model, rate in measured.gpu.items():
        group = assumed.group_hours * 3_600 / rate
        # On the average half a group is lost, on every GPU of the machine.
        lost = a_day * assumed.gpus_per_machine * (group / 2 + assumed.start_seconds) / 3_600
        # All groups in work, the rows not yet written, and the time until all continue.
        waited = group / 2 + assumed.shard_seconds + assumed.driver_seconds + assumed.start_seconds
        shares = [f"{lost / (GPUS * 24):.6%}", f"{GPUS * waited / 3_600:.0f}"]
        rows.append([model, f"{a_day:.2f}", f"{group:.1f}", f"{lost:.3f}", *shares])
    return markdown([*heading, "of the day", "GPU hours lost with a driver"], rows)


def groups_of(assumed: Assumptions, seed: int = 0) -> list[float]:
    """Seconds of audio of each group of an archive, in the order of work."""
    draw = random.Random(seed)
    # The mean of a log-normal distribution is exp(mu + spread² / 2).
    mu = math.log(assumed.recording_seconds) - assumed.spread**2 / 2
    count = round(assumed.archive_hours * 3_600 / assumed.recording_seconds)
    lengths = sorted((draw.lognormvariate(mu, assumed.spread) for _ in range(count)), reverse=True)
    groups, length, files = [], 0.0, 0
    for each in lengths:
        length, files = length + each, files + 1
        if length >= assumed.group_hours * 3_600 or files == 64:
            groups.append(length)
            length, files = 0.0, 0
    return [*groups, length] if files else groups


@dataclass(frozen=True)
class Simulated:
    """The result of a run.

    Args:
        seconds: from the start of the workers to the last row.
        failures: of workers.
        useful: the share of the GPUs' time that went into results.
    """

    seconds: float
    failures: int
    useful: float


def simulate(
    groups: list[float], gpus: int, rate: float, assumed: Assumptions, seed: int = 0
) -> Simulated:
    """Simulate workers that take groups one after another; a GPU fails with its whole machine."""
    draw = random.Random(seed)
    each_second = assumed.gpus_per_machine / (assumed.hours_between_failures * 3_600)
    free = [assumed.start_seconds] * gpus  # time at which each worker is free
    waiting = groups[::-1]
    failed, end = 0, 0.0
    while waiting:
        group = waiting.pop()
        begun = heapq.heappop(free)
        takes, lives = group / rate, draw.expovariate(each_second)
        if lives < takes:
            failed += 1
            waiting.append(group)
            heapq.heappush(free, begun + lives + assumed.start_seconds)
        else:
            end = max(end, begun + takes)
            heapq.heappush(free, begun + takes)
    return Simulated(end, failed, sum(groups) / rate / (gpus * end))


def times(measured: Measured, assumed: Assumptions) -> str:
    """A table of the simulated hours of a whole archive, by model and GPUs."""
    groups = groups_of(assumed)

    def cell(gpus: int, rate: float) -> str:
        run = simulate(groups, gpus, rate, assumed)
        hours = run.seconds / 3_600
        took = f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.1f} min"
        return f"{took}, {run.useful:.0%} of it useful"

    heading = [f"{gpus:,} GPU{'s' if gpus > 1 else ''}" for gpus in SIMULATED]
    heading = [f"{assumed.archive_hours:,.0f} h with", *heading]
    rows = [[m, *(cell(gpus, rate) for gpus in SIMULATED)] for m, rate in measured.gpu.items()]
    return markdown(heading, rows)


def scale_tables(measured: Measured, assumed: Assumptions) -> str:
    """The tables of docs/scale.md."""
    hours = f"{assumed.hours_between_failures:,.0f} hours (assumed)"
    sources = (
        f"GPU: benchmarks/results/{THROUGHPUT}, the largest batch.\n"
        f"A core decodes {assumed.codec} {measured.core:,.0f} x real time (front-end.json); one "
        f"driver writes {measured.rows:,.0f} rows/s,\n{measured.row_bytes:.0f} bytes per second of "
        f"speech (archive-rows-cpu.json). A GPU fails once in {hours}."
    )
    parts = (make(measured, assumed) for make in (demand, failures, times))
    return "\n\n".join([sources, *parts])


def scale(write: Write = False) -> None:
    """Print the tables of docs/scale.md, or put them in their place."""
    assumed = Assumptions()
    print_or_write(scale_tables(read_measured(assumed), assumed), SCALE_PAGE, "scale", write)


app = app_of(__doc__, readme, scale)

if __name__ == "__main__":
    app()
