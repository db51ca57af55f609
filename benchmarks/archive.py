"""Measure `whisper-flash batch`: the same rows on both engines, files per second, memory.

    python benchmarks/archive.py --output benchmarks/results/archive-cpu.json
    python benchmarks/archive.py --audio recordings --rounds 0 \\
        --output benchmarks/results/archive-rows-cpu.json

Same rows, if there are recordings: a real model on them by the engines `local` and `ray` (two
workers); apart from the seconds that they took, rows must be equal. Overhead: copies of a clip of
1 s go through all stages with a transcriber that does nothing; files per second of whole runs, the
start of Ray's workers included, and beyond the start (`beyond_start`: how many more files in how
much more time the largest count took than the smallest, in their quickest runs). Memory: the most
that the run's process had, and that it and all that it started had together, in which memory that
they share counts for each. Writing: rows per second of one driver, alone, of speech's size.
Every run is in a process of its own; its Ray cluster has two cores and ends with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.transcribe.results import Segment, Transcription

CORES = 2
MB = 1e6


@dataclass(frozen=True)
class DoNothing:
    """Opens a transcriber that says nothing, at once."""

    source: str = "nothing"
    languages: tuple[str, ...] = ("en",)

    def open(self) -> DoNothing:
        return self

    def transcribe_many(self, recordings: Sequence[Any], **options: Any) -> list[Transcription]:
        segment = Segment(0.0, 0.5, "nothing", (50_364, 50_257))
        return [
            Transcription("nothing", "en", (segment,), len(samples) / SAMPLING_RATE)
            for samples in recordings
        ]


def make_copies(folder: Path, count: int) -> Path:
    """`count` files of 1 s of noise, all of them the same, in folders of 1,000."""
    import wave

    clip = folder / "clip.wav"
    with wave.open(str(clip), "wb") as file:
        file.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))
        file.writeframes(
            np.random.default_rng(0).integers(-9_000, 9_000, SAMPLING_RATE, np.int16).tobytes()
        )
    copies = folder / f"{count}"
    for number in range(count):
        place = copies / f"{number // 1_000:03d}" / f"{number:06d}.wav"
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(clip, place)
    return copies


class Watch:
    """The most memory that this process, and all that it started, had: sampled while it runs.

    Attributes:
        own: MB of this process.
        together: MB of all of them.
    """

    def __init__(self) -> None:
        self.own = self.together = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            sizes = {pid: _resident(pid) for pid in _family(os.getpid())}
            self.own = max(self.own, sizes[os.getpid()])
            self.together = max(self.together, sum(sizes.values()))


def _family(root: int) -> set[int]:
    """The process and everything that it started, by Linux's /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended
            parents[int(entry.name)] = int(fields[1])
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return family


