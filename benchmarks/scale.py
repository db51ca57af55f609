"""What an archive on many GPUs needs, from measured figures: the tables of docs/scale.md.

    python benchmarks/scale.py            # print them
    python benchmarks/scale.py --write    # put them into docs/scale.md, between its marks

Measured, from benchmarks/results: how fast a GPU is (throughput-h100.json if it is there, else the
benchmark's large setting), how fast a core decodes (front-end.json), how fast one driver writes
(archive-rows-cpu.json). Assumed, as `Assumptions` has it: the archive, its format, failures. The
time of a whole archive is simulated: workers take groups, longest recordings first, fail now and
then, and a group that was lost is done again.
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"

GPUS = 1_000
SIMULATED = (1, 8, 64, GPUS)
# The checkpoints of the benchmark with all their decoder layers.
WHOLE_CHECKPOINTS = {"tiny": 4, "base": 6, "small": 12, "medium": 24}
SAMPLE_BYTES = 16_000 * 4  # of a second of decoded audio


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here.

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
    """What is.

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
    """Times faster than real time by model, and the file that says so."""
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


def needs(measured: Measured, assumed: Assumptions) -> list[str]:
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
    """What a run came to.

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


def tables(measured: Measured, assumed: Assumptions) -> str:
    """All that docs/scale.md has between its marks."""
    hours = f"{assumed.hours_between_failures:,.0f} hours (assumed)"
    told = (
        f"GPU: benchmarks/results/{measured.source}.\n"
        f"A core decodes {assumed.codec} {measured.core:,.0f} x real time (front-end.json); one "
        f"driver writes {measured.rows:,.0f} rows/s,\n{measured.row_bytes:.0f} bytes per second of "
        f"speech (archive-rows-cpu.json). A GPU fails once in {hours}."
    )
    parts = (needs(measured, assumed), failures(measured, assumed), times(measured, assumed))
    return "\n\n".join([told, *("\n".join(lines) for lines in parts)])


def between_marks(text: str) -> str:
    """What stands between the page's marks."""
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def main(
    write: Annotated[bool, typer.Option("--write", help="Renew docs/scale.md.")] = False,
) -> None:
    """Print the tables, or put them into docs/scale.md."""
    assumed = Assumptions()
    made = tables(read_measured(assumed), assumed)
    if not write:
        typer.echo(made)
        return
    text: Any = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    typer.run(main)
