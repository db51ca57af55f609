"""Time the way from a file to Whisper's input, and what the host does for each window.

    python benchmarks/audio.py front-end --output benchmarks/results/front-end.json
    python benchmarks/audio.py host --output benchmarks/results/host.json

`front-end`: decoding of the bundled speech, several times over, as flac, mp3 and wav, in times real
time on one core. Then log-mel features of clips of 30 s of that speech by `log_mel` on the device
and by Transformers' `WhisperFeatureExtractor` on the CPU, in turns: the ratio of times in the
median turn and the largest difference; on a GPU from samples on the host, the copy included, and
from samples on the device.

`host`: what must fit beside a GPU's work in batched mode: windows cut from samples, tokens decoded
to text, results checked, segments and words made. The engine is replaced by one that returns at
once windows of a hundred tokens in a few segments and evenly aligned tokens. Copies of the samples,
which another thread makes at the same time, are timed by themselves. CPU seconds of one thread.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

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
    print_table,
    seconds_of,
    time_in_turns,
    write_json,
)

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.log_mel import SAMPLES, log_mel
from whisper_flash_attention.benchmark.features import (
    CLIP_SAMPLES,
    SECONDS_PER_CLIP,
    bundled_clips,
)
from whisper_flash_attention.benchmark.random_weights import (
    build_model,
    random_processor,
    talking_config,
)
from whisper_flash_attention.benchmark.settings import ModelSize
from whisper_flash_attention.engine import alignment
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.scheduler import DecodeJob, FinishedJob
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber, batched
from whisper_flash_attention.transcribe import words as words_module
from whisper_flash_attention.transcribe.tokenizer import Vocabulary

Samples = npt.NDArray[np.float32]

# Of `front-end`: rounds by the number of clips.
CODECS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}
MINUTES = 10
LOG_MEL_ROUNDS = {1: 45, 32: 9}

# Of `host`.
SIZE = ModelSize(128, 2, 1, 1, 128)
TOKENS, BATCH, BATCHES, HOST_ROUNDS = 100, 64, 4, 5
SEGMENTS = (1, 5, 10)


# --- from a file to features ---------------------------------------------------------------------


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


def measure_decoding(clips: list[Samples]) -> list[dict[str, Any]]:
    """Times real time per format, on one core."""
    speech = np.concatenate(clips)
    seconds = len(speech) / SAMPLING_RATE
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec in CODECS.items():
            path = Path(folder) / f"speech.{suffix}"
            encode(path, speech, codec)
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
    decoded = measure_decoding(clips[: MINUTES * 2]) if decoding else []
    rows = [
        measure_log_mel(clips[:count], bins, torch.device(device), rounds)
        for bins in (80, 128)
        for count, rounds in LOG_MEL_ROUNDS.items()
    ]
    for row in decoded:
        console.print(f"{row['format']}: {row['times_real']:.0f} x real time on one core")
    lines = [
        (
            *(row["clips"], row["mel_bins"]),
            *(f"{row[name]:.2f}" for name in ("stock", "ours", "times_faster")),
            f"{row['difference']:.1e}",
            f"{row['on_device']:.2f}" if "on_device" in row else None,
        )
        for row in rows
    ]
    columns = ("clips", "mel bins", "stock on CPU", "ours", "times faster", "difference")
    title = f"log-mel on {device}, ms"
    print_table(title, (*columns, "from the device"), lines)
    write_json(output, device, commit, {"decoding": decoded, "log_mel": rows})


# --- the host's part of batched mode -------------------------------------------------------------


class InstantEngine:
    """An engine's `encode` and `decode_stream` whose results are there from the beginning."""

    def __init__(self, vocabulary: Vocabulary, segments: int) -> None:
        rows = np.random.default_rng(0).integers(300, vocabulary.end, (BATCH, TOKENS))
        size, span = TOKENS // segments, round(1500 / segments)
        for index in range(segments):
            rows[:, index * size] = vocabulary.timestamp_begin + index * span
            rows[:, (index + 1) * size - 1] = vocabulary.timestamp_begin + (index + 1) * span
        self._texts = cycle(map(tuple, rows.tolist()))
        self._states = torch.zeros(1).expand(BATCH, 1500, SIZE.d_model)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return self._states[: len(features)]

    def decode_stream(
        self, more: Callable[[int], Sequence[DecodeJob]], slots: int, **_: object
    ) -> Iterator[FinishedJob]:
        while jobs := more(slots):
            for job in jobs:
                yield FinishedJob(job, next(self._texts), sum_logprob=-30.0, probe_probability=0.0)


