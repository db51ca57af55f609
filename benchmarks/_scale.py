"""What an archive on many GPUs needs: the tables of docs/scale.md.

Measured, from benchmarks/results: speed of a GPU (throughput-h100.json), of a core that decodes
(front-end.json), of one driver that writes (archive-rows-cpu.json). Assumed, by `Assumptions`: the
archive, its format, failures. The time of a whole archive is simulated: workers take groups,
longest recordings first, fail now and then, and a lost group is done again.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from _pages import THROUGHPUT, markdown, read_json

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
