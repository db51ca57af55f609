"""The tables of pages, from committed results.

    python benchmarks/tables.py readme            # print those of README.md and docs/benchmarks.md
    python benchmarks/tables.py readme --write    # put them, and charts.py's, into their places
    python benchmarks/tables.py scale             # print the tables of docs/scale.md
    python benchmarks/tables.py scale --write     # put them into docs/scale.md

`readme`: our results beside the figures that the predecessor published. `scale`: what an archive on
many GPUs needs (`_scale.py`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from _harness import app_of
from _pages import ROOT, THROUGHPUT, markdown, print_or_write, read_json
from _scale import Assumptions, read_measured, scale_tables
from charts import SYSTEM_NAMES, WHOLE, write_charts

from whisper_flash_attention.benchmark.peer_systems import SYSTEMS
from whisper_flash_attention.benchmark.peers import speed_of_ours

README, SCALE_PAGE = ROOT / "README.md", ROOT / "docs" / "scale.md"
PAGE = ROOT / "docs" / "benchmarks.md"

Write = Annotated[bool, typer.Option("--write", help="Put the tables into their page.")]


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
PEERS, PEERS_GPU, WORDS = "peers-cpu.json", "peers-h200.json", "peers-words-cpu.json"
MEMORY = "memory-h200.json"

Results = dict[tuple[str, str, int, str], dict[str, Any]]


def read_results() -> Results:
    """Measured rows of whole calls, by (setting, checkpoint, decoder layers, system)."""
    return {
        (row["setting"], row["checkpoint"], row["decoder_layers"], row["system"]): row
        for row in read_json("h200/results.json")["rows"]
        if row["status"] == "ok"
    }


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


def word_times() -> str:
    """Mean errors of words' starts and ends, of systems that have word timestamps."""
    rows = [row for row in read_json(WORDS)["rows"] if row.get("word_time_error_ms") is not None]
    lines = [
        [
            row["checkpoint"].removeprefix("package:"),
            f"{SYSTEM_NAMES[row['system']]} {row['version']}",
            row["settings"].get("word_alignment", ""),
            f"{row['word_time_error_ms']:.0f}",
            f"{row['word_time_median_ms']:.0f}",
            f"{row['aligned_words_found']} of {row['aligned_words']}",
            f"{row['word_times_seconds']:.1f}",
        ]
        for row in sorted(rows, key=lambda row: (row["checkpoint"], row["word_time_error_ms"]))
    ]
    heading = ["checkpoint", "system", "timed by", "mean error, ms", "median", "words found"]
    return markdown([*heading, "seconds for all recordings"], lines)


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
    WORDS,
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
    "word-times": (PAGE, word_times),
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


def scale(write: Write = False) -> None:
    """Print the tables of docs/scale.md, or put them in their place."""
    assumed = Assumptions()
    print_or_write(scale_tables(read_measured(assumed), assumed), SCALE_PAGE, "scale", write)


app = app_of(__doc__, readme, scale)

if __name__ == "__main__":
    app()
