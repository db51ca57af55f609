"""Time what the host does for each window in batched mode, beside a device that takes no time.

    python benchmarks/host.py --output benchmarks/results/host.json

The engine is replaced: it answers at once with windows of a hundred tokens in a few segments, and
aligns their tokens evenly. What is left is everything that must fit beside a GPU's work: windows
cut from samples, tokens spelled, answers judged, segments and words made. Copies of the samples,
which another thread makes beside it, are timed by themselves. CPU seconds of one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.features import CLIP_SAMPLES, SECONDS_PER_CLIP
from whisper_flash_attention.benchmark.random_processor import random_processor, talking_config
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.settings import ModelSize
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import Decoded, Request
from whisper_flash_attention.engine.token_timestamps import TokenTimes
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.vocabulary import Vocabulary

SIZE = ModelSize(128, 2, 1, 1, 128)
TOKENS, BATCH, BATCHES, ROUNDS = 100, 64, 4, 5
SEGMENTS = (1, 5, 10)


class NoDevice:
    """In an engine's place: answers are made before anybody asks."""

    def __init__(self, vocabulary: Vocabulary, segments: int) -> None:
        dice = np.random.default_rng(0)
        rows = dice.integers(300, vocabulary.end, (BATCH, TOKENS))
        size = TOKENS // segments
        for index in range(segments):
            begin, end = index * size, (index + 1) * size - 1
            span = round(1500 / segments)
            rows[:, begin] = vocabulary.timestamp_begin + index * span
            rows[:, end] = vocabulary.timestamp_begin + (index + 1) * span
        self._rows = torch.from_numpy(rows)
        self._states = torch.zeros(1).expand(BATCH, 1500, SIZE.d_model)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return self._states[: len(features)]

    def decode(
        self,
        states: torch.Tensor,
        prompt: torch.Tensor,
        request: Request,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Decoded:
        meanwhile()
        count = len(prompt)
        said = torch.cat([prompt, self._rows[:count]], dim=1)
        none = torch.zeros(count)
        return Decoded(said, sum_logprobs=none - 30.0, watched=none)


def even_times(
    weights: Any, rows: Sequence[Any], heads: Any, *, first: int, text_tokens: int
) -> Callable[[], list[TokenTimes]]:
    """In `token_times`' place: tokens follow one another evenly."""
    found = []
    for row in rows:
        count = len(row.tokens) - first
        starts = np.arange(count) * (1500 // count)
        found.append(TokenTimes(starts, np.full(count - 1, 0.5, np.float32)))
    return lambda: found


def seconds_per_window(work: Callable[[], object], windows: int) -> float:
    """CPU seconds of this thread, the median of a few rounds after a first."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.thread_time()
        work()
        times.append((time.thread_time() - start) / windows)
    return median(times[1:])


def measure_case(segments: int, words: bool, samples: np.ndarray) -> float:
    """Seconds per window of so many segments, from samples to a transcription."""
    model = build_model(WhisperFlashAttentionForConditionalGeneration, SIZE, 1)
    model.generation_config = talking_config(SIZE, 1)
    transcriber = Transcriber(model, random_processor(SIZE))
    options = DecodeOptions(
        mode="batched", vad_filter=False, temperature=0.0, word_timestamps=words
    )
    engine, nothing = Engine.of(model), NoDevice(Vocabulary.of(model), segments)
    features = torch.zeros(1).expand(BATCH, 80, 1)
    package = "whisper_flash_attention"
    with (
        mock.patch.object(engine, "encode", nothing.encode),
        mock.patch.object(engine, "decode", nothing.decode),
        mock.patch(f"{package}.transcribe.batched.log_mel", lambda clips, **_: features),
        mock.patch(f"{package}.engine.token_times.token_times", even_times),
    ):
        return seconds_per_window(
            lambda: transcriber.transcribe(
                np.split(samples, BATCH * BATCHES),
                language="en",
                options=options,
                batch_size=BATCH,
            ),
            BATCH * BATCHES,
        )


def measure_copies(samples: np.ndarray) -> float:
    """Seconds per window to put a batch's samples side by side."""
    room = np.empty((BATCH, CLIP_SAMPLES), np.float32)

    def work() -> None:
        for row, clip in zip(room, np.split(samples[: room.size], BATCH), strict=True):
            row[:] = clip

    return seconds_per_window(work, BATCH)


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record.")] = None,
) -> None:
    """Time the host's part of a window."""
    torch.set_num_threads(1)
    samples = np.random.default_rng(0).standard_normal(BATCH * BATCHES * CLIP_SAMPLES)
    samples = samples.astype(np.float32)
    rows = [
        {
            "segments": segments,
            "word_timestamps": words,
            "seconds_per_window": measure_case(segments, words, samples),
        }
        for words in (False, True)
        for segments in SEGMENTS
    ]
    copies = measure_copies(samples)
    table = Table("segments", "words", "us per window", "most x real time")
    for row in rows:
        took = float(row["seconds_per_window"])
        table.add_row(
            str(row["segments"]),
            "yes" if row["word_timestamps"] else "",
            f"{1e6 * took:.0f}",
            f"{SECONDS_PER_CLIP / took:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(f"copies, by another thread: {1e6 * copies:.0f} us per window")
    if output is not None:
        document = {
            "environment": describe_environment("cpu", commit).as_json(),
            "tokens_per_window": TOKENS,
            "copy_seconds_per_window": copies,
            "rows": rows,
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
