"""The tables of pages, from committed results.

    python benchmarks/tables.py readme            # print the README's table
    python benchmarks/tables.py readme --write    # put it into README.md, between its two marks
    python benchmarks/tables.py scale             # print the tables of docs/scale.md
    python benchmarks/tables.py scale --write     # put them into docs/scale.md

`readme`: our results beside the figures that the predecessor published. `scale`: what an archive on
many GPUs needs. Measured, from benchmarks/results: speed of a GPU (throughput-h100.json if it is
there, else the benchmark's large setting), of a core that decodes (front-end.json), of one driver
that writes (archive-rows-cpu.json). Assumed, by `Assumptions`: the archive, its format, failures.
The time of a whole archive is simulated: workers take groups, longest recordings first, fail now
and then, and a group that was lost is done again.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from _harness import app_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, SCALE_PAGE = ROOT / "README.md", ROOT / "docs" / "scale.md"

Write = Annotated[bool, typer.Option("--write", help="Put the tables into their page.")]


def between_marks(text: str, name: str) -> str:
    """What a page has between the marks of this name."""
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


# --- the README ----------------------------------------------------------------------------------

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

Results = dict[tuple[str, str, int, str], dict[str, Any]]


def read_results(path: Path = RESULTS / "h100" / "results.json") -> Results:
    """Rows that were measured, by (setting, checkpoint, decoder layers, system)."""
    rows = json.loads(path.read_text())["rows"]
    return {
        (row["setting"], row["checkpoint"], row["decoder_layers"], row["system"]): row
        for row in rows
        if row["status"] == "ok"
    }


def readme_table(measured: Results) -> str:
    """Both settings in Markdown; what was not measured shows a dash."""
    return "\n\n".join(_setting_table(measured, setting) for setting in BATCHES)


def _setting_table(measured: Results, setting: str) -> str:
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


def readme(write: Write = False) -> None:
    """Print the README's table of results, or put it in its place."""
    print_or_write(readme_table(read_results()), README, "results", write)


# --- docs/scale.md -------------------------------------------------------------------------------

GPUS = 1_000
SIMULATED = (1, 8, 64, GPUS)
# The checkpoints of the benchmark with all their decoder layers.
WHOLE_CHECKPOINTS = {"tiny": 4, "base": 6, "small": 12, "medium": 24}
SAMPLE_BYTES = 16_000 * 4  # of a second of decoded audio


