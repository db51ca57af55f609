"""Recordings that take no time to make, and transcribers that load nothing."""

from __future__ import annotations

import os
import signal
import time
import wave
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.batch.results import CORRUPT
from whisper_flash_attention.batch.rows import Row
from whisper_flash_attention.batch.shards import read_shard, shards_in
from whisper_flash_attention.transcribe import Segment, Transcription


def write_wav(path: Path, samples: int = 1_600) -> Path:
    """Write noise of so many samples; the fakes tell recordings apart by this number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(samples).integers(-3_000, 3_000, samples, np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(noise.tobytes())
    return path


def write_archive(folder: Path, count: int) -> Path:
    """Recordings `000.wav`, `001.wav` ... of 1,600, 1,601 ... samples."""
    for number in range(count):
        write_wav(folder / f"{number:03d}.wav", 1_600 + number)
    return folder


def all_rows(folder: Path, *, was_killed: bool = False) -> dict[str, Row]:
    """The rows of all shards by id; each id must be there once.

    Args:
        was_killed: the writer may have left a file that it was writing.
    """
    rows = [row for shard in shards_in(folder) for row in read_shard(shard)]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows), "an id is there twice"
    assert was_killed or not list(folder.glob(".*.tmp"))
    return by_id


def damage(folder: Path) -> Path:
    """Cut the first shard of a folder in half, and return where it must be set aside."""
    path = shards_in(folder)[0].path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder / CORRUPT / path.name


@dataclass(frozen=True)
class FakeModel:
    """Opens a transcriber that reports how many samples it got.

    Args:
        source: what it is called.
        raises_at: number of samples of a recording that it raises on.
        dies_at: number of samples of a recording on which its process is killed.
        dies_once: a file that it makes before it dies, and then dies no more.
        waits: seconds that each call takes.
        languages: that it knows.
    """

    source: str = "fake"
    raises_at: int | None = None
    dies_at: int | None = None
    dies_once: Path | None = None
    waits: float = 0.0
    languages: tuple[str, ...] = ("en", "de")

    def open(self) -> FakeSpeech:
        return FakeSpeech(self)


@dataclass
class FakeSpeech:
    model: FakeModel

    @property
    def languages(self) -> tuple[str, ...]:
        return self.model.languages

    def transcribe_each(
        self, recordings: Iterable[Any], *, language: str | None, task: str, **options: Any
    ) -> Generator[tuple[int, Transcription]]:
        """All side by side, as on a device with room for them."""
        sizes = [samples.size for samples in recordings]
        time.sleep(self.model.waits)
        yield from enumerate([self._one(size, language, task, options) for size in sizes])

    def _one(self, size: int, language: str | None, task: str, options: Any) -> Transcription:
        if size == self.model.raises_at:
            raise RuntimeError("this one cannot be heard")
        if size == self.model.dies_at:
            self._die()
        seconds = size / SAMPLING_RATE
        prompt = options["options"].initial_prompt
        text = f"{size} {task}" + (f" after {prompt}" if prompt else "")
        segment = Segment(0.0, seconds, text, (1, 2), -0.5, 0.1, 1.0, 0.0)
        return Transcription(text, language or "en", (segment,), seconds)

    def _die(self) -> None:
        flag = self.model.dies_once
        if flag is not None:
            if flag.exists():
                return
            flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
