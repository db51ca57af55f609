"""A recording in chunks for Whisper: those of speech, by Silero's detector, or all of it.

The detector comes with its own package (`silero-vad`, MIT licence), which is optional.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whisper_flash_attention.audio.load import SAMPLING_RATE
from whisper_flash_attention.audio.silence import is_silence
from whisper_flash_attention.audio.voice import Heard, Voice
from whisper_flash_attention.errors import MissingPackage

# Whisper leaves speech that reaches to the end of its 30 s to the next window; silence behind it
# says that it is whole.
CHUNK_SECONDS = 27.0
# What Whisper sees at once: the length of windows that follow one another.
WINDOW_SECONDS = 30.0
# Shorter pauses do not part speech, and so much around speech belongs to it.
PAUSE_MS, AROUND_MS = 500, 200


@dataclass(frozen=True)
class Chunk:
    """A stretch of a recording to transcribe at once: mono samples `[T]`, from `start` s on."""

    start: float
    samples: npt.NDArray[np.float32]

    @property
    def seconds(self) -> float:
        return self.samples.size / SAMPLING_RATE


def speech_chunks(
    samples: npt.NDArray[np.float32], max_seconds: float = CHUNK_SECONDS
) -> Iterator[Chunk]:
    """Chunks that hold all speech of a recording, each as long as fits between two pauses.

    Args:
        samples: mono `[T]` at 16 kHz.
        max_seconds: of a chunk; speech without a pause is cut there.

    Raises:
        MissingPackage: Silero's package is not installed.
    """
    heard = Heard(Voice(detector()).hear(samples).tolist())
    for begin, end in spans_of_speech(torch.from_numpy(samples), heard, max_seconds):
        yield Chunk(begin / SAMPLING_RATE, samples[begin:end])


def all_chunks(
    samples: npt.NDArray[np.float32], max_seconds: float = WINDOW_SECONDS
) -> Iterator[Chunk]:
    """Chunks of `max_seconds` that follow one another, without those in which there is no sound.

    Args:
        samples: mono `[T]` at 16 kHz.
    """
    size = round(max_seconds * SAMPLING_RATE)
    for begin in range(0, len(samples), size):
        chunk = Chunk(begin / SAMPLING_RATE, samples[begin : begin + size])
        if not is_silence(chunk.samples):
            yield chunk


def spans_of_speech(
    samples: torch.Tensor, detector: Any, max_seconds: float
) -> Iterator[tuple[int, int]]:
    """First sample and end of every chunk of speech, in order.

    Args:
        samples: mono `[T]` at 16 kHz.
        detector: tells the probability of speech in 512 samples, as Silero's model does.
    """
    begin = end = None
    for start, stop in _speech(samples, detector, max_seconds):
        if begin is not None and end is not None and stop - begin > max_seconds * SAMPLING_RATE:
            yield begin, end
            begin = None
        begin = start if begin is None else begin
        end = stop
    if begin is not None and end is not None:
        yield begin, end


def _speech(samples: torch.Tensor, detector: Any, max_seconds: float) -> list[tuple[int, int]]:
    """First sample and end of every stretch of speech."""
    find = _detector()[1]
    found = find(
        samples,
        detector,
        sampling_rate=SAMPLING_RATE,
        max_speech_duration_s=max_seconds,
        min_silence_duration_ms=PAUSE_MS,
        speech_pad_ms=AROUND_MS,
    )
    return [(stretch["start"], stretch["end"]) for stretch in found]


def detector() -> Any:
    """Silero's model. Raises `MissingPackage` where its package is not installed."""
    return _detector()[0]


@lru_cache(maxsize=1)
def _detector() -> tuple[Any, Any]:
    """Silero's model, and its function that finds speech."""
    threads = torch.get_num_threads()
    try:
        from silero_vad import get_speech_timestamps, load_silero_vad
    except ImportError as error:
        raise MissingPackage(
            "voice activity detection needs the package silero-vad, which is not installed: "
            "pip install 'whisper-flash-attention[vad]'"
        ) from error
    finally:
        # Importing it sets PyTorch to one thread.
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        # The package loads its model in a way that PyTorch wants to give up.
        warnings.simplefilter("ignore", DeprecationWarning)
        return load_silero_vad(), get_speech_timestamps
