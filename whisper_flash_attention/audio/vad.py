"""A recording in chunks for Whisper: its speech, by Silero's detector, or all of it.

The detector comes with its own package (`silero-vad`, MIT licence), which is optional. Where it
finds no speech between chunks although the sound stands out from the noise, that is a chunk, too,
marked as doubtful. Without the detector a recording is split where it is quietest.

A recording that is not held in memory is read twice: for levels and probabilities of speech, one
of each per frame, and for the chunks, which are those of `speech_chunks` and `all_chunks` on all of
its samples.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.frames import (
    FRAME,
    Decibels,
    KnownProbabilities,
    Levels,
    Voice,
    levels_of,
    quietest,
    runs,
    standing_out,
)
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples, check_finite, is_silence
from whisper_flash_attention.errors import AudioError, MissingPackage
from whisper_flash_attention.options import VadOptions

# Whisper leaves speech that reaches to the end of its 30 s to the next window; silence after it
# says that it is whole.
CHUNK_SECONDS = 27.0
# A chunk without the detector ends in the quietest place after this many seconds.
EARLIEST_CUT = 24.0
# What Whisper sees at once.
WINDOW_SECONDS = 30.0
# Pauses that do not end a stretch of speech, and padding around it: in chunks, which hold several
# stretches, and in sequential mode, where every stretch begins a window.
CHUNK_PAUSE_MS, CHUNK_PAD_MS = 500, 200
STRETCH_PAUSE_MS, STRETCH_PAD_MS = 2000, 400
# Sound between chunks: joined across shorter pauses, read if there are this many frames of it, with
# this many frames around it.
SOUND_PAUSE, SOUND_FRAMES, SOUND_PAD = 16, 16, 6
# Its highest probability of speech, as a share of the detector's threshold: noise, hum and chords
# stay below 0.13, speech that is missed over a radio reaches 0.4.
LEAST_SHARE = 0.3

FRAME_SECONDS = FRAME / SAMPLING_RATE


@dataclass(frozen=True)
class Span:
    """The stretch that a chunk covers, in samples of its recording.

    Args:
        begin, end: first sample, and the one after the last.
        speech: first samples and ends of what is speech in it, or without a detector of what stands
            out from the noise; in order, without padding.
        is_doubtful: whether the detector found no speech in it.
    """

    begin: int
    end: int
    speech: tuple[tuple[int, int], ...] = ()
    is_doubtful: bool = False


@dataclass(frozen=True)
class Chunk:
    """A stretch of a recording to transcribe at once: mono samples `[T]`, from `start` s on.

    Args:
        speech: starts and ends of the speech in it, in seconds of the recording, as in `Span`.
        is_doubtful: as in `Span`.
    """

    start: float
    samples: Samples
    speech: tuple[tuple[float, float], ...] = ()
    is_doubtful: bool = False

    @property
    def seconds(self) -> float:
        return self.samples.size / SAMPLING_RATE

    @property
    def end(self) -> float:
        return self.start + self.seconds

    def speech_within(self, start: float, end: float) -> float:
        """Seconds of speech between two times of the recording."""
        return sum(max(0.0, min(end, b) - max(start, a)) for a, b in self.speech)

    def part(self, start: float, end: float, *, is_doubtful: bool | None = None) -> Chunk:
        """The part of the chunk between two times of the recording."""
        first = max(0, round((start - self.start) * SAMPLING_RATE))
        last = round(min(end - self.start, self.seconds) * SAMPLING_RATE)
        start = self.start + first / SAMPLING_RATE
        end = self.start + last / SAMPLING_RATE
        speech = tuple(
            (max(start, a), min(end, b)) for a, b in self.speech if a < end and b > start
        )
        doubtful = self.is_doubtful if is_doubtful is None else is_doubtful
        return Chunk(start, self.samples[first:last], speech, doubtful)


def chunk_of(span: Span, samples: Samples) -> Chunk:
    """The chunk of a span, given the span's samples."""
    speech = tuple((a / SAMPLING_RATE, b / SAMPLING_RATE) for a, b in span.speech)
    return Chunk(span.begin / SAMPLING_RATE, samples, speech, span.is_doubtful)


