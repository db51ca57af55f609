"""Time the way from a file to Whisper's input: decoding, and log-mel features.

    python benchmarks/front_end.py --output benchmarks/results/front-end.json

Decoding: the bundled speech, several times over, as flac, mp3 and wav; how many times faster than
real time on one core. Log-mel: clips of 30 s of that speech by `log_mel` on the device, against
Transformers' `WhisperFeatureExtractor` on the CPU, which take turns, and how many times faster in
the median turn; and the largest difference between the two. On a GPU from samples on the host,
which the copy is a part of, and from samples already on the device.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.log_mel import SAMPLES, log_mel
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.features import bundled_clips
from whisper_flash_attention.benchmark.measure import synchronize

Samples = npt.NDArray[np.float32]
CODECS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}
MINUTES = 10
ROUNDS = {1: 45, 32: 9}  # by the number of clips


def encode(path: Path, samples: Samples, codec: str) -> None:
    """Write mono samples at 16 kHz with this codec."""
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = SAMPLING_RATE, 0
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=SAMPLING_RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        resampler = av.AudioResampler(stream.format.name, "mono", SAMPLING_RATE)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has done it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def measure_decoding(clips: list[Samples]) -> list[dict[str, Any]]:
    """Times faster than real time per format, on one core."""
    from whisper_flash_attention.audio.load import load_audio

    speech = np.concatenate(clips[: MINUTES * 2])
    seconds = len(speech) / SAMPLING_RATE
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec in CODECS.items():
            path = Path(folder) / f"speech.{suffix}"
            encode(path, speech, codec)
            took = [
                seconds_of(lambda path=path: load_audio(path), torch.device("cpu"))  # type: ignore[misc]
                for _ in range(5)
            ]
            rows.append({"format": suffix, "seconds": seconds, "times_real": seconds / min(took)})
    return rows


def measure_log_mel(
    clips: list[Samples], mel_bins: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of `log_mel` and of the extractor for these clips."""
    from transformers import WhisperFeatureExtractor

    extractor: Any = WhisperFeatureExtractor.from_dict({"feature_size": mel_bins})
    tensors = [torch.from_numpy(clip).to(device) for clip in clips]

    def stock() -> torch.Tensor:
        found = extractor(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        return torch.as_tensor(found.input_features)

    def ours() -> torch.Tensor:
        return log_mel(clips, mel_bins=mel_bins, device=device)

    def on_device() -> torch.Tensor:
        return log_mel(tensors, mel_bins=mel_bins)

    ways = {"stock": stock, "ours": ours}
    if device.type != "cpu":
        ways["on_device"] = on_device
    found = {name: way().cpu() for name, way in ways.items()}
    apart = max(float((each - found["stock"]).abs().max()) for each in found.values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds_of(way, device if name != "stock" else torch.device("cpu")))
    faster = median(a / b for a, b in zip(times["stock"], times["ours"], strict=True))
    row = {"clips": len(clips), "mel_bins": mel_bins, "difference": apart, "times_faster": faster}
    return row | {name: 1e3 * median(each) for name, each in times.items()}


def show(rows: list[dict[str, Any]], device: str) -> Table:
    """A table of what `measure_log_mel` found."""
    heads = ("clips", "mel bins", "log_mel, ms", "extractor, ms", "times faster", "difference")
    table = Table(*heads, "log_mel of samples on the device, ms", title=device)
    for row in rows:
        numbers = (f"{row['ours']:.2f}", f"{row['stock']:.2f}", f"{row['times_faster']:.2f}")
        there = f"{row['on_device']:.2f}" if "on_device" in row else "-"
        counts = (str(row["clips"]), str(row["mel_bins"]))
        table.add_row(*counts, *numbers, f"{row['difference']:.1e}", there)
    return table


def main(
    device: Annotated[str, typer.Option(help="of log_mel: cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    decoding: Annotated[bool, typer.Option(help="time decoding, which needs PyAV")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit, instead of git's word.")] = None,
) -> None:
    """Time decoding and log-mel features."""
    torch.set_num_threads(threads)
    target = torch.device(device)
    clips = [clip[:SAMPLES] for clip in bundled_clips(32)[0]]
    decoded = measure_decoding(clips) if decoding else []
    rows = [
        measure_log_mel(clips[:count], bins, target, rounds)
        for bins in (80, 128)
        for count, rounds in ROUNDS.items()
    ]
    console = Console()
    for row in decoded:
        console.print(f"{row['format']}: {row['times_real']:.0f} x real time on one core")
    console.print(show(rows, device))
    if output is not None:
        document = {
            "environment": describe_environment(device, commit).as_json(),
            "decoding": decoded,
            "log_mel": rows,
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
