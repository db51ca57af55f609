"""A recording in chunks for Whisper: its speech, by Silero's detector, or all of it.

Where the detector (`voice`) finds no speech between chunks although the sound stands out from the
noise, that is a chunk, too, marked as doubtful. Without it a recording is split where it is
quietest.

Levels are mean powers of frames in decibels of full scale. Of samples in memory they are computed
where they are needed; a recording that is not held is read twice, for probabilities and levels, and
for the chunks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples, is_silence
from whisper_flash_attention.audio.threads import in_threads, one_core
from whisper_flash_attention.audio.voice import FRAME, Voice, detector, stretches_of
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.options import VadOptions

FRAME_SECONDS = FRAME / SAMPLING_RATE
# Frames that are read at a time.
FRAMES_PER_BLOCK = 1024

# Whisper leaves speech that reaches to the end of its 30 s to the next window; silence after it
# marks it as complete.
CHUNK_SECONDS = 27.0
# A chunk without the detector ends in the quietest place after this many seconds.
EARLIEST_CUT = 24.0
# Length of Whisper's window.
WINDOW_SECONDS = 30.0
# Pauses that do not end a stretch of speech, and padding around it: in chunks, which hold several
# stretches, and in sequential mode, where every stretch begins a window.
CHUNK_PAUSE_MS, CHUNK_PAD_MS = 500, 200
STRETCH_PAUSE_MS, STRETCH_PAD_MS = 2000, 400

# Digital silence, and dither around it: below one step of 16 bits.
SILENT_DB = -90.0
# The level that a tenth of the frames with sound do not reach counts as the recording's noise.
NOISE_PERCENTILE = 10
# Sound stands out if it is this much above the noise, and not this much below the speech.
ABOVE_NOISE_DB, BELOW_SPEECH_DB = 10.0, 22.0
# Recordings are cut in the middle of the quietest stretch of this many frames (0.29 s).
PAUSE_FRAMES = 9
# Sound between chunks: joined across shorter pauses, decoded if there are this many frames of it,
# with this many frames around it.
SOUND_PAUSE, SOUND_FRAMES, SOUND_PAD = 16, 16, 6
# Its highest probability of speech, as a share of the detector's threshold: noise, hum and chords
# stay below 0.13, speech that is missed over a radio reaches 0.4.
LEAST_SHARE = 0.3

Decibels = Samples
Flags = npt.NDArray[np.bool_]
# Levels of the frames from one to before another: `[N]`.
Levels: TypeAlias = Callable[[int, int], Decibels]


@dataclass(frozen=True)
class Span:
    """The stretch that a chunk covers, in samples of its recording.

    Args:
        begin, end: first sample, and the one after the last.
        speech: first samples and ends of the detected speech in it, in order, without padding; of a
            doubtful span, of its sound.
        is_doubtful: whether the detector found no speech in it.
    """

    begin: int
    end: int
    speech: tuple[tuple[int, int], ...] = ()
    is_doubtful: bool = False


@dataclass(frozen=True)
class Speech:
    """Stretches of speech in a recording; without a detector, of what stands out from the noise.

    Args:
        find: returns their starts and ends in order, in seconds; called when they are first needed.
    """

    find: Callable[[], Iterable[tuple[float, float]]] = tuple

    @cached_property
    def _bounds(self) -> npt.NDArray[np.float64]:
        return np.array([*self.find()], np.float64).reshape(-1, 2)

    def within(self, start: float, end: float) -> tuple[tuple[float, float], ...]:
        """Starts and ends of the stretches between two times."""
        clipped = self._bounds.clip(start, end)
        return tuple((a, b) for a, b in clipped[clipped[:, 0] < clipped[:, 1]].tolist())

    def seconds_within(self, start: float, end: float) -> float:
        """Seconds of speech between two times."""
        return float(np.diff(self._bounds.clip(start, end)).sum()) if start < end else 0.0


NO_SPEECH = Speech()


@dataclass(frozen=True)
class Chunk:
    """A stretch of a recording to transcribe at once: mono samples `[T]`, from `start` s on.

    Args:
        recording_speech: speech of the whole recording.
        is_doubtful: as in `Span`.
    """

    start: float
    samples: Samples
    recording_speech: Speech = NO_SPEECH
    is_doubtful: bool = False

    @property
    def seconds(self) -> float:
        return self.samples.size / SAMPLING_RATE

    @property
    def end(self) -> float:
        return self.start + self.seconds

    @property
    def speech(self) -> tuple[tuple[float, float], ...]:
        """Starts and ends of the speech in it, in seconds of the recording."""
        return self.recording_speech.within(self.start, self.end)

    def has_speech(self, start: float, end: float, seconds: float) -> bool:
        """Whether there are at least `seconds` of speech between two times of the recording.

        Speech is not computed where the times are closer than that.
        """
        start, end = max(start, self.start), min(end, self.end)
        if end - start < seconds:
            return False
        return self.recording_speech.seconds_within(start, end) >= seconds

    def part(self, start: float, end: float, *, is_doubtful: bool | None = None) -> Chunk:
        """The part of the chunk between two times of the recording."""
        first = max(0, round((start - self.start) * SAMPLING_RATE))
        last = round(min(end - self.start, self.seconds) * SAMPLING_RATE)
        doubtful = self.is_doubtful if is_doubtful is None else is_doubtful
        start = self.start + first / SAMPLING_RATE
        return Chunk(start, self.samples[first:last], self.recording_speech, doubtful)


def find_speech(
    audio: AudioSource,
    max_seconds: float = CHUNK_SECONDS,
    options: VadOptions | None = None,
    *,
    threads: int = 0,
) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and chunks that hold all its speech.

    Each is as long as fits between two pauses.

    Args:
        max_seconds: of a chunk; speech without a pause is cut there.
        options: of the detector.
        threads: that run the detector, each on one core; 0 runs it in the caller's, on all cores.

    Raises:
        AudioError: as `AudioSource.blocks`.
        MissingPackage: Silero's package is not installed.
    """
    size, probabilities, levels = _scan(audio, Voice(detector()), threads)
    spans = chunk_spans(size, probabilities, levels, max_seconds, options)
    stretches = [(a / SAMPLING_RATE, b / SAMPLING_RATE) for span in spans for a, b in span.speech]
    return size / SAMPLING_RATE, cut(audio, spans, Speech(lambda: stretches))


