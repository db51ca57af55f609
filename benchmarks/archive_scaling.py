"""How an archive's throughput grows with the GPUs of one machine, on Ray.

    python benchmarks/archive_scaling.py --model small --workers 1 --workers 2 \\
        --output benchmarks/results/archive-scaling-h100.json

Copies of five minutes of the bundled speech are transcribed by so many workers, each with a GPU of
its own; times faster than real time beyond the start of the workers: how much more audio in how
much more time the larger number of copies took than the smaller. Needs the extra ray, and a GPU per
worker.
"""

from __future__ import annotations

import json
import os
import tempfile
import wave
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from archive import in_a_process
from rich.console import Console

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.batch import Cluster
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.features import bundled_clips

MINUTES = 5


def make_recordings(folder: Path, count: int) -> Path:
    """`count` files of `MINUTES` of speech."""
    one = folder / "speech.wav"
    if not one.exists():
        clips = np.concatenate([clip[: 30 * SAMPLING_RATE] for clip in bundled_clips(32)[0]])
        samples = np.resize(clips, MINUTES * 60 * SAMPLING_RATE)
        with wave.open(str(one), "wb") as file:
            file.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))
            file.writeframes((samples * 32_767).astype(np.int16).tobytes())
    recordings = folder / f"{count}"
    recordings.mkdir()
    for number in range(count):
        os.link(one, recordings / f"{number:06d}.wav")
    return recordings


def main(
    model: Annotated[str, typer.Option(help="To transcribe with.")] = "package:tiny.en",
    workers: Annotated[list[int] | None, typer.Option(help="GPUs; repeatable.")] = None,
    copies: Annotated[int, typer.Option(min=1, help="Per worker; and three times as many.")] = 64,
    group_hours: Annotated[float, typer.Option(help="Hours of audio of a group.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit, instead of git's word.")] = None,
) -> None:
    """Measure archives of two sizes on each number of GPUs."""
    console = Console()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        for count in workers or [1, 2]:
            runs = []
            for number in (copies * count, 3 * copies * count):
                place = folder / f"{count}-{number}"
                place.mkdir()
                found = in_a_process(
                    source=str(make_recordings(place, number)),
                    output=str(place / "out"),
                    engine="ray",
                    cluster=Cluster(gpus_per_worker=1),
                    workers=count,
                    model=model,
                    group_hours=group_hours,
                    cores=None,  # all of them
                )
                assert not found["failed"]
                runs.append(found)
            more = runs[1]["files"] - runs[0]["files"]
            rate = 60 * MINUTES * more / (runs[1]["seconds"] - runs[0]["seconds"])
            rows.append({"workers": count, "times_real": rate, "runs": runs})
            first = rows[0]
            grown = rate / first["times_real"]
            console.print(
                f"{count} workers: {rate:,.0f} x real time, {grown:.2f} x that of "
                f"{first['workers']}"
            )
    if output is not None:
        environment = describe_environment("cuda", commit).as_json()
        document = {"environment": environment, "model": model, "rows": rows}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
