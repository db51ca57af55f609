"""Compare this package with faster-whisper, from recordings on disk to text, in turns.

    pip install faster-whisper
    python benchmarks/peers.py --model package:tiny.en --model package:base \\
        --output benchmarks/results/peers-cpu.json two_cities.flac columbia.flac
    python benchmarks/peers.py --model package:base --join 300 --system ours-int8-batched \\
        --system faster-whisper-int8-batched recordings/

Every system is a process of its own, which loads a model once; then the systems transcribe one
recording after the other, in turns, so that whatever else the machine does affects all of them. The
clock runs from the path to the whole text. All decode greedily, in the recording's language, with
their own defaults otherwise: thresholds, fallback to higher temperatures, context of the previous
text, and in batched mode eight chunks at a time with a voice activity detector. Weights are the
same: faster-whisper loads the folder that this package reads.

A folder's `index.json`, if it has one, is a list of objects with `file`, `language` and
`transcript`; elsewhere a transcript is in a `.txt` file beside the recording. Word error rates are
over recordings with transcripts; words in recordings whose transcript is known to be empty are
invented. `--join` adds a recording of all that are given, cut to that length in seconds.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Protocol

import av
import numpy as np
import torch
import typer
from _faster_whisper import ctranslate2_folder
from _harness import Commit, Output, Threads, app_of, one_of, print_rows, write_json
from _spoken import Spoken, find_spoken, normalised, word_errors

from whisper_flash_attention.audio import SAMPLING_RATE, load_audio
from whisper_flash_attention.benchmark.environment import package_version
from whisper_flash_attention.benchmark.measure import peak_rss

BATCH_SIZE = 8


@dataclass(frozen=True)
class System:
    """A package, the type it computes in, and how it goes through a recording."""

    package: str
    dtype: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.package}-{self.dtype}-{self.mode}"

    @property
    def batch_size(self) -> int:
        return BATCH_SIZE if self.mode == "batched" else 1


OURS, FASTER_WHISPER = "ours", "faster-whisper"
DISTRIBUTIONS = {OURS: "whisper-flash-attention", FASTER_WHISPER: "faster-whisper"}
SYSTEMS = {
    system.name: system
    for dtype in ("float32", "int8")
    for mode in ("sequential", "batched")
    for package in (OURS, FASTER_WHISPER)
    for system in (System(package, dtype, mode),)
}


class Transcribe(Protocol):
    """A loaded system: the text of a recording."""

    def __call__(self, path: str, language: str | None) -> str: ...


def load_ours(system: System, model: str, threads: int) -> tuple[Transcribe, dict[str, Any]]:
    """This package's transcriber."""
    from whisper_flash_attention.transcribe import Transcriber

    torch.set_num_threads(threads)
    transcriber = Transcriber.from_pretrained(model, device="cpu", compute_type=system.dtype)
    settings = {"mode": system.mode, "beam_size": 1}

    def transcribe(path: str, language: str | None) -> str:
        found = transcriber.transcribe(
            path, language=language, batch_size=system.batch_size, **settings
        )
        return found.text

    return transcribe, settings | {"threads": threads}