def even_times(
    weights: Any, rows: Sequence[Any], heads: Any, *, first: int, text_tokens: int
) -> Callable[[], list[Any]]:
    """Like `token_timestamps`, with tokens that follow one another evenly."""
    found = []
    for row in rows:
        count = len(row.tokens) - first
        starts = np.arange(count) * (1500 // count)
        probabilities = np.full(count - 1, 0.5, np.float32)
        found.append(alignment.TokenTimestamps(starts, probabilities))
    return lambda: found


def seconds_per_window(work: Callable[[], object], windows: int) -> float:
    """CPU seconds of this thread, the median of a few rounds after an untimed one."""
    times = []
    for _ in range(HOST_ROUNDS + 1):
        start = time.thread_time()
        work()
        times.append((time.thread_time() - start) / windows)
    return median(times[1:])


def measure_host(segments: int, words: bool, windows: list[Samples]) -> float:
    """Seconds per window of this many segments, from samples to a transcription."""
    model = build_model(WhisperFlashAttentionForConditionalGeneration, SIZE, 1)
    model.generation_config = talking_config(SIZE, 1)
    transcriber = Transcriber(model, random_processor(SIZE))
    options = DecodeOptions(
        mode="batched", vad_filter=False, temperature=0.0, word_timestamps=words
    )
    vocabulary = Vocabulary.of(model.config, model.generation_config)
    engine, instant = Engine.of(model), InstantEngine(vocabulary, segments)
    features = torch.zeros(1).expand(BATCH, 80, 1)
    with (
        mock.patch.object(engine, "encode", instant.encode),
        mock.patch.object(engine, "decode_stream", instant.decode_stream),
        mock.patch.object(batched, "log_mel", lambda clips, **_: features[: len(clips)]),
        mock.patch.object(words_module, "token_timestamps", even_times),
    ):
        return seconds_per_window(
            # Each a recording of its own: a longer one is cut where it is quiet, not every 30 s.
            lambda: transcriber.transcribe_many(
                windows, language="en", options=options, batch_size=BATCH
            ),
            len(windows),
        )


def measure_copies(windows: list[Samples]) -> float:
    """Seconds per window to put a batch's samples side by side."""
    batch = np.empty((BATCH, CLIP_SAMPLES), np.float32)

    def copy() -> None:
        for row, window in zip(batch, windows, strict=False):
            row[:] = window

    return seconds_per_window(copy, BATCH)


def host(output: Output = None, commit: Commit = None) -> None:
    """Time the host's part of a window in batched mode."""
    torch.set_num_threads(1)
    samples = np.random.default_rng(0).standard_normal(BATCH * BATCHES * CLIP_SAMPLES)
    windows = np.split((0.1 * samples).astype(np.float32), BATCH * BATCHES)
    rows = [
        {
            "segments": segments,
            "word_timestamps": words,
            "seconds_per_window": measure_host(segments, words, windows),
        }
        for words in (False, True)
        for segments in SEGMENTS
    ]
    copies = measure_copies(windows)
    lines = [
        (
            *(row["segments"], "yes" if row["word_timestamps"] else ""),
            f"{1e6 * row['seconds_per_window']:.0f}",
            f"{SECONDS_PER_CLIP / row['seconds_per_window']:.0f}",
        )
        for row in rows
    ]
    print_table(None, ("segments", "words", "us per window", "most x real time"), lines)
    console.print(f"copies, by another thread: {1e6 * copies:.0f} us per window")
    document = {"tokens_per_window": TOKENS, "copy_seconds_per_window": copies, "rows": rows}
    write_json(output, "cpu", commit, document)


app = app_of(__doc__, front_end, host)

if __name__ == "__main__":
    app()
