"""Measure `whisper-flash batch`: equal rows on both engines, overhead, memory, and scaling.

    python benchmarks/archive.py engines --output benchmarks/results/archive-cpu.json
    python benchmarks/archive.py engines --audio recordings --rounds 0 \\
        --output benchmarks/results/archive-rows-cpu.json
    python benchmarks/archive.py scaling --model small --workers 1 --workers 2 \\
        --output benchmarks/results/archive-scaling-h100.json

`engines`: with `--audio`, a real model transcribes the recordings with the engines `local` and
`ray` (two workers); apart from the seconds taken, rows must be equal. Overhead: copies of a clip of
1 s pass through all stages with a transcriber that does nothing; files per second of whole runs,
with the start of Ray's workers and without (`beyond_start`: additional files over additional time
between the smallest and the largest count, in their fastest runs). Memory: peaks of the run's
process, and of all processes of the run, in which shared memory counts for each. Writing: rows per
second of one driver alone, with rows as large as those of speech. Every run has its own process and
Ray cluster of two cores.

`scaling`: copies of five minutes of the bundled speech, transcribed on Ray by several numbers of
workers with a GPU each; times real time without the start of the workers (additional audio over
additional time of three times as many copies). Needs the extra ray, and a GPU per worker.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from _harness import Commit, Output, app_of, console, print_rows, write_json

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.benchmark.features import bundled_clips
from whisper_flash_attention.transcribe.results import Segment, Transcription

CORES = 2
SCALING_MINUTES = 5


@dataclass(frozen=True)
class DoNothing:
    """Opens a transcriber that returns one constant segment at once."""

    source: str = "nothing"
    languages: tuple[str, ...] = ("en",)

    def open(self) -> DoNothing:
        return self

    def transcribe_each(
        self, recordings: Iterable[Any], **options: Any
    ) -> Iterator[tuple[int, Transcription]]:
        segments = (Segment(0.0, 0.5, "nothing", (50_364, 50_257)),)
        for index, recording in enumerate(recordings):
            given = isinstance(recording, np.ndarray)
            seconds = recording.size / SAMPLING_RATE if given else recording.seconds
            yield index, Transcription("nothing", "en", segments, seconds)


def write_wave(path: Path, samples: np.ndarray) -> None:
    """Write 16-bit mono samples at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))
        file.writeframes(samples.astype(np.int16).tobytes())


def link_copies(clip: Path, folder: Path, count: int) -> Path:
    """Make `count` links to a file, in folders of 1,000, and return the folder of all."""
    copies = folder / f"{count}"
    for number in range(count):
        path = copies / f"{number // 1_000:03d}" / f"{number:06d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(clip, path)
    return copies


class PeakMemory:
    """Peaks of resident memory in MB, sampled every half second: `own`, and `together`.

    `together` is of this process and all that it started, by Linux's /proc.
    """

    def __init__(self) -> None:
        self.own = self.together = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            own, together = _resident(os.getpid())
            self.own, self.together = max(self.own, own), max(self.together, together)


