"""Time the steps from a file to Whisper's input.

    python benchmarks/audio.py front-end --output benchmarks/results/front-end.json
    python benchmarks/audio.py decoders --output benchmarks/results/decoders-cpu.json
    python benchmarks/audio.py parts --processes 8
    python benchmarks/audio.py detector --output benchmarks/results/detector-cpu.json

Decoding of the bundled speech, several times over, as flac, mp3 and wav, in times real time on one
core. Then log-mel features of clips of 30 s of that speech by `log_mel` on the device and by
Transformers' `WhisperFeatureExtractor` on the CPU, in turns: the ratio of times in the median turn
and the largest difference; on a GPU from samples on the host, the copy included, and from samples
on the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from _harness import (
    CPU,
    Commit,
    Output,
    Threads,
    app_of,
    console,
    print_rows,
    seconds_of,
    time_in_turns,
    write_json,
)

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.audio_source import AudioInput, AudioSource, load_audio
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.log_mel import SAMPLES, log_mel
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.audio.threads import in_threads
from whisper_flash_attention.audio.vad import Chunk, find_speech
from whisper_flash_attention.benchmark.features import bundled_clips
from whisper_flash_attention.benchmark.from_files import (
    CONTAINERS,
    encode,
    lengths_of,
    measure_decoding,
    write_recordings,
)

Samples = npt.NDArray[np.float32]

CODECS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}
MINUTES = 10
LOG_MEL_ROUNDS = {1: 45, 32: 9}  # by the number of clips


def measure_formats(clips: list[Samples]) -> list[dict[str, Any]]:
    """Times real time per format, on one core."""
    speech = np.concatenate(clips)
    seconds = len(speech) / SAMPLING_RATE
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec in CODECS.items():
            path = Path(folder) / f"speech.{suffix}"
            encode(path, speech, codec, SAMPLING_RATE, "mono")
            best = min(seconds_of(lambda path=path: load_audio(path)) for _ in range(5))  # type: ignore[misc]
            rows.append({"format": suffix, "seconds": seconds, "times_real": seconds / best})
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

    works: dict[str, Callable[[], torch.Tensor]] = {
        "stock": stock,
        "ours": lambda: log_mel(clips, mel_bins=mel_bins, device=device),
    }
    if device.type != "cpu":
        works["on_device"] = lambda: log_mel(tensors, mel_bins=mel_bins)
    found = {name: work().cpu() for name, work in works.items()}
    difference = max(float((each - found["stock"]).abs().max()) for each in found.values())
    times = time_in_turns(works, rounds, {"stock": CPU, "ours": device, "on_device": device})
    faster = median(a / b for a, b in zip(times["stock"], times["ours"], strict=True))
    row = {"clips": len(clips), "mel_bins": mel_bins, "difference": difference}
    row |= {"times_faster": faster}
    return row | {name: 1e3 * median(each) for name, each in times.items()}


def front_end(
    device: Annotated[str, typer.Option(help="Of log_mel: cpu or cuda.")] = "cpu",
    threads: Threads = 2,
    decoding: Annotated[bool, typer.Option(help="Time decoding, which needs PyAV.")] = True,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time decoding of files, and log-mel features."""
    torch.set_num_threads(threads)
    clips = [clip[:SAMPLES] for clip in bundled_clips(max(LOG_MEL_ROUNDS))[0]]
    decoded = measure_formats(clips[: MINUTES * 2]) if decoding else []
    rows = [
        measure_log_mel(clips[:count], bins, torch.device(device), rounds)
        for bins in (80, 128)
        for count, rounds in LOG_MEL_ROUNDS.items()
    ]
    for row in decoded:
        console.print(f"{row['format']}: {row['times_real']:.0f} x real time on one core")
    columns = {"clips": "{clips}", "mel bins": "{mel_bins}", "stock on CPU": "{stock:.2f}"}
    columns |= {"ours": "{ours:.2f}", "times faster": "{times_faster:.2f}"}
    columns |= {"difference": "{difference:.1e}", "from the device": "{on_device:.2f}"}
    print_rows(f"log-mel on {device}, ms", rows, columns)
    write_json(output, device, commit, {"decoding": decoded, "log_mel": rows})


def by_frames(path: Path) -> None:
    """Decode with a call of the resampler for every frame of the codec."""
    import av

    with av.open(path) as file:
        resampler = av.AudioResampler(format="flt", rate=SAMPLING_RATE)
        for frame in file.decode(file.streams.audio[0]):
            frame.pts = None
            for each in resampler.resample(frame):
                each.to_ndarray()


def by_libsndfile(path: Path) -> None:
    """Decode whole with libsndfile, which soxr resamples, without the checks of `load_audio`."""
    import soundfile
    import soxr

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != SAMPLING_RATE:
        soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE)


def in_thread_pool(paths: list[Path], threads: int) -> None:
    """Decode files in threads of this process."""
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(load_audio, paths))


def by_ffmpeg(path: Path) -> None:
    """FFmpeg's decoding and resampling alone: nothing is checked, placed or mixed."""
    import av

    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        resampler = av.AudioResampler("flt", stream.layout, SAMPLING_RATE)
        frames = av.AudioFifo()
        for frame in file.decode(stream):
            frame.pts = None
            frames.write(frame)
            if frames.samples >= 65_536:
                joined = frames.read()
                joined.pts = None
                resampler.resample(joined)


