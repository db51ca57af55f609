"""Time whole processes on a CPU: the command and a script, beside faster-whisper's script.

    pip install --target peers faster-whisper
    python benchmarks/start.py --peers peers --output benchmarks/results/start-cpu.json

A process imports, loads a packaged checkpoint, transcribes a short clip and writes subtitles. The
systems take turns; every process is new. After an unmeasured round, files are in the page cache,
and modules compiled, as an installation leaves them. Peak memory is what the kernel counts for the
process. `--version` and `--help` are compared with the start of Python itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from _harness import Commit, Output, Threads, app_of, print_rows, write_json

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.benchmark.peer_checkpoints import write_checkpoint
from whisper_flash_attention.benchmark.peer_systems import CTRANSLATE2
from whisper_flash_attention.benchmark.peers import version_of

OURS = """
import sys, time
clip, source, _, out, threads = sys.argv[1:]
laps = [time.perf_counter()]
import torch
from whisper_flash_attention import Transcriber
from whisper_flash_attention.transcribe import render
torch.set_num_threads(int(threads))
laps.append(time.perf_counter())
transcriber = Transcriber.from_pretrained(source, device="cpu")
laps.append(time.perf_counter())
found = transcriber.transcribe(clip)
laps.append(time.perf_counter())
with open(out, "w") as file:
    file.write(render(found, "srt"))
laps.append(time.perf_counter())
print(*laps)
"""
# Its documented settings for this CPU and precision; one beam, as ours.
PEER = """
import sys, time
clip, _, folder, out, threads = sys.argv[1:]
laps = [time.perf_counter()]
from faster_whisper import WhisperModel
laps.append(time.perf_counter())
model = WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=int(threads))
laps.append(time.perf_counter())
segments, _ = model.transcribe(clip, beam_size=1)
segments = list(segments)
laps.append(time.perf_counter())

def stamp(seconds):
    minutes, rest = divmod(seconds, 60)
    text = f"{int(minutes // 60):02}:{int(minutes % 60):02}:{rest:06.3f}"
    return text.replace(".", ",")

with open(out, "w") as file:
    for number, each in enumerate(segments, 1):
        times = f"{stamp(each.start)} --> {stamp(each.end)}"
        print(number, times, each.text.strip(), "", sep="\\n", file=file)
laps.append(time.perf_counter())
print(*laps)
"""
PHASES = ("import", "load", "transcribe", "write")
# Starts a process and waits for it. It is small: a process begins with its parent's peak memory.
RUN = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
printed = process.stdout.read()
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - began
print(json.dumps([status, seconds, usage.ru_maxrss / 1024, printed]))
"""


def run_once(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Seconds, peak memory in MiB, and seconds of the phases that the process reports."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    status, seconds, mebibytes, printed = json.loads(done.stdout)
    if status:
        raise typer.BadParameter(f"{' '.join(command)[:200]} failed")
    row: dict[str, Any] = {"seconds": seconds, "peak_mib": mebibytes}
    try:
        laps = [float(each) for each in printed.splitlines()[-1].split()]
    except (IndexError, ValueError):  # a process that reports none
        return row
    after = zip(PHASES, laps, laps[1:], strict=False)
    return row | {name: end - start for name, start, end in after}


def summarised(system: str, rounds: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A row: medians of all rounds."""
    values = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return {"setting": "start", "system": system, **fields, **values, "rounds": len(rounds)}


def main(
    peers: Annotated[
        Path | None, typer.Option(help="Folder in which faster-whisper is installed.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="A recording; by default the longest of this package.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="tiny.en or base.")] = "tiny.en",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every system.")] = 5,
    threads: Threads = os.cpu_count() or 1,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Time whole processes on a CPU: the command and a script, beside faster-whisper's script."""
    clip = clip or max(bundled_recordings(), key=lambda each: each.seconds).path
    seconds = load_audio(clip).size / SAMPLING_RATE
    source = f"package:{checkpoint}"
    ours = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    ours.pop("PYTHONDONTWRITEBYTECODE", None)
    module = [sys.executable, "-m", "whisper_flash_attention"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        converted = "-"
        if peers is not None:
            written = write_checkpoint(source, [CTRANSLATE2], folder, peers=peers)
            converted = written.files[CTRANSLATE2]
        arguments = [str(clip), source, converted, str(folder / "out.srt"), str(threads)]
        transcribe = ["transcribe", str(clip), "-m", source, "--device", "cpu", "-f", "srt"]
        systems: dict[str, tuple[list[str], dict[str, str]]] = {
            "command": ([*module, *transcribe, "-o", name, "--overwrite"], ours),
            "script": ([sys.executable, "-c", OURS, *arguments], ours),
            "python": ([sys.executable, "-c", "pass"], ours),
            "--version": ([*module, "--version"], ours),
            "--help": ([*module, "--help"], ours),
        }
        if peers is not None:
            theirs = ours | {"PYTHONPATH": str(peers.resolve())}
            systems["faster-whisper"] = ([sys.executable, "-c", PEER, *arguments], theirs)
        times: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        for turn in range(rounds + 1):
            for system, (command, environment) in systems.items():
                found = run_once(command, environment)
                if turn:  # the first one fills the page cache
                    times[system].append(found)
    rows = [summarised(system, found) for system, found in times.items()]
    columns = {name: f"{{{name}:.2f}}" for name in ("seconds", *PHASES)}
    print_rows(
        f"{seconds:.1f} s of speech, {checkpoint}, {threads} threads",
        rows,
        {"system": "{system}", **columns, "peak MiB": "{peak_mib:.0f}"},
    )
    document = {
        "faster_whisper": version_of("faster-whisper", peers),
        "clip": clip.name,
        "clip_seconds": seconds,
        "checkpoint": checkpoint,
        "threads": threads,
    }
    write_json(output, "cpu", commit, document | {"dtype": "float32", "rows": rows})


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