def _resident(root: int) -> tuple[float, float]:
    """Resident MB of a process, and of it and everything that it started."""
    parents, sizes = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended
        # Fields 4 and 24 of proc(5); the split begins with the third.
        parents[int(entry.name)] = int(fields[1])
        sizes[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    tree = {root}
    while children := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return sizes[root], sum(sizes.get(pid, 0.0) for pid in tree)


def run_once(settings: dict[str, Any], connection: Any) -> None:
    """One run, in this process; the result goes through the connection."""
    import torch

    from whisper_flash_attention.batch import Model, run_batch

    cores = settings.pop("cores", CORES)
    model, threads = settings.pop("model"), settings.pop("threads", None)
    if settings["engine"] == "ray":
        import ray

        # Workers cannot import this script.
        ray.cloudpickle.register_pickle_by_value(sys.modules[DoNothing.__module__])
        ray.init(num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    started = time.monotonic()
    with PeakMemory() as memory:
        summary = run_batch(model=Model(model) if model else DoNothing(), **settings)
    seconds = time.monotonic() - started
    row = {"engine": settings["engine"], "files": summary.done, "failed": summary.failed}
    row |= {"seconds": seconds, "files_per_second": summary.done / seconds}
    connection.send(row | {"memory_mb": memory.own, "memory_together_mb": memory.together})


def run_in_process(**settings: Any) -> dict[str, Any]:
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


def compare_rows(
    folder: Path, audio: Path, model: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How many rows of both engines are equal for a folder; and the rows of `local`."""
    rows, runs = {}, []
    for engine, workers in (("local", None), ("ray", CORES)):
        output = folder / engine
        # The same groups on both, and the threads of Ray's workers: what else is in a batch, and by
        # how many threads sums are computed, changes last digits, and with them draws.
        options = {"source": str(audio), "output": str(output), "engine": engine, "model": model}
        runs.append(run_in_process(**options, workers=workers, group_files=1, threads=1))
        rows[engine] = read_rows(output)
    names = sorted(rows["local"].keys() | rows["ray"].keys())
    local, ray = ({n: rows[e].get(n, {}) | {"seconds_taken": None} for n in names} for e in rows)
    different = [name for name in names if local[name] != ray[name]]
    found = {"model": model, "recordings": len(names), "equal": len(names) - len(different)}
    return found | {"different": different, "runs": runs}, list(rows["local"].values())


def measure_writing(
    folder: Path, rows: list[dict[str, Any]], count: int = 20_000
) -> dict[str, Any]:
    """Rows per second that a driver parses and writes; the size of rows of real speech."""
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
    rate = count / (time.monotonic() - started)
    size = sum(path.stat().st_size for path in folder.iterdir())
    audio = sum(good[number % len(good)]["seconds"] for number in range(count))
    found = {"rows_per_second": rate, "bytes_per_row": size / count}
    return found | {"bytes_per_audio_second": size / audio}


def beyond_start(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Files per second of each engine, from the fastest runs of the smallest and largest count."""
    found = {}
    for engine in dict.fromkeys(run["engine"] for run in runs):
        fastest: dict[int, float] = {}
        for run in (run for run in runs if run["engine"] == engine):
            fastest[run["files"]] = min(fastest.get(run["files"], math.inf), run["seconds"])
        few, many = min(fastest), max(fastest)
        if many > few:
            found[engine] = (many - few) / (fastest[many] - fastest[few])
    return found


def engines(
    audio: Annotated[Path | None, typer.Option(help="Folder of recordings to compare.")] = None,
    model: Annotated[str, typer.Option(help="To compare with.")] = "package:tiny.en",
    counts: Annotated[list[int] | None, typer.Option(help="Copies; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Of each count and engine.")] = 2,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare the engines' rows, and measure what they add to a transcriber."""
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="archive-") as name:
        folder = Path(name)
        if audio is not None:
            equal, rows = compare_rows(folder, audio, model)
            document["same_rows"] = equal
            console.print(f"{equal['equal']} of {equal['recordings']} rows are equal")
            document["writing"] = measure_writing(folder / "writing", rows)
        clip = folder / "clip.wav"
        write_wave(clip, np.random.default_rng(0).integers(-9_000, 9_000, SAMPLING_RATE))
        document["overhead"] = []
        for count in (counts or [2_000, 20_000]) if rounds else []:
            copies = link_copies(clip, folder, count)
            for number in range(rounds):
                for engine in ("local", "ray"):
                    results = folder / f"{engine}-{count}-{number}"
                    options = {"source": str(copies), "output": str(results), "engine": engine}
                    row = run_in_process(**options, model=None, workers=None)
                    document["overhead"].append(row | {"load": os.getloadavg()[0]})
    document["beyond_start"] = beyond_start(document["overhead"])
    columns = {"engine": "{engine}", "files": "{files}", "files/s": "{files_per_second:.0f}"}
    columns |= {"MB": "{memory_mb:.0f}", "MB, together": "{memory_together_mb:.0f}"}
    print_rows(None, document["overhead"], columns | {"load of the machine": "{load:.1f}"})
    for engine, rate in document["beyond_start"].items():
        console.print(f"{engine}: {rate:.0f} files/s beyond the start")
    write_json(output, "cpu", commit, document)


def scaling(
    model: Annotated[str, typer.Option(help="To transcribe with.")] = "package:tiny.en",
    workers: Annotated[list[int] | None, typer.Option(help="GPUs; repeatable.")] = None,
    copies: Annotated[int, typer.Option(min=1, help="Per worker; and three times as many.")] = 64,
    group_hours: Annotated[float, typer.Option(help="Hours of audio of a group.")] = 1.0,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Measure archives of two sizes on each number of GPUs of one machine."""
    from whisper_flash_attention.batch import Cluster

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        clips = np.concatenate([clip[: 30 * SAMPLING_RATE] for clip in bundled_clips(32)[0]])
        samples = np.resize(clips, SCALING_MINUTES * 60 * SAMPLING_RATE)
        write_wave(folder / "speech.wav", samples * 32_767)
        for count in workers or [1, 2]:
            runs = []
            for number in (copies * count, 3 * copies * count):
                here = folder / f"{count}-{number}"
                source = str(link_copies(folder / "speech.wav", here, number))
                options = {"source": source, "output": str(here / "out"), "workers": count}
                options |= {"model": model, "group_hours": group_hours, "engine": "ray"}
                # No limit to the cores.
                found = run_in_process(**options, cluster=Cluster(gpus_per_worker=1), cores=None)
                assert not found["failed"]
                runs.append(found)
            files = runs[1]["files"] - runs[0]["files"]
            rate = 60 * SCALING_MINUTES * files / (runs[1]["seconds"] - runs[0]["seconds"])
            rows.append({"workers": count, "times_real": rate, "runs": runs})
            grown = rate / rows[0]["times_real"]
            than = f"{grown:.2f} x that of {rows[0]['workers']}"
            console.print(f"{count} workers: {rate:,.0f} x real time, {than}")
    write_json(output, "cuda", commit, {"model": model, "rows": rows})


app = app_of(__doc__, engines, scaling)

if __name__ == "__main__":
    app()
