"""How much faster than real time recordings become text: from files on disk to written text.

Files are encoded from real speech, a few of them, which are copied under as many names as there are
recordings. Weights are random, and every window gets the same number of tokens (`throughput`). Each
entry is what users run: `Transcriber` with arrays or with paths, the command's `Runner`, and
`run_batch`. Times include writing the text; not loading the model, and of Ray not what
comes before its first group of recordings is done.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import AudioSource, load_audio
from whisper_flash_attention.audio.decoder_pool import DecodeRequest, DecoderPool, default_workers
from whisper_flash_attention.audio.opener import AudioOpener, OpenedAudio
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.audio.threads import threads_beside
from whisper_flash_attention.audio.vad import cut_all, find_speech
from whisper_flash_attention.batch.items import longest_first
from whisper_flash_attention.batch.manifest import read_archive
from whisper_flash_attention.batch.model import RunOptions, Speech
from whisper_flash_attention.batch.run import run_batch
from whisper_flash_attention.batch.stages import Work
from whisper_flash_attention.benchmark.features import (
    CLIP_SAMPLES,
    SECONDS_PER_CLIP,
    bundled_clips,
)
from whisper_flash_attention.benchmark.measure import synchronize
from whisper_flash_attention.benchmark.throughput import Parts, ThroughputCase, random_transcriber
from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.options import MODES, DecodeOptions, TranscribeOptions
from whisper_flash_attention.terminal import FileProgress
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.inputs import find_inputs
from whisper_flash_attention.transcribe.output import Output
from whisper_flash_attention.transcribe.runner import Runner

FILES, DECODE = "files", "decode"
ENTRIES = ("memory", "transcribe", "transcribe_each", "command", "batch-local", "batch-ray")
# Codec, sampling rate and channels: speech as it is archived, and music's formats as phones give.
CONTAINERS = {
    "wav": ("pcm_s16le", 16_000, "mono"),
    "flac": ("flac", 16_000, "mono"),
    "mp3": ("libmp3lame", 44_100, "stereo"),
    "m4a": ("aac", 44_100, "stereo"),
}
# Different files, of which the others are copies: encoding takes longer than decoding.
MOST_ENCODED, MOST_ENCODED_CLIPS = 4, 64


@dataclass(frozen=True)
class FilesCase:
    """An entry, a mode, and files.

    Args:
        work: model, batch size, tokens and repeats.
        entry: one of `ENTRIES`.
        mode: one of `MODES`.
        container: one of `CONTAINERS`.
        workers: GPUs; more than one with entry "batch-ray" alone.
        vad: whether to find speech by the detector.

    Raises:
        OptionError: a value is invalid.
    """

    work: ThroughputCase
    entry: str
    mode: str
    container: str
    workers: int = 1
    vad: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("entry", self.entry, ENTRIES),
            ("mode", self.mode, MODES),
            ("container", self.container, tuple(CONTAINERS)),
        ):
            check.one_of(name, value, known)
        if self.workers < 1 or (self.workers > 1 and self.entry != "batch-ray"):
            raise OptionError(f'workers is {self.workers}: more than 1 needs entry="batch-ray"')

    @property
    def options(self) -> DecodeOptions:
        """Options that decode every window once, to a fixed number of tokens."""
        return replace(self.work.options, mode=self.mode, vad_filter=self.vad)


def lengths_of(text: str, count: int) -> list[float]:
    """Seconds of `count` recordings, of a text such as "300", or "1-15" for evenly spread ones.

    Raises:
        OptionError: it is neither, or below 1 s.
    """
    try:
        first, *others = (float(part) for part in text.split("-"))
        (last,) = others or [first]
    except ValueError:
        raise OptionError(f"length is {text!r}: give seconds (300), or a range (1-15)") from None
    if not 1 <= first <= last <= 86_400:
        raise OptionError(f"length is {text!r}: give 1 s to a day")
    spread = np.linspace(first, last, min(count, MOST_ENCODED_CLIPS))
    # Neighbours differ, as in an archive.
    order = np.random.default_rng(0).permutation(len(spread))
    return [float(spread[order[index % len(spread)]]) for index in range(count)]


def write_recordings(
    folder: Path, container: str, lengths: Sequence[float], speech: Samples
) -> tuple[list[Path], float]:
    """Write recordings of these lengths; their paths, and seconds of sound in all.

    Args:
        speech: mono at 16 kHz, repeated as needed; every recording begins elsewhere.
    """
    known: dict[tuple[float, int], Path] = {}
    paths = []
    for index, seconds in enumerate(lengths):
        key = (seconds, index % MOST_ENCODED if len(set(lengths)) == 1 else 0)
        path = folder / f"{index:05}.{container}"
        if key in known:
            shutil.copyfile(known[key], path)
        else:
            start = 7 * SAMPLING_RATE * len(known)
            samples = np.resize(np.roll(speech, -start), round(seconds * SAMPLING_RATE))
            encode(path, samples, *CONTAINERS[container])
            known[key] = path
        paths.append(path)
    return paths, sum(lengths)


def encode(path: Path, samples: Samples, codec: str, rate: int, layout: str) -> None:
    """Write mono samples at 16 kHz into a file of this codec, rate and layout."""
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = SAMPLING_RATE, 0
    with av.open(path, "w") as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        size = stream.codec_context.frame_size or 4_096
        resampler = av.AudioResampler(stream.format.name, layout, rate, frame_size=size)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


def measure_decoding(paths: Sequence[Path], seconds: float, threads: int) -> float:
    """Seconds of sound per second that `threads` processes decode, once they are there."""
    pool = DecoderPool(threads)
    with AudioOpener(pool) as opener:
        warm = [DecodeRequest(paths[0], end=1.0)] * threads
        streams = [pool.stream(each) for each in warm]
        for stream in streams:  # one process for each
            next(stream)
        for stream in streams:
            stream.close()
        start = time.perf_counter()
        for each in opener.open_each(map(DecodeRequest, paths)):
            each.result()
        return seconds / (time.perf_counter() - start)


@dataclass(frozen=True)
class RandomModel:
    """Opens our model with random weights wherever a worker needs it."""

    case: ThroughputCase

    @property
    def source(self) -> str:
        return f"random {self.case.checkpoint}"

    def open(self) -> Speech:
        return random_transcriber(self.case)


@dataclass(frozen=True)
class OpenModel:
    """Gives the transcriber that is there already."""

    transcriber: Transcriber
    source: str = "random"

    def open(self) -> Speech:
        return self.transcriber


@dataclass
class MeasuredModel:
    """A model with random weights, for recordings of all containers.

    Args:
        work: model, batch size, tokens and repeats.

    Attributes:
        warm_modes: those in which it has transcribed recordings.
    """

    work: ThroughputCase
    transcriber: Transcriber
    warm_modes: set[str] = field(default_factory=set)

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of the parts of one batch."""
        clips, _ = bundled_clips(1)
        return Parts(self.transcriber, self.work.options, clips * self.work.batch_size).measure()