@dataclass(frozen=True)
class Assumptions:
    """What is assumed.

    Args:
        archive_hours: of the archive.
        recording_seconds: mean length; lengths are distributed log-normally.
        spread: standard deviation of the lengths' logarithm.
        bytes_per_second: of the recordings' format: mp3 at 128 kbit/s.
        codec: the row of front-end.json.
        group_hours: of `whisper-flash batch`.
        start_seconds: from a worker's start to its first group.
        hours_between_failures: of one GPU. 419 unexpected interruptions in 54 days on 16,384 H100s
            (The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.4) are one in 50,700 hours.
        gpus_per_machine: which fail together.
        shard_seconds: of rows that a driver holds before it writes them.
        driver_seconds: until a driver that died is there again.
    """

    archive_hours: float = 100_000.0
    recording_seconds: float = 600.0
    spread: float = 1.0
    bytes_per_second: float = 16_000.0
    codec: str = "mp3"
    group_hours: float = 4.0
    start_seconds: float = 60.0
    hours_between_failures: float = 16_384 * 54 * 24 / 419
    gpus_per_machine: int = 8
    shard_seconds: float = 30.0
    driver_seconds: float = 300.0


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Args:
        gpu: times faster than real time, by model.
        source: of these.
        core: times faster than real time that a core decodes.
        rows: per second that one driver writes.
        row_bytes: of results per second of audio.
    """

    gpu: dict[str, float]
    source: str
    core: float
    rows: float
    row_bytes: float


def read_measured(assumed: Assumptions, folder: Path = RESULTS) -> Measured:
    """Read the committed results."""
    decoding = json.loads((folder / "front-end.json").read_text())["decoding"]
    (core,) = (row["times_real"] for row in decoding if row["format"] == assumed.codec)
    writing = json.loads((folder / "archive-rows-cpu.json").read_text())["writing"]
    gpu, source = gpu_rates(folder)
    rate, size = writing["rows_per_second"], writing["bytes_per_audio_second"]
    return Measured(gpu, source, core, rate, size)


def gpu_rates(folder: Path) -> tuple[dict[str, float], str]:
    """Times faster than real time by model, and the file that they come from."""
    path = folder / "throughput-h100.json"
    if path.is_file():
        best: dict[str, tuple[int, float]] = {}
        for row in json.loads(path.read_text())["rows"]:
            if row["status"] == "ok" and row["system"] == "flash" and not row["word_timestamps"]:
                found = (row["batch_size"], row["realtime_factor"])
                best[row["checkpoint"]] = max(found, best.get(row["checkpoint"], (0, 0.0)))
        return {name: best[name][1] for name in sorted(best, key=lambda name: -best[name][1])}, (
            f"{path.name}, the largest batch"
        )
    path = folder / "h100" / "results.json"
    rates = {}
    for row in json.loads(path.read_text())["rows"]:
        layers = WHOLE_CHECKPOINTS.get(row["checkpoint"])
        if (row["setting"], row["system"], row["decoder_layers"]) == ("large", "flash", layers):
            rates[row["checkpoint"]] = 30.0 * row["batch_size"] / row["seconds_per_batch"]
    return rates, f"{path.parent.name}/{path.name}, setting large"


def demand(measured: Measured, assumed: Assumptions) -> list[str]:
    """A table: what `GPUS` need while all of them are busy, by model."""
    lines = [
        f"| {GPUS:,} GPUs with | audio, h/s | files/s | of one driver's rows/s | "
        "cores that decode, per GPU | from storage, GB/s | decoded, GB/s | results, MB/s | "
        f"{assumed.archive_hours:,.0f} h at full speed |",
        "| --- " * 9 + "|",
    ]
    for model, rate in measured.gpu.items():
        audio = GPUS * rate  # seconds of audio per second
        files = audio / assumed.recording_seconds
        cells = (
            f"{model}, {rate:,.0f} x real time",
            f"{audio / 3_600:,.0f}",
            f"{files:,.0f}",
            f"{files / measured.rows:.0%}",
            f"{rate / measured.core:.1f}",
            f"{audio * assumed.bytes_per_second / 1e9:.1f}",
            f"{audio * SAMPLE_BYTES / 1e9:.0f}",
            f"{audio * measured.row_bytes / 1e6:,.0f}",
            f"{assumed.archive_hours * 60 / audio:.1f} min",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def failures(measured: Measured, assumed: Assumptions) -> list[str]:
    """A table: what failures cost `GPUS` in a day, by model."""
    a_day = GPUS * 24 / assumed.hours_between_failures
    lines = [
        f"| a day of {GPUS:,} GPUs | failures | a group takes, s | GPU hours lost by them | "
        "of the day | GPU hours lost with a driver |",
        "| --- " * 6 + "|",
    ]
    for model, rate in measured.gpu.items():
        group = assumed.group_hours * 3_600 / rate
        # On the average half a group is lost, on every GPU of the machine.
        lost = a_day * assumed.gpus_per_machine * (group / 2 + assumed.start_seconds) / 3_600
        # All groups in work, the rows that wait, and the time until all goes on.
        waited = group / 2 + assumed.shard_seconds + assumed.driver_seconds + assumed.start_seconds
        cells = (
            model,
            f"{a_day:.2f}",
            f"{group:.1f}",
            f"{lost:.3f}",
            f"{lost / (GPUS * 24):.6%}",
            f"{GPUS * waited / 3_600:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
    """Let workers take groups, one after another; a GPU that fails takes its machine along."""
    draw = random.Random(seed)
    each_second = assumed.gpus_per_machine / (assumed.hours_between_failures * 3_600)
    free = [assumed.start_seconds] * gpus  # when each worker is
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


def times(measured: Measured, assumed: Assumptions) -> list[str]:
    """A table: hours of a whole archive on few and many GPUs, simulated, by model."""
    groups = groups_of(assumed)
    heads = [f"{gpus:,} GPU{'s' if gpus > 1 else ''}" for gpus in SIMULATED]
    lines = [f"| {assumed.archive_hours:,.0f} h with | {' | '.join(heads)} |"]
    lines.append("| --- " * (len(heads) + 1) + "|")
    for model, rate in measured.gpu.items():
        cells = []
        for gpus in SIMULATED:
            run = simulate(groups, gpus, rate, assumed)
            took = (
                f"{run.seconds / 3_600:.1f} h"
                if run.seconds >= 7_200
                else f"{run.seconds / 60:.1f} min"
            )
            cells.append(f"{took}, {run.useful:.0%} of it useful")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def scale_tables(measured: Measured, assumed: Assumptions) -> str:
    """All that docs/scale.md has between its marks."""
    hours = f"{assumed.hours_between_failures:,.0f} hours (assumed)"
    sources = (
        f"GPU: benchmarks/results/{measured.source}.\n"
        f"A core decodes {assumed.codec} {measured.core:,.0f} x real time (front-end.json); one "
        f"driver writes {measured.rows:,.0f} rows/s,\n{measured.row_bytes:.0f} bytes per second of "
        f"speech (archive-rows-cpu.json). A GPU fails once in {hours}."
    )
    parts = (demand(measured, assumed), failures(measured, assumed), times(measured, assumed))
    return "\n\n".join([sources, *("\n".join(lines) for lines in parts)])


def scale(write: Write = False) -> None:
    """Print the tables of docs/scale.md, or put them in their place."""
    assumed = Assumptions()
    print_or_write(scale_tables(read_measured(assumed), assumed), SCALE_PAGE, "scale", write)


app = app_of(__doc__, readme, scale)

if __name__ == "__main__":
    app()