def speech_chunks(
    samples: Samples,
    max_seconds: float = CHUNK_SECONDS,
    options: VadOptions | None = None,
) -> Iterator[Chunk]:
    """Chunks that hold all speech of a recording, each as long as fits between two pauses.

    Args:
        samples: mono `[T]` at 16 kHz.
        max_seconds: of a chunk; speech without a pause is cut there.
        options: of the detector.

    Raises:
        MissingPackage: Silero's package is not installed.
    """
    if not samples.size:
        return
    probabilities = Voice(detector()).probabilities(samples).tolist()
    levels = levels_of(samples)
    for span in chunk_spans(samples.size, probabilities, levels, max_seconds, options):
        yield chunk_of(span, samples[span.begin : span.end])


def all_chunks(samples: Samples, max_seconds: float = CHUNK_SECONDS) -> Iterator[Chunk]:
    """Chunks that follow one another, cut in quiet places, without those that hold no sound.

    Args:
        samples: mono `[T]` at 16 kHz.
        max_seconds: of a chunk; the last may have as much as Whisper sees at once.
    """
    for span in covering_spans(samples.size, levels_of(samples), max_seconds):
        chunk = chunk_of(span, samples[span.begin : span.end])
        if not is_silence(chunk.samples):
            yield chunk


def covering_spans(size: int, levels: Decibels, max_seconds: float = CHUNK_SECONDS) -> list[Span]:
    """Spans that cover a recording without a gap, cut in its quiet places.

    Args:
        size: samples of the recording.
        levels: of its frames.
        max_seconds: of a span; the last may have as much as Whisper sees at once.
    """
    most = max(1, int(max_seconds / FRAME_SECONDS))
    least = max(1, int(most * EARLIEST_CUT / CHUNK_SECONDS))
    rest = round(max(max_seconds, min(WINDOW_SECONDS, max_seconds + 3)) * SAMPLING_RATE)
    sounding = runs(standing_out(levels), pause=2)
    cuts, first = [0], 0
    while size - first * FRAME > rest:
        first = quietest(levels, first + least, first + most)
        cuts.append(first * FRAME)
    bounds = [*cuts, size]
    return [
        Span(begin, end, _frames_within(sounding, begin, end))
        for begin, end in pairwise(bounds)
        if begin < end
    ]


def _frames_within(
    found: Sequence[tuple[int, int]], begin: int, end: int
) -> tuple[tuple[int, int], ...]:
    """Runs of frames as samples, as far as they are between two samples."""
    samples = ((first * FRAME, last * FRAME) for first, last in found)
    return tuple((max(a, begin), min(b, end)) for a, b in samples if a < end and b > begin)


def chunk_spans(
    size: int,
    probabilities: Iterable[float],
    levels: Decibels,
    max_seconds: float = CHUNK_SECONDS,
    options: VadOptions | None = None,
) -> list[Span]:
    """Spans of the chunks that hold all speech, and of doubtful ones between them, in order.

    Args:
        size: samples of the recording.
        probabilities: of speech in its frames.
        levels: of its frames.
        max_seconds: of a span.
        options: of the detector; its longest speech is the longest span, too.
    """
    options = options or VadOptions()
    longest = options.max_speech_duration_s or max_seconds
    max_seconds = min(longest, WINDOW_SECONDS)
    found = np.fromiter(probabilities, np.float32)
    stretches = _stretches(size, found.tolist(), options, max_seconds, CHUNK_PAUSE_MS, CHUNK_PAD_MS)
    pad = round((CHUNK_PAD_MS if options.speech_pad_ms is None else options.speech_pad_ms) * 16)
    groups: list[list[tuple[int, int]]] = []
    for stretch in stretches:
        if groups and stretch[1] - groups[-1][0][0] <= max_seconds * SAMPLING_RATE:
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    spans = [
        Span(group[0][0], group[-1][1], tuple(_without_padding(each, pad) for each in group))
        for group in groups
    ]
    may_be_speech = found >= LEAST_SHARE * options.threshold
    doubtful = _sounding_between(spans, size, levels, may_be_speech, max_seconds)
    return sorted([*spans, *doubtful], key=lambda span: span.begin)


def _without_padding(stretch: tuple[int, int], pad: int) -> tuple[int, int]:
    begin, end = stretch[0] + pad, stretch[1] - pad
    return (begin, end) if begin < end else stretch