def find_stretches(
    audio: AudioSource, options: VadOptions | None = None, *, threads: int = 0
) -> tuple[tuple[float, float], ...]:
    """Starts and ends of the stretches of speech that are read one after the other, in seconds.

    Args:
        threads: as for `find_speech`.

    Raises:
        AudioError: as `AudioSource.blocks`.
        MissingPackage: Silero's package is not installed.
    """
    options = options or VadOptions()
    size, probabilities, _ = _scan(audio, Voice(detector()), threads)
    longest = options.max_speech_duration_s or math.inf
    found = _stretches(size, probabilities, options, longest, STRETCH_PAUSE_MS, STRETCH_PAD_MS)
    return tuple((begin / SAMPLING_RATE, end / SAMPLING_RATE) for begin, end in found)


def cut_all(
    audio: AudioSource, max_seconds: float = CHUNK_SECONDS
) -> tuple[float, Iterator[Chunk]]:
    """Length of a recording in seconds, and chunks of all of it, cut in quiet places.

    Chunks without sound are left out.

    Args:
        max_seconds: of a chunk; the last may be as long as Whisper's window.

    Raises:
        AudioError: as `AudioSource.blocks`.
    """
    size, _, levels = _scan(audio)
    frames = -(-size // FRAME)

    def sounding() -> Iterable[tuple[float, float]]:
        found: Iterable[tuple[float, float]]
        found = (FRAME_SECONDS * runs(standing_out(levels(0, frames)), pause=2)).tolist()
        return found

    chunks = cut(audio, covering_spans(size, levels, max_seconds), Speech(sounding))
    return size / SAMPLING_RATE, (chunk for chunk in chunks if not is_silence(chunk.samples))


def _scan(
    audio: AudioSource, voice: Voice | None = None, threads: int = 0
) -> tuple[int, npt.NDArray[np.float32], Levels]:
    """Number of samples, and of every frame the probability of speech and the level."""
    held = audio.samples
    size, probabilities, known = 0, [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]

    def blocks() -> Iterator[Samples]:
        nonlocal size
        for block in audio.blocks(FRAME_SECONDS * FRAMES_PER_BLOCK):
            size += block.size
            if held is None:
                known.append(levels_of(block))
            yield block

    if voice is not None:
        frames = map(voice.frames, blocks())
        encoded: Iterator[Tensor] = map(voice.encode, frames)
        if threads > 1:
            encoded = in_threads(voice.encode, frames, threads)
        with one_core() if threads else nullcontext():
            probabilities += [voice.follow(each).numpy() for each in encoded]
    elif held is None:
        deque(blocks(), maxlen=0)
    chances = np.concatenate(probabilities)
    if held is not None:
        samples = held
        return held.size, chances, lambda a, b: levels_of(samples[a * FRAME : b * FRAME])
    levels = np.concatenate(known)
    return size, chances, lambda a, b: levels[a:b]


def cut(audio: AudioSource, spans: Iterable[Span], speech: Speech = NO_SPEECH) -> Iterator[Chunk]:
    """Chunks of a recording, given their spans in order, and its speech."""
    held = audio.samples
    blocks = audio.blocks() if held is None else iter(())
    room, first = np.zeros(0, np.float32) if held is None else held, 0
    for span in spans:
        while first + room.size < span.end:
            kept = room[max(0, span.begin - first) :]
            first += room.size - kept.size
            block = next(blocks, None)
            if block is None:
                raise AudioError(f"{audio.name}: became shorter while it was read")
            room = np.concatenate([kept, block])
        samples = room[span.begin - first : span.end - first]
        samples = samples.copy() if held is None else samples
        yield Chunk(span.begin / SAMPLING_RATE, samples, speech, span.is_doubtful)


def covering_spans(size: int, levels: Levels, max_seconds: float = CHUNK_SECONDS) -> list[Span]:
    """Spans that cover a recording of `size` samples without a gap, cut in its quiet places.

    Args:
        max_seconds: of a span; the last may be as long as Whisper's window.
    """
    most = max(1, int(max_seconds / FRAME_SECONDS))
    least = max(1, int(most * EARLIEST_CUT / CHUNK_SECONDS))
    rest = round(max(max_seconds, min(WINDOW_SECONDS, max_seconds + 3)) * SAMPLING_RATE)
    cuts, first = [0], 0
    while size - first * FRAME > rest:
        first += least + quietest(levels(first + least, first + most))
        cuts.append(first * FRAME)
    return [Span(begin, end) for begin, end in pairwise([*cuts, size]) if begin < end]


def chunk_spans(
    size: int,
    probabilities: npt.NDArray[np.float32],
    levels: Levels,
    max_seconds: float = CHUNK_SECONDS,
    options: VadOptions | None = None,
) -> list[Span]:
    """Spans of the chunks that hold all speech, and of doubtful ones between them, in order.

    Args:
        size: samples of the recording.
        probabilities: of speech in its frames, `[N]`.
        max_seconds: of a span.
        options: of the detector; its longest speech is the longest span, too.
    """
    options = options or VadOptions()
    max_seconds = min(options.max_speech_duration_s or max_seconds, WINDOW_SECONDS)
    stretches = _stretches(size, probabilities, options, max_seconds, CHUNK_PAUSE_MS, CHUNK_PAD_MS)
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
    may_be_speech = probabilities >= LEAST_SHARE * options.threshold
    doubtful = _sounding_between(spans, size, levels, may_be_speech, max_seconds)
    return sorted([*spans, *doubtful], key=lambda span: span.begin)


def _without_padding(stretch: tuple[int, int], pad: int) -> tuple[int, int]:
    begin, end = stretch[0] + pad, stretch[1] - pad
    return (begin, end) if begin < end else stretch


def _sounding_between(
    spans: Sequence[Span], size: int, levels: Levels, may_be_speech: Flags, max_seconds: float
) -> Iterator[Span]:
    """Spans of sound that stands out from the noise and may be speech, outside of all chunks.

    Where there is no speech at all, there is no level to compare with, and there are none.
    """
    frames = may_be_speech.size
    speech, free = np.zeros(frames, bool), np.ones(frames, bool)
    for span in spans:
        free[span.begin // FRAME : -(-span.end // FRAME)] = False
        for begin, end in span.speech:
            speech[begin // FRAME : -(-end // FRAME)] = True
    if not spans or not (may_be_speech & free).any():
        return
    loud = standing_out(levels(0, frames), speech) & free
    most = int(max_seconds / FRAME_SECONDS) - 2 * SOUND_PAD
    for first, last in _outside(runs(loud, SOUND_PAUSE), free):
        for begin in range(first, last, most):
            end = min(begin + most, last)
            if int(loud[begin:end].sum()) < SOUND_FRAMES or not may_be_speech[begin:end].any():
                continue
            low, high = begin, end
            while low > max(0, begin - SOUND_PAD) and begin == first and free[low - 1]:
                low -= 1
            while high < min(frames, end + SOUND_PAD) and end == last and free[high]:
                high += 1
            sound = (begin * FRAME, min(end * FRAME, size))
            yield Span(low * FRAME, min(high * FRAME, size), (sound,), is_doubtful=True)


def _outside(found: npt.NDArray[np.int64], free: Flags) -> Iterator[tuple[int, int]]:
    """Runs of frames `[N, 2]` without those that are not free."""
    for first, last in found.tolist():
        for begin, end in runs(free[first:last], pause=1).tolist():
            yield first + begin, first + end


def _stretches(
    size: int,
    probabilities: npt.NDArray[np.float32],
    options: VadOptions,
    max_seconds: float,
    pause_ms: int,
    pad_ms: int,
) -> list[tuple[int, int]]:
    """First samples and ends of every stretch of speech, with its padding."""
    pause, pad = options.min_silence_duration_ms, options.speech_pad_ms
    found = stretches_of(
        probabilities.tolist(),
        audio_length_samples=size,
        sampling_rate=SAMPLING_RATE,
        threshold=options.threshold,
        neg_threshold=options.neg_threshold,
        min_speech_duration_ms=options.min_speech_duration_ms,
        max_speech_duration_s=max_seconds,
        min_silence_duration_ms=pause_ms if pause is None else pause,
        speech_pad_ms=pad_ms if pad is None else pad,
    )
    return [(int(stretch["start"]), int(stretch["end"])) for stretch in found]


def levels_of(samples: Samples) -> Decibels:
    """Levels of the frames of samples `[T]`; the last may be shorter."""
    whole = samples.size // FRAME * FRAME
    # Without a copy; a frame's sum needs no more than single precision.
    frames = samples[:whole].reshape(-1, FRAME)
    power = np.einsum("nt,nt->n", frames, frames) / np.float32(FRAME)
    if samples.size > whole:
        rest = np.mean(np.square(samples[whole:], dtype=np.float64))
        power = np.append(power, np.float32(rest))
    return np.asarray(10 * np.log10(np.maximum(power, np.float32(1e-12))), np.float32)


def standing_out(levels: Decibels, speech: Flags | None = None) -> Flags:
    """Whether each frame is well above the noise, and about as loud as the speech: `[N]`.

    Args:
        levels: of a whole recording, `[N]`.
        speech: which frames are known to be speech, `[N]`; None takes the loudest tenth for it.
    """
    sounding = levels[levels > SILENT_DB]
    if not sounding.size:
        return np.zeros(levels.size, bool)
    noise, loud = np.percentile(sounding, [NOISE_PERCENTILE, 100 - NOISE_PERCENTILE]).tolist()
    if speech is not None:
        loud = float(np.median(levels[speech])) if speech.any() else math.inf
    # In steady sound the first bound is above all levels.
    bound = max(noise + ABOVE_NOISE_DB, loud - BELOW_SPEECH_DB, SILENT_DB)
    found: Flags = levels >= bound
    return found


def runs(flags: Flags, pause: int) -> npt.NDArray[np.int64]:
    """First frames and ends `[N, 2]` of stretches of True; fewer than `pause` False join them."""
    bounds = np.flatnonzero(np.diff(flags, prepend=False, append=False)).reshape(-1, 2)
    parts = bounds[1:, 0] - bounds[:-1, 1] >= pause
    begins = bounds[np.concatenate([[True], parts])[: len(bounds)], 0]
    ends = bounds[np.concatenate([parts, [True]])[: len(bounds)], 1]
    return np.stack([begins, ends], axis=1)


def quietest(levels: Decibels) -> int:
    """The frame in the middle of the quietest pause in levels `[N]`, the latest of equals."""
    power = 10 ** (levels.astype(np.float64) / 10)
    if power.size <= PAUSE_FRAMES:
        return power.size // 2
    total = np.concatenate([[0.0], np.cumsum(power)])
    pauses = total[PAUSE_FRAMES:] - total[:-PAUSE_FRAMES]
    # Differences of sums are not exactly 0 in silence.
    return int(np.flatnonzero(pauses <= pauses.min() + 1e-12)[-1]) + PAUSE_FRAMES // 2