@dataclass
class FilesBenchmark:
    """A model, and recordings in a folder.

    Args:
        model: what transcribes them.
        folder: of the recordings, all of one container.
        paths: theirs.
        audio_seconds: of sound in all.
    """

    model: MeasuredModel
    folder: Path
    paths: list[Path]
    audio_seconds: float

    @property
    def transcriber(self) -> Transcriber:
        return self.model.transcriber

    def measure(self, case: FilesCase) -> dict[str, Any]:
        """A row, without its environment.

        Raises:
            BenchmarkError: a recording has no text, or nothing was decoded.
        """
        recordings, audio_seconds = len(self.paths), self.audio_seconds
        if case.entry == "batch-ray":
            recordings, audio_seconds, seconds = self._batch_ray(case)
        else:
            run = {
                "memory": self._memory,
                "transcribe": self._transcribe,
                "transcribe_each": self._transcribe_each,
                "command": self._command,
                "batch-local": self._batch_local,
            }[case.entry]
            if case.mode not in self.model.warm_modes:
                run(case)  # compiles, and fills caches
                self.model.warm_modes.add(case.mode)
            seconds = median(run(case) for _ in range(case.work.repeats))
        windows = self._windows(case, recordings)
        if not windows:
            raise BenchmarkError("no window was decoded: the detector finds no speech")
        return {
            "setting": FILES,
            "checkpoint": case.work.checkpoint,
            "entry": case.entry,
            "mode": case.mode,
            "container": case.container,
            "workers": case.workers,
            "batch_size": case.work.batch_size,
            "recordings": recordings,
            "audio_seconds": audio_seconds,
            "seconds": seconds,
            "realtime_factor": audio_seconds / seconds,
            "windows": windows,
            **({"vad": True} if case.vad else {}),
            "shares": self._shares(case, audio_seconds, windows, seconds),
        }

    def _memory(self, case: FilesCase) -> float:
        with AudioOpener() as opener:
            opened = opener.open_each(map(DecodeRequest, self.paths))
            samples = [_whole(each) for each in opened]
        with self._timed() as (output, took):
            self._write(output, self.transcriber.transcribe(list(samples), **self._arguments(case)))
        return took()

    def _transcribe(self, case: FilesCase) -> float:
        with self._timed() as (output, took):
            self._write(
                output, self.transcriber.transcribe(list(self.paths), **self._arguments(case))
            )
        return took()

    def _transcribe_each(self, case: FilesCase) -> float:
        with self._timed() as (output, took):
            for index, each in self.transcriber.transcribe_each(
                self.paths, **self._arguments(case)
            ):
                (output / f"{index:05}.txt").write_text(each.text)
        return took()

    def _command(self, case: FilesCase) -> float:
        inputs = find_inputs([str(self.folder)])
        with self._timed() as (output, took):
            progress = FileProgress(Console(quiet=True), [entry.name for entry in inputs])
            options = TranscribeOptions(language="en")
            files = Output(folder=output)
            files.prepare(inputs)
            runner = Runner(options, case.options, case.work.batch_size, files, progress)
            runner.run(inputs, lambda: self.transcriber)
            if runner.done != len(self.paths):
                raise BenchmarkError(f"{runner.failures} of {len(self.paths)} recordings failed")
        return took()

    def _batch_local(self, case: FilesCase) -> float:
        with self._timed() as (output, took):
            summary = run_batch(
                self.folder,
                output,
                model=OpenModel(self.transcriber),
                run_options=self._run_options(case),
            )
            if summary.failed:
                raise BenchmarkError(f"{summary.failed} of {len(self.paths)} recordings failed")
        return took()

    def _batch_ray(self, case: FilesCase) -> tuple[int, float, float]:
        """Recordings, seconds of sound in them, and seconds that they took, from the first rows on.

        When these rows come, the batch whose text was late, one in work, and one more on the rows'
        way may have been decoded: recordings of three batches are left out, too.
        """
        from whisper_flash_attention.batch.ray_engine import run_on_ray

        options = self._run_options(case)
        archive = read_archive(str(self.folder))
        items = longest_first([options.resolved(item) for item in archive.items])
        work = Work(RandomModel(case.work), options, workers=case.workers)
        groups: list[tuple[float, int]] = []
        with tempfile.TemporaryFile("w") as file:
            for rows in run_on_ray(items, work, None, None):
                if any(row["error"] for row in rows):
                    raise BenchmarkError(f"a recording failed: {rows[0]['error']}")
                file.writelines(json.dumps(row) + "\n" for row in rows)
                groups.append((time.perf_counter(), len(rows)))
        (first, few), (last, _) = groups[0], groups[-1]
        each = self.audio_seconds / len(self.paths)
        ahead = 3 * SECONDS_PER_CLIP * case.work.batch_size * case.workers
        count = len(self.paths) - few - math.ceil(ahead / each)
        if last <= first or count < 1:
            raise OptionError('entry="batch-ray" is measured with more recordings')
        return count, each * count, last - first

    def _run_options(self, case: FilesCase) -> RunOptions:
        return RunOptions(TranscribeOptions(language="en"), case.options, case.work.batch_size)

    def _arguments(self, case: FilesCase) -> dict[str, Any]:
        return {"language": "en", "options": case.options, "batch_size": case.work.batch_size}

    def _write(self, output: Path, found: Sequence[Any]) -> None:
        for index, each in enumerate(found):
            (output / f"{index:05}.txt").write_text(each.text)

    @contextmanager
    def _timed(self) -> Iterator[tuple[Path, Callable[[], float]]]:
        """A new folder for the text, and the seconds until this context was left."""
        device = torch.device(self.model.work.device)
        ended: list[float] = []
        with tempfile.TemporaryDirectory() as output:
            synchronize(device)
            start = time.perf_counter()
            yield Path(output), lambda: ended[0]
            synchronize(device)
            ended.append(time.perf_counter() - start)

    def _windows(self, case: FilesCase, recordings: int) -> int:
        """Windows of the last `recordings` files; in batched mode they end where it is quiet."""
        chunks = find_speech if case.vad else cut_all
        counts: dict[int, int] = {}
        total = 0
        for path in self.paths[-recordings:]:
            size = path.stat().st_size  # copies have the same
            if size not in counts:
                samples = load_audio(path)
                if case.mode == "batched":
                    counts[size] = len(list(chunks(AudioSource(samples))[1]))
                else:
                    counts[size] = math.ceil(samples.size / CLIP_SAMPLES)
            total += counts[size]
        return total

    @cached_property
    def _decoding_rate(self) -> float:
        """Seconds of sound per second of one decoder."""
        start = time.perf_counter()
        samples = load_audio(self.paths[0])
        return samples.size / SAMPLING_RATE / (time.perf_counter() - start)

    @cached_property
    def _detector_rate(self) -> float:
        """Seconds of sound per second of the detector on one core."""
        samples = load_audio(self.paths[0])
        start = time.perf_counter()
        list(find_speech(AudioSource(samples), threads=1)[1])
        return samples.size / SAMPLING_RATE / (time.perf_counter() - start)

    def _shares(
        self, case: FilesCase, audio_seconds: float, windows: int, seconds: float
    ) -> dict[str, float]:
        """Seconds that each part would take alone, as shares of a run.

        Parts go on side by side, so that they may add up to more than 1. Those of decoding and of
        the detector are of all their processes or threads together. What the device's parts leave
        of the run is waiting.
        """
        batches = windows / case.work.batch_size / case.workers / seconds
        parts = self.model.parts
        decoding = 0.0
        if case.entry != "memory":
            decoding = audio_seconds / self._decoding_rate / default_workers()
        shares = {"decode": decoding / seconds}
        if case.vad:
            threads = max(1, threads_beside(torch.device(self.model.work.device)))
            shares["detector"] = audio_seconds / self._detector_rate / threads / seconds
        shares |= {
            "copy": batches * parts["copies to the device"],
            "features": batches * parts["log-mel"],
            "encoder": batches * parts["encoder"],
            "decoder": batches * parts["decoder"],
            "text": batches * parts["text and segments"],
        }
        on_device = sum(shares[name] for name in ("features", "encoder", "decoder"))
        return shares | {"waiting": max(0.0, 1.0 - on_device)}


def _whole(opened: OpenedAudio) -> Samples:
    audio = opened.result()
    assert isinstance(audio, AudioSource)
    return audio.whole()


def measure_files(
    cases: Sequence[FilesCase],
    lengths: Sequence[float],
    speech: Samples,
    threads: Sequence[int],
    environment: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Rows of decoding alone for every container, and of every case.

    Args:
        cases: of one checkpoint and batch size.
        lengths: of the recordings, in seconds.
        speech: mono at 16 kHz.
        threads: processes with which decoding alone is measured.
        environment: of this machine.
    """
    work = cases[0].work
    model = MeasuredModel(work, random_transcriber(work))
    for container in dict.fromkeys(case.container for case in cases):
        # In a folder of its own, which is what the command and archives are given.
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            paths, seconds = write_recordings(folder, container, lengths, speech)
            for count in threads:
                yield {
                    "setting": DECODE,
                    "container": container,
                    "threads": count,
                    "realtime_factor": measure_decoding(paths, seconds, count),
                    "environment": environment,
                }
            benchmark = FilesBenchmark(model, folder, paths, seconds)
            for case in cases:
                if case.container == container:
                    yield benchmark.measure(case) | {"environment": environment}
