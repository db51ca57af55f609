"""Recordings with transcripts: their manifest, and samples of up to 30 s made of them.

MLPerf Inference joins LibriSpeech's utterances, which are short, to samples of nearly 30 s; so is
done here with any recordings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.benchmark.features import CLIP_SAMPLES, SAMPLING_RATE, Samples
from whisper_flash_attention.errors import BenchmarkError

# Between two utterances of a sample, as MLPerf has it.
PAUSE_SAMPLES = SAMPLING_RATE // 2
PATH_FIELDS, TEXT_FIELDS = ("audio_filepath", "file"), ("transcript", "text")


@dataclass(frozen=True)
class Utterance:
    """A recording and what is spoken in it."""

    path: Path
    transcript: str


@dataclass(frozen=True)
class Sample:
    """Consecutive utterances: mono samples at 16 kHz, at most 30 s, and their transcript."""

    samples: Samples
    transcript: str

    @property
    def seconds(self) -> float:
        return self.samples.size / SAMPLING_RATE


def read_utterances(manifest: Path | None) -> list[Utterance]:
    """Read a manifest: a JSON list, or lines of JSON.

    Args:
        manifest: objects with a path, relative to the manifest ("file", "audio_filepath", or
            "files" as in MLPerf's manifests), and a "transcript" or "text". None stands for the
            recordings that come with this package.

    Raises:
        BenchmarkError: it cannot be read, or an object lacks a path or a transcript.
    """
    if manifest is None:
        return [Utterance(clip.path, clip.transcript) for clip in bundled_recordings()]
    try:
        text = manifest.read_text("utf-8")
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:  # a decoding error is a ValueError, too
        raise BenchmarkError(f"manifest {manifest} cannot be read: {error}") from error
    if not rows:
        raise BenchmarkError(f"manifest {manifest} is empty")
    return [_utterance(row, number, manifest) for number, row in enumerate(rows, start=1)]


def _utterance(row: Any, number: int, manifest: Path) -> Utterance:
    values: Mapping[str, Any] = row if isinstance(row, dict) else {}
    found = [values.get(name) for name in PATH_FIELDS]
    with suppress(KeyError, IndexError, TypeError):  # which manifests but MLPerf's lack
        found.append(values["files"][0]["fname"])
    path = next((each for each in found if isinstance(each, str) and each), None)
    texts = [values.get(name) for name in TEXT_FIELDS]
    transcript = next((each for each in texts if isinstance(each, str) and each), None)
    if path is None or transcript is None:
        raise BenchmarkError(
            f"entry {number} of manifest {manifest} lacks a path or a transcript: give objects "
            "with 'file' and 'transcript'"
        )
    return Utterance(manifest.parent / path, transcript)


def repack(
    utterances: Sequence[Utterance], load: Callable[[Path], Samples] = load_audio
) -> list[Sample]:
    """Join consecutive utterances of one source to samples of at most 30 s, half a second between.

    Files whose names differ in their last number alone are of one source. What is longer than 30 s
    by itself is left out, as MLPerf does.

    Raises:
        AudioError: a recording cannot be read.
        BenchmarkError: nothing is left.
    """
    samples = [Sample(*each) for each in _joined(utterances, load)]
    if not samples:
        raise BenchmarkError("no recording of the manifest is at most 30 s long")
    return samples


def _joined(
    utterances: Sequence[Utterance], load: Callable[[Path], Samples]
) -> Iterator[tuple[Samples, str]]:
    parts: list[Samples] = []
    texts: list[str] = []
    current = None
    pause = np.zeros(PAUSE_SAMPLES, np.float32)
    for utterance in utterances:
        samples = load(utterance.path)
        if samples.size > CLIP_SAMPLES:
            continue
        source = _source(utterance.path)
        length = sum(part.size for part in parts) + pause.size + samples.size
        if parts and (source != current or length > CLIP_SAMPLES):
            yield np.concatenate(parts), " ".join(texts)
            parts, texts = [], []
        parts += [pause, samples] if parts else [samples]
        texts.append(utterance.transcript)
        current = source
    if parts:
        yield np.concatenate(parts), " ".join(texts)


def _source(path: Path) -> tuple[Path, str]:
    return path.parent, re.sub(r"[-_]?\d+$", "", path.stem)