def _resident(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def run_once(settings: dict[str, Any], connection: Any) -> None:
    """One run, in this process; what it came to goes through the connection."""
    from whisper_flash_attention.batch import Model, run_batch

    if settings["engine"] == "ray":
        import logging

        import ray

        # Workers know nothing of this script.
        ray.cloudpickle.register_pickle_by_value(sys.modules[DoNothing.__module__])
        ray.init(
            num_cpus=settings.pop("cores", CORES),
            include_dashboard=False,
            logging_level=logging.ERROR,
        )
    model, threads = settings.pop("model"), settings.pop("threads", None)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    started = time.monotonic()
    with Watch() as watch:
        summary = run_batch(model=Model(model) if model else DoNothing(), **settings)
    took = time.monotonic() - started
    connection.send(
        {
            "engine": settings["engine"],
            "files": summary.done,
            "failed": summary.failed,
            "seconds": took,
            "files_per_second": summary.done / took,
            "memory_mb": watch.own,
            "memory_together_mb": watch.together,
        }
    )


def in_a_process(**settings: Any) -> dict[str, Any]:
    """`run_once` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_once, args=(settings, there))
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    finally:
        process.join()
    return found


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run by id."""
    from whisper_flash_attention.batch.shards import read_shard, shards_in

    return {row["id"]: row for shard in shards_in(folder) for row in read_shard(shard)}


def compare(folder: Path, audio: Path, model: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How many rows of both engines are equal for a folder; and the rows of `local`."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    runs = []
    for engine, workers in (("local", None), ("ray", CORES)):
        place = folder / engine
        options: dict[str, Any] = {"source": str(audio), "output": str(place), "engine": engine}
        # The same groups on both, and the threads of Ray's workers: what else is in a batch, and by
        # how many threads numbers are added up, changes last digits, and what is drawn.
        options |= {"group_files": 1, "threads": 1}
        runs.append(in_a_process(**options, model=model, workers=workers))
        rows[engine] = read_rows(place)
    names = sorted(rows["local"].keys() | rows["ray"].keys())
    times = {"seconds_taken": None}
    different = [
        name
        for name in names
        if rows["local"].get(name, {}) | times != rows["ray"].get(name, {}) | times
    ]
    found = {
        "model": model,
        "recordings": len(names),
        "equal": len(names) - len(different),
        "different": different,
        "runs": runs,
    }
    return found, list(rows["local"].values())


def measure_writing(
    folder: Path, rows: list[dict[str, Any]], count: int = 20_000
) -> dict[str, Any]:
    """Rows per second that a driver takes off JSON, and writes; the size of rows of real speech."""
    from whisper_flash_attention.batch.results import Finished
    from whisper_flash_attention.batch.sink import Sink

    good = [row for row in rows if row["error"] is None]
    lines = [json.dumps(row) for row in good]
    folder.mkdir()
    sink = Sink(folder, Finished())
    started = time.monotonic()
    for number in range(count):
        sink.take([json.loads(lines[number % len(lines)]) | {"id": str(number)}])
    sink.flush()
    took = time.monotonic() - started
    size = sum(path.stat().st_size for path in folder.iterdir())
    audio = sum(good[number % len(good)]["seconds"] for number in range(count))
    return {
        "rows_per_second": count / took,
        "bytes_per_row": size / count,
        "bytes_per_audio_second": size / audio,
    }


def beyond_start(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Files per second of each engine, from the quickest runs of the smallest and largest count."""
    found = {}
    for engine in dict.fromkeys(run["engine"] for run in runs):
        quickest: dict[int, float] = {}
        for run in runs:
            if run["engine"] == engine:
                took = quickest.get(run["files"], run["seconds"])
                quickest[run["files"]] = min(took, run["seconds"])
        few, many = min(quickest), max(quickest)
        if many > few:
            found[engine] = (many - few) / (quickest[many] - quickest[few])
    return found


def show(document: dict[str, Any], console: Console) -> None:
    """Print what was measured of the overhead."""
    table = Table("engine", "files", "files/s", "MB", "MB, together", "load of the machine")
    for row in document["overhead"]:
        numbers = (row["files_per_second"], row["memory_mb"], row["memory_together_mb"])
        table.add_row(
            row["engine"], str(row["files"]), *(f"{n:.0f}" for n in numbers), f"{row['load']:.1f}"
        )
    console.print(table)
    for engine, rate in document["beyond_start"].items():
        console.print(f"{engine}: {rate:.0f} files/s beyond the start")


def main(
    audio: Annotated[Path | None, typer.Option(help="Folder of recordings to compare.")] = None,
    model: Annotated[str, typer.Option(help="To compare with.")] = "package:tiny.en",
    counts: Annotated[list[int] | None, typer.Option(help="Copies; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Of each count and engine.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit, instead of git's word.")] = None,
) -> None:
    """Compare the engines, and measure what they add to a transcriber."""
    console = Console()
    document: dict[str, Any] = {"environment": describe_environment("cpu", commit).as_json()}
    folder = Path(tempfile.mkdtemp(prefix="archive-"))
    try:
        if audio is not None:
            equal, rows = compare(folder, audio, model)
            document["same_rows"] = equal
            console.print(f"{equal['equal']} of {equal['recordings']} rows are equal")
            document["writing"] = measure_writing(folder / "writing", rows)
        document["overhead"] = []
        for count in (counts or [2_000, 20_000]) if rounds else []:
            copies = make_copies(folder, count)
            for number in range(rounds):
                for engine in ("local", "ray"):
                    place = folder / f"{engine}-{count}-{number}"
                    options = {"source": str(copies), "output": str(place), "engine": engine}
                    row = in_a_process(**options, model=None, workers=None)
                    document["overhead"].append(row | {"load": os.getloadavg()[0]})
        document["beyond_start"] = beyond_start(document["overhead"])
        show(document, console)
    finally:
        shutil.rmtree(folder)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