def _sounding_between(
    spans: Sequence[Span],
    size: int,
    levels: Decibels,
    may_be_speech: npt.NDArray[np.bool_],
    max_seconds: float,
) -> Iterator[Span]:
    """Spans of sound that stands out from the noise and may be speech, outside of all chunks.

    Where there is no speech at all, there is no level to compare with, and there are none.
    """
    if not spans:
        return
    speech, free = np.zeros(levels.size, bool), np.ones(levels.size, bool)
    for span in spans:
        free[span.begin // FRAME : -(-span.end // FRAME)] = False
        for begin, end in span.speech:
            speech[begin // FRAME : -(-end // FRAME)] = True
    loud = np.array(standing_out(levels, speech), bool) & free
    most = int(max_seconds / FRAME_SECONDS) - 2 * SOUND_PAD
    for first, last in _outside(runs(loud, SOUND_PAUSE), free):
        for begin in range(first, last, most):
            end = min(begin + most, last)
            if int(loud[begin:end].sum()) < SOUND_FRAMES or not may_be_speech[begin:end].any():
                continue
            low, high = begin, end
            while low > max(0, begin - SOUND_PAD) and begin == first and free[low - 1]:
                low -= 1
            while high < min(levels.size, end + SOUND_PAD) and end == last and free[high]:
                high += 1
            sound = (begin * FRAME, min(end * FRAME, size))
            yield Span(low * FRAME, min(high * FRAME, size), (sound,), is_doubtful=True)


def _outside(
    found: Sequence[tuple[int, int]], free: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, int]]:
    """Runs of frames without those that are not free."""
    for first, last in found:
        for begin, end in runs(free[first:last].tolist(), pause=1):
            yield first + begin, first + end


def speech_spans(
    size: int, probabilities: Iterable[float], options: VadOptions | None = None
) -> list[tuple[int, int]]:
    """First samples and ends of stretches of speech that are read one after the other.

    Args:
        size: samples of the recording.
        probabilities: of speech in its frames.
        options: of the detector.
    """
    options = options or VadOptions()
    longest = options.max_speech_duration_s or math.inf
    return _stretches(size, probabilities, options, longest, STRETCH_PAUSE_MS, STRETCH_PAD_MS)


def _stretches(
    size: int,
    probabilities: Iterable[float],
    options: VadOptions,
    max_seconds: float,
    pause_ms: int,
    pad_ms: int,
) -> list[tuple[int, int]]:
    """First samples and ends of every stretch of speech, with its padding."""
    find = _detector()[1]
    pause, pad = options.min_silence_duration_ms, options.speech_pad_ms
    found = find(
        # In place of the samples, whose number alone matters once probabilities are known.
        torch.zeros(1).expand(size),
        KnownProbabilities(probabilities),
        sampling_rate=SAMPLING_RATE,
        threshold=options.threshold,
        neg_threshold=options.neg_threshold,
        min_speech_duration_ms=options.min_speech_duration_ms,
        max_speech_duration_s=max_seconds,
        min_silence_duration_ms=pause_ms if pause is None else pause,
        speech_pad_ms=pad_ms if pad is None else pad,
    )
    return [(int(stretch["start"]), int(stretch["end"])) for stretch in found]


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
        return seconds, speech_chunks(audio.samples, max_seconds, options)
    scan = _scan(audio, Voice(detector()))
    spans = chunk_spans(scan.size, scan.probabilities, scan.levels, max_seconds, options)
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
    scan = _scan(audio, Voice(detector()))
    spans = speech_spans(scan.size, scan.probabilities, options)
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
        return seconds, all_chunks(audio.samples, max_seconds)
    scan = _scan(audio)
    spans = covering_spans(scan.size, scan.levels, max_seconds)
    chunks = (chunk for chunk in cut(audio, spans) if not is_silence(chunk.samples))
    return scan.size / SAMPLING_RATE, chunks


def _scan(audio: AudioSource, voice: Voice | None = None) -> _Scan:
    levels, probabilities, size = Levels(), array("f"), 0
    for block in audio.blocks(FRAME * FRAMES / SAMPLING_RATE):
        size += block.size
        levels.add(block)
        if voice is not None:
            probabilities.extend(voice.probabilities(block).tolist())
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