def load_faster_whisper(
    system: System, model: str, threads: int
) -> tuple[Transcribe, dict[str, Any]]:
    """faster-whisper's model, and its pipeline for batches."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    loaded = WhisperModel(model, device="cpu", compute_type=system.dtype, cpu_threads=threads)
    settings: dict[str, Any] = {"beam_size": 1}
    runner: Any = loaded
    if system.mode == "batched":
        runner = BatchedInferencePipeline(loaded)
        settings |= {"batch_size": system.batch_size}

    def transcribe(path: str, language: str | None) -> str:
        segments, _ = runner.transcribe(path, language=language, **settings)
        return "".join(segment.text for segment in segments)

    return transcribe, settings | {"cpu_threads": threads}


LOADERS = {OURS: load_ours, FASTER_WHISPER: load_faster_whisper}


def serve_calls(connection: Connection, system: System, model: str, threads: int) -> None:
    """In a process of its own: load, then a recording for every message."""
    start = time.perf_counter()
    transcribe, settings = LOADERS[system.package](system, model, threads)
    connection.send((settings, time.perf_counter() - start))
    while message := connection.recv():
        start = time.perf_counter()
        text = transcribe(*message)
        connection.send((time.perf_counter() - start, text, peak_rss()))


class Worker:
    """A system in its process."""

    def __init__(self, system: System, model: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.system = system
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_calls, args=(theirs, system, model, threads), daemon=True
        )
        self._process.start()
        theirs.close()
        self.settings, self.load_seconds = self._connection.recv()

    def call(self, path: Path, language: str | None) -> tuple[float, str, float]:
        """Seconds, the text, and the process's peak of memory in units of 1e9 bytes so far."""
        self._connection.send((str(path), language))
        found: tuple[float, str, float] = self._connection.recv()
        return found

    def stop(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()


def join_recordings(spoken: Sequence[Spoken], seconds: float, path: Path) -> Spoken:
    """Write recordings one after the other as FLAC, repeated or cut to `seconds`; no transcript."""
    samples = np.concatenate([load_audio(each.path) for each in spoken])
    samples = np.resize(samples, round(seconds * SAMPLING_RATE))
    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLING_RATE, layout="mono", format="s16")
        whole = (samples * 32767).clip(-32768, 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(whole, format="s16", layout="mono")
        frame.sample_rate = SAMPLING_RATE
        # The encoder takes frames of one size.
        resampler = av.AudioResampler("s16", "mono", SAMPLING_RATE, frame_size=4096)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return Spoken(path, spoken[0].language, None)


def measure_recording(
    spoken: Spoken, workers: Sequence[Worker], model: str, rounds: int
) -> list[dict[str, Any]]:
    """Rows of all systems for one recording, after a call of each that is not timed."""
    language = None if spoken.language == "none" else spoken.language
    for worker in workers:
        worker.call(spoken.path, language)
    turns = [[worker.call(spoken.path, language) for worker in workers] for _ in range(rounds)]
    audio_seconds = load_audio(spoken.path).size / SAMPLING_RATE
    rows = []
    for worker, calls in zip(workers, zip(*turns, strict=True), strict=True):
        seconds = [took for took, _, _ in calls]
        text = calls[-1][1]
        errors = word_errors(spoken, text)
        rows.append(
            {
                "setting": "peers",
                "system": worker.system.name,
                "version": package_version(DISTRIBUTIONS[worker.system.package]),
                "checkpoint": model,
                "device": "cpu",
                "dtype": worker.system.dtype,
                "batch_size": worker.system.batch_size,
                "audio": spoken.path.name,
                "audio_seconds": audio_seconds,
                "seconds": seconds,
                "realtime_factor": audio_seconds / median(seconds),
                "peak_memory_gb": calls[-1][2],
                "wer": errors.rate,
                "invented_words": len(normalised(text).split()) if is_silent(spoken) else None,
                "load_seconds": worker.load_seconds,
                "settings": worker.settings,
                "text": text,
            }
        )
    return rows


def is_silent(spoken: Spoken) -> bool:
    """Whether a recording is known to have no words."""
    return spoken.language == "none"


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our speed relative to that of faster-whisper in the same type and mode, pair by pair."""
    found = []
    for row in rows:
        system = SYSTEMS[row["system"]]
        if system.package != OURS:
            continue
        theirs = System(FASTER_WHISPER, system.dtype, system.mode).name
        for peer in rows:
            if (peer["system"], peer["audio"]) == (theirs, row["audio"]):
                pairs = zip(peer["seconds"], row["seconds"], strict=True)
                found.append(
                    {
                        "checkpoint": row["checkpoint"],
                        "audio": row["audio"],
                        "dtype": system.dtype,
                        "mode": system.mode,
                        "median_of_ratios": median(their / our for their, our in pairs),
                    }
                )
    return found


def main(
    files: Annotated[list[str], typer.Argument(help="Recordings or folders.")],
    model: Annotated[
        list[str] | None, typer.Option(help="package:NAME or a faster-whisper folder; repeatable.")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    language: Annotated[str, typer.Option(help="Of recordings without an index.json.")] = "en",
    join: Annotated[float | None, typer.Option(min=1, help="Seconds of a joined one.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Threads = 2,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Compare with faster-whisper on a CPU, in turns."""
    names = system or list(SYSTEMS)
    one_of("system", names, SYSTEMS)
    spoken = find_spoken(files, language)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if join is not None:
            name = f"joined-{join:.0f}s.flac"
            spoken.append(join_recordings(spoken, join, Path(folder) / name))
        for number, checkpoint in enumerate(model or ("package:tiny.en", "package:base")):
            theirs = ctranslate2_folder(checkpoint, Path(folder) / str(number))
            workers = [
                Worker(each, checkpoint if each.package == OURS else theirs, threads)
                for each in (SYSTEMS[name] for name in names)
            ]
            columns: dict[str, Any] = {
                "recording": "{audio}",
                "system": "{system}",
                "x real time": "{realtime_factor:.1f}",
                "GB": "{peak_memory_gb:.2f}",
                "WER": "{wer:.3f}",
                "invented": "{invented_words}",
            }
            for each in spoken:
                found = measure_recording(each, workers, checkpoint, rounds)
                print_rows(f"{checkpoint}, CPU, {threads} threads", found, columns)
                rows += found
            for worker in workers:
                worker.stop()
    pairs = [
        pair
        for each in dict.fromkeys(row["checkpoint"] for row in rows)
        for pair in ratios([row for row in rows if row["checkpoint"] == each])
    ]
    print_rows(
        "faster-whisper's time / ours",
        pairs,
        {
            "checkpoint": "{checkpoint}",
            "recording": "{audio}",
            "dtype": "{dtype}",
            "mode": "{mode}",
            "ratio": "{median_of_ratios:.2f}",
        },
    )
    torch.set_num_threads(threads)  # which the environment records
    write_json(output, "cpu", commit, {"rows": rows, "ratios": pairs})


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