def decoders(
    recordings: Annotated[int, typer.Option(help="Files of each container.")] = 8,
    length: Annotated[float, typer.Option(help="Seconds of a file.")] = 120.0,
    workers: Annotated[list[int] | None, typer.Option(help="Threads and processes.")] = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare ways to decode files: libraries on one core, threads, and processes.

    libsndfile is measured where the packages soundfile and soxr are installed.
    """
    lengths = lengths_of(f"{length:g}", recordings)
    speech = np.concatenate([clip[:SAMPLES] for clip in bundled_clips(8)[0]])
    rows = []
    for container in CONTAINERS:
        with tempfile.TemporaryDirectory() as folder:
            paths, seconds = write_recordings(Path(folder), container, lengths, speech)
            ways: dict[str, Callable[[Path], object]] = {
                "ffmpeg": by_ffmpeg,
                "frames": by_frames,
                "joined": load_audio,
            }
            if find_spec("soundfile") and find_spec("soxr") and container != "m4a":
                ways["libsndfile"] = by_libsndfile
            row: dict[str, Any] = {"container": container}
            for name, way in ways.items():
                best = min(seconds_of(partial(way, paths[0])) for _ in range(5))
                row[name] = lengths[0] / best
            for count in workers or (1, 2):
                took = seconds_of(partial(in_thread_pool, paths, count))
                row[f"threads_{count}"] = seconds / took
                row[f"processes_{count}"] = measure_decoding(paths, seconds, count)
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row if name != "container")
    columns = {"container": "{container}"} | {name: f"{{{name}:.0f}}" for name in names}
    print_rows("x real time", [dict.fromkeys(names) | row for row in rows], columns)
    write_json(output, "cpu", commit, {"rows": rows})


def open_one(opener: AudioOpener, path: Path) -> Samples:
    """Return all samples of a recording."""
    [opened] = opener.open_each([AudioInput(path)])
    source = opened.result()
    assert isinstance(source, AudioSource)
    return source.whole()


def parts(
    minutes: Annotated[float, typer.Option(help="Length of the recording.")] = 40.0,
    processes: Annotated[int, typer.Option(help="That decode; at most 8 decode parts.")] = 8,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Compare one process that decodes a recording with several that decode parts of it."""
    speech = np.concatenate([clip[:SAMPLES] for clip in bundled_clips(8)[0]])
    rows = []
    for container in CONTAINERS:
        with tempfile.TemporaryDirectory() as folder:
            [path], seconds = write_recordings(Path(folder), container, [60 * minutes], speech)
            row: dict[str, Any] = {"container": container, "seconds": seconds}
            found = {}
            for name, in_parts in (("one", False), ("parts", True)):
                with AudioOpener(
                    DecoderPool(processes), in_parts=in_parts, least_bytes=0
                ) as opener:
                    found[name] = open_one(opener, path)  # starts the processes
                    took = [seconds_of(partial(open_one, opener, path)) for _ in range(3)]
                row[name] = seconds / median(took)
            assert np.array_equal(found["one"], found["parts"])
            rows.append(row)
    columns = {"container": "{container}", "one process": "{one:.0f}", "parts": "{parts:.0f}"}
    print_rows("one recording, x real time", rows, columns)
    write_json(output, "cpu", commit, {"processes": processes, "rows": rows})


def detect(recordings: list[Samples], threads: int, threads_each: int) -> None:
    """Find the speech of recordings, some at a time."""

    def one(samples: Samples) -> list[Chunk]:
        return list(find_speech(AudioSource(samples), threads=threads_each)[1])

    list(map(one, recordings) if threads == 1 else in_threads(one, recordings, threads))


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Processes that compute all the time."""
    program = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(program) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def detector(
    minutes: Annotated[float, typer.Option(help="Length of each of eight recordings.")] = 5.0,
    threads: Annotated[int, typer.Option(help="That run the detector at the same time.")] = 2,
    busy: Annotated[list[int] | None, typer.Option(help="Other processes. Repeatable.")] = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Measure the voice activity detector: alone, in threads, and beside busy processes."""
    speech = np.concatenate([clip[:SAMPLES] for clip in bundled_clips(8)[0]])
    size = round(60 * minutes * SAMPLING_RATE)
    recordings = [np.resize(np.roll(speech, -1_000 * index), size) for index in range(8)]
    ways: dict[str, tuple[list[Samples], int, int]] = {
        "shared operations": (recordings, 1, 0),
        "one core": (recordings, 1, 1),
        "recordings in threads": (recordings, threads, 1),
        "a long one in threads": ([np.concatenate(recordings)], 1, threads),
    }
    detect(recordings[:1], 1, 0)
    rows = []
    for count in busy or (0, os.cpu_count() or 1):
        with busy_cores(count):
            for name, way in ways.items():
                took = min(seconds_of(partial(detect, *way)) for _ in range(2))
                factor = len(recordings) * 60 * minutes / took
                rows.append({"busy": count, "way": name, "realtime_factor": factor})
    columns = {"busy": "{busy}", "way": "{way}", "x real time": "{realtime_factor:.0f}"}
    print_rows("voice activity detector", rows, columns)
    write_json(output, "cpu", commit, {"threads": threads, "minutes": minutes, "rows": rows})


app = app_of(__doc__, front_end, decoders, parts, detector)

if __name__ == "__main__":
    app()
