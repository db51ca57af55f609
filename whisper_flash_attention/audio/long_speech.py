"""Chunks of recordings of any length, in bounded memory.

A recording that is not held is read twice: for the levels and the probabilities of speech, of which
there is one each per 512 samples, and for the chunks. The chunks are those of `speech_chunks` and
`all_chunks` on all of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from whisper_flash_attention.audio import vad
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.levels import Decibels, Levels
from whisper_flash_attention.audio.load import SAMPLING_RATE
from whisper_flash_attention.audio.silence import is_silence
from whisper_flash_attention.audio.vad import CHUNK_SECONDS, Chunk, Span, chunk_of
from whisper_flash_attention.audio.voice import FRAME, Voice
from whisper_flash_attention.audio.waveforms import check_finite
from whisper_flash_attention.config import VadOptions
from whisper_flash_attention.errors import AudioError

# Of the detector, in a block.
FRAMES = 1024


@dataclass(frozen=True)
class _Scan:
    """What one pass over a recording gives: its samples' number, and per frame two numbers."""

    size: int
    levels: Decibels
    probabilities: array[float]


def find_speech(
    audio: AudioSource, max_seconds: float = CHUNK_SECONDS, options: VadOptions | None = None
) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and chunks that hold all its speech, as `speech_chunks`.

    Raises:
        AudioError: as `AudioSource.blocks`.
        MissingPackage: Silero's package is not installed.
    """
    if audio.samples is not None:
        check_finite(audio.samples)
        seconds = audio.samples.size / SAMPLING_RATE
        return seconds, vad.speech_chunks(audio.samples, max_seconds, options)
    scan = _scan(audio, Voice(vad.detector()))
    spans = vad.chunk_spans(scan.size, scan.probabilities, scan.levels, max_seconds, options)
    return scan.size / SAMPLING_RATE, cut(audio, spans)


def find_stretches(
    audio: AudioSource, options: VadOptions | None = None
) -> tuple[tuple[float, float], ...]:
    """Starts and ends of the stretches of speech that are read one after the other, in seconds.

    Raises:
        AudioError: as `AudioSource.blocks`.
        MissingPackage: Silero's package is not installed.
    """
    if audio.samples is not None:
        check_finite(audio.samples)
    scan = _scan(audio, Voice(vad.detector()))
    spans = vad.speech_spans(scan.size, scan.probabilities, options)
    return tuple((begin / SAMPLING_RATE, end / SAMPLING_RATE) for begin, end in spans)


def cut_all(
    audio: AudioSource, max_seconds: float = CHUNK_SECONDS
) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and all of it in chunks, as `all_chunks`.

    Raises:
        AudioError: as `AudioSource.blocks`.
    """
    if audio.samples is not None:
        check_finite(audio.samples)
        seconds = audio.samples.size / SAMPLING_RATE
        return seconds, vad.all_chunks(audio.samples, max_seconds)
    scan = _scan(audio)
    spans = vad.covering_spans(scan.size, scan.levels, max_seconds)
    chunks = (chunk for chunk in cut(audio, spans) if not is_silence(chunk.samples))
    return scan.size / SAMPLING_RATE, chunks


def _scan(audio: AudioSource, voice: Voice | None = None) -> _Scan:
    levels, probabilities, size = Levels(), array("f"), 0
    for block in audio.blocks(FRAME * FRAMES / SAMPLING_RATE):
        size += block.size
        levels.add(block)
        if voice is not None:
            probabilities.extend(voice.hear(block).tolist())
    return _Scan(size, levels.decibels, probabilities)


def cut(audio: AudioSource, spans: Iterable[Span]) -> Iterator[Chunk]:
    """Chunks of a recording, given their spans in order."""
    blocks = audio.blocks()
    room, first = np.zeros(0, np.float32), 0
    for span in spans:
        while first + room.size < span.end:
            kept = room[max(0, span.begin - first) :]
            first += room.size - kept.size
            block = next(blocks, None)
            if block is None:
                raise AudioError(f"{audio.name}: became shorter while it was read")
            room = np.concatenate([kept, block])
        yield chunk_of(span, room[span.begin - first : span.end - first].copy())
