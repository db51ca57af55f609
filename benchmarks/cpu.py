"""Time whole `generate` calls on a CPU: stock Transformers and this package, turn by turn.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json

Each system lives in a process of its own, for its peak of memory; the two take turns, so that
whatever else the machine does meets both. Float32, real weights, one recording, cut or padded with
silence to ten seconds; what is timed goes from log-mel features to token ids.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.audio.load import SAMPLING_RATE, load_audio
from whisper_flash_attention.audio.recordings import bundled_recordings
from whisper_flash_attention.benchmark.environment import describe_environment

OURS = "ours"
STOCK = ("eager", "sdpa")


@dataclass(frozen=True)
class Comparison:
    """One model: seconds per call in the order of the turns, peaks of resident memory in MiB.

    `loaded` is the peak when the model was loaded, `peak` that at the end.
    """

    model: str
    system: str
    stock_seconds: list[float]
    our_seconds: list[float]
    stock_loaded_mib: float
    our_loaded_mib: float
    stock_peak_mib: float
    our_peak_mib: float
    tokens: int
    ids_equal: bool

    @property
    def ratio_of_medians(self) -> float:
        """Our median time over stock's."""
        return statistics.median(self.our_seconds) / statistics.median(self.stock_seconds)

    @property
    def median_of_ratios(self) -> float:
        """The median, over the pairs of turns, of our time over stock's."""
        pairs = zip(self.our_seconds, self.stock_seconds, strict=True)
        return statistics.median(ours / stock for ours, stock in pairs)

    def as_json(self) -> dict[str, Any]:
        """Fields and both ratios."""
        ratios = {
            "ratio_of_medians": self.ratio_of_medians,
            "median_of_ratios": self.median_of_ratios,
        }
        return asdict(self) | ratios


def read_samples(recording: Path | None, seconds: float) -> np.ndarray:
    """Float32 samples of exactly `seconds`: the recording, or the bundled ones one after another.

    Longer ones are cut, shorter ones get silence at the end.
    """
    paths = [recording] if recording else [clip.path for clip in bundled_recordings()]
    wanted = round(seconds * SAMPLING_RATE)
    samples = np.concatenate([load_audio(path) for path in paths])[:wanted]
    return np.pad(samples, (0, wanted - samples.size))


def load_model(source: str, system: str) -> Any:
    """Float32 model of `system`: "ours", or stock with that attention."""
    from transformers import WhisperForConditionalGeneration

    from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
    from whisper_flash_attention.weights import read_checkpoint

    options: dict[str, Any] = {"dtype": torch.float32}
    model: Any
    if system == OURS:
        model = WhisperFlashAttentionForConditionalGeneration.from_pretrained(source, **options)
        return model.eval()
    checkpoint = read_checkpoint(source)
    options["attn_implementation"] = system
    if checkpoint is None:
        model = WhisperForConditionalGeneration.from_pretrained(source, **options)
    else:
        options |= {"config": checkpoint.config, "state_dict": checkpoint.state_dict}
        model = WhisperForConditionalGeneration.from_pretrained(None, **options)
        model.generation_config = checkpoint.generation_config
    return model.eval()


def peak_mib() -> float:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def work(
    connection: Connection, source: str, system: str, features: np.ndarray, threads: int
) -> None:
    """In a process of its own: load, then one call for every message that is true."""
    torch.set_num_threads(threads)
    model = load_model(source, system)
    inputs = torch.from_numpy(features)
    connection.send(peak_mib())
    while connection.recv():
        start = time.perf_counter()
        ids = model.generate(inputs)
        seconds = time.perf_counter() - start
        connection.send((seconds, ids[0].tolist()))
    connection.send(peak_mib())


class Worker:
    """A system in its process."""

    def __init__(self, source: str, system: str, features: np.ndarray, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, source, system, features, threads)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.loaded_mib: float = self.connection.recv()

    def call(self) -> tuple[float, list[int]]:
        """Generate once: seconds and ids."""
        self.connection.send(True)
        seconds, ids = self.connection.recv()
        return seconds, ids

    def stop(self) -> float:
        """End the process; its peak of resident memory in MiB."""
        self.connection.send(False)
        peak: float = self.connection.recv()
        self.process.join()
        return peak


def compare(
    source: str, system: str, samples: np.ndarray, threads: int, pairs: int, warm_up: int = 2
) -> Comparison:
    """Measure stock with attention `system` and ours in turns, after `warm_up` pairs of calls."""
    from whisper_flash_attention.weights import load_processor

    processor = load_processor(source)
    inputs = processor(samples, sampling_rate=SAMPLING_RATE, return_tensors="np")
    features = inputs.input_features
    stock, ours = (Worker(source, name, features, threads) for name in (system, OURS))
    turns = [(stock.call(), ours.call()) for _ in range(warm_up + pairs)]
    equal = all(theirs == found for (_, theirs), (_, found) in turns)
    timed = turns[warm_up:]
    return Comparison(
        model=source,
        system=system,
        stock_seconds=[seconds for (seconds, _), _ in timed],
        our_seconds=[seconds for _, (seconds, _) in timed],
        stock_loaded_mib=stock.loaded_mib,
        our_loaded_mib=ours.loaded_mib,
        stock_peak_mib=stock.stop(),
        our_peak_mib=ours.stop(),
        tokens=len(turns[0][0][1]),
        ids_equal=equal,
    )


def show(comparisons: list[Comparison]) -> None:
    """Print one line per comparison."""
    names = ("model", "stock, s", "ours, s", "ours/stock", "by pairs", "stock MiB", "ours MiB")
    table = Table(*names, "tokens", "ids", title="whole generate, medians, CPU, float32")
    for row in comparisons:
        table.add_row(
            f"{row.model} ({row.system})",
            f"{statistics.median(row.stock_seconds):.3f}",
            f"{statistics.median(row.our_seconds):.3f}",
            f"{row.ratio_of_medians:.2f}",
            f"{row.median_of_ratios:.2f}",
            f"{row.stock_peak_mib:.0f}",
            f"{row.our_peak_mib:.0f}",
            str(row.tokens),
            "equal" if row.ids_equal else "DIFFER",
        )
    Console(width=130).print(table)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Stock's attention; repeatable.")] = None,
    recording: Annotated[Path | None, typer.Option(help="Default: the bundled speech.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=30)] = 10.0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    pairs: Annotated[int, typer.Option(min=1)] = 7,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare this package with stock Transformers on a CPU."""
    systems = system or ["eager"]
    if unknown := [name for name in systems if name not in STOCK]:
        raise typer.BadParameter(f"system {unknown[0]!r}; possible: {', '.join(STOCK)}")
    samples = read_samples(recording, seconds)
    comparisons = [
        compare(source, name, samples, threads, pairs)
        for source in model or ["package:tiny.en", "package:base"]
        for name in systems
    ]
    show(comparisons)
    if output:
        torch.set_num_threads(threads)
        document = {
            "environment": describe_environment("cpu", commit).as_json(),
            "dtype": "float32",
            "recording": recording.name if recording else "bundled",
            "seconds": seconds,
            "rows": [row.as_json() for row in comparisons],
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
