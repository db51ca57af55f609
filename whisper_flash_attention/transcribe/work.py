"""Recordings on their way: how they are opened, what is asked of them, what was heard so far.

A recording is one `Work`, or one per channel where those are transcribed one by one
(`channels.py` brings them together again).
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any, cast

from whisper_flash_attention.audio.audio_source import (
    AudioSource,
    ChannelSources,
    open_audio,
    source_of_samples,
    work_ahead,
)
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.transcribe.arguments import Wish
from whisper_flash_attention.transcribe.prompts import PromptFields
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.validation import shown

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from whisper_flash_attention.audio.container import Source
    from whisper_flash_attention.audio.vad import Chunk
    from whisper_flash_attention.transcribe.batched import Speech
    from whisper_flash_attention.transcribe.reading import Read, Reading

    Samples = npt.NDArray[Any] | Tensor
    # A path, a file's bytes, or a file open for reading bytes; samples as `recording_channels`
    # takes them, at 16 kHz or with their rate; or what `open_audio` gave.
    Audio = Source | Samples | tuple[Samples, float] | AudioSource | ChannelSources


@dataclass
class Work:
    """A recording, what is asked of it, and what was heard so far.

    Attributes:
        number: of the recording in its call, from 0.
        channel: number of the only channel that is read, from 1, where each is read by itself.
        language: code of the language spoken; None until it is detected.
        seconds: length of the recording, once it is open.
        share: of the recording that was read, 0 to 1.
        reading: what a reader works on, as long as it does.
        chunks: of speech, in batched mode.
        is_done: whether all of it was heard.
        detected: probabilities of languages, as a reading has them.
    """

    audio: Audio
    wish: Wish
    number: int = 0
    channel: int | None = None
    language: str | None = None
    seconds: float = 0.0
    share: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    reading: Reading | Speech | None = None
    chunks: Outstanding | None = None
    is_done: bool = False
    detected: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.language = self.wish.options.language

    @property
    def task(self) -> str:
        return self.wish.options.task

    @property
    def prompt_fields(self) -> PromptFields:
        return self.wish.prompt_fields

    def take(self, read: Read) -> None:
        """Note what a window says."""
        assert self.reading is not None
        self.language = self.reading.language
        self.detected = self.reading.detected
        self.segments += read.segments
        self.share = read.done / read.total
        if self.chunks is None:
            self.is_done = read.done >= read.total
        else:  # what follows the last speech is not read
            self.chunks.answered()
            self.is_done = self.chunks.are_done
        if self.is_done:
            self.reading = None

    def take_silence(self, seconds: float) -> None:
        """Note that there is no sound in the recording, which is this long."""
        self.seconds, self.share, self.is_done = seconds, 1.0, True

    def within(self, segment: Segment) -> Segment:
        """The segment with its channel, not reaching beyond the recording."""
        if self.channel is not None:
            segment = replace(segment, channel=self.channel)
        if segment.end <= self.seconds:
            return segment
        return replace(segment, start=min(segment.start, self.seconds), end=self.seconds)

    def transcription(self, tokenizer: Any) -> Transcription:
        segments = tuple(self.within(segment) for segment in self.segments)
        # Blanks between segments are in their tokens, where the language has any.
        texts = (tokenizer.decode(each.tokens, skip_special_tokens=True) for each in segments)
        # In a recording without any sound no language can be heard.
        language, chances = self.language or "en", mean_probabilities(self.detected)
        if chances:
            language = chances[0][0]
        return Transcription(
            text="".join(texts).strip(),
            language=language,
            segments=segments,
            seconds=self.seconds,
            language_probability=chances[0][1] if chances else None,
            all_language_probs=chances,
        )


def mean_probabilities(detected: Sequence[Mapping[str, float]]) -> tuple[tuple[str, float], ...]:
    """Pairs of languages and their mean probabilities over several windows, likeliest first."""
    totals: dict[str, float] = {}
    for each in detected:
        for code, chance in each.items():
            totals[code] = totals.get(code, 0.0) + chance
    pairs = ((code, total / len(detected)) for code, total in totals.items())
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


class Outstanding:
    """Chunks of a recording, and whether all of them were answered.

    The next one is looked at ahead, so that the last is known for the last. One thread may take
    them while another tells that they were answered.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = iter(chunks)
        self._next = next(self._chunks, None)
        self._given = self._answered = 0  # each is counted by one thread

    def __iter__(self) -> Iterator[Chunk]:
        while self._next is not None:
            # In this order: whoever finds that no chunk is left knows of all that were given.
            chunk = self._next
            self._given += 1
            self._next = next(self._chunks, None)
            yield chunk

    def answered(self) -> None:
        """One of the chunks that were given was answered."""
        self._answered += 1

    @property
    def are_done(self) -> bool:
        return self._next is None and self._given == self._answered


@dataclass
class Progress:
    """Tells the share of several recordings that is done, whenever it grows and is not all."""

    recordings: int
    tell: Callable[[float], None] | None = None
    shares: dict[int, float] = field(default_factory=dict)
    told: float = -1.0

    def note(self, index: int, share: float) -> None:
        """A recording is done to this share."""
        self.shares[index] = share
        reached = sum(self.shares.values()) / self.recordings
        if self.tell is not None and self.told < reached < 1:
            self.told = reached
            self.tell(reached)


def open_all(works: Sequence[Work]) -> Generator[AudioSource | ChannelSources]:
    """What is read of every recording, in order; files are decoded ahead, a few at a time.

    Raises:
        AudioError: where a file cannot be read, or samples are not such.
    """
    files = [work for work in works if _is_file(work.audio)]
    with closing(cast("Generator[_Opened]", work_ahead(files, _open))) as opened:
        for work in works:
            yield next(opened).result() if _is_file(work.audio) else sound_of(work)


@dataclass(frozen=True, slots=True)
class _Opened:
    """One recording that can be read, or the error that came instead."""

    sound: AudioSource | ChannelSources | None = None
    error: AudioError | None = None

    def result(self) -> AudioSource | ChannelSources:
        if self.sound is None:
            assert self.error is not None
            raise self.error
        return self.sound


def _open(work: Work, stop: Event) -> _Opened:
    try:
        return _Opened(sound_of(work, stop))
    except AudioError as error:  # raised when its turn has come
        return _Opened(error=error)


def sound_of(work: Work, stop: Event | None = None) -> AudioSource | ChannelSources:
    """What is read of a recording.

    Args:
        stop: once it is set, the result does not matter any more.

    Raises:
        AudioError: the file cannot be read, or samples are not such.
    """
    audio, options = work.audio, work.wish.options
    channel, track = options.channel, options.audio_track
    if isinstance(audio, AudioSource | ChannelSources):
        return audio
    if _is_file(audio):
        source = cast("Source", audio)
        return open_audio(source, channel=channel, track=track, stop=stop)
    if isinstance(audio, tuple):
        samples, rate = _samples_and_rate(audio)
        return source_of_samples(samples, rate, channel=channel, track=track)
    if not hasattr(audio, "dtype") and not hasattr(audio, "__array__"):
        raise AudioError(
            f"a recording is a path, bytes, a file that is open for reading bytes, samples, or "
            f"(samples, sampling rate) as a tuple, but got {shown(audio)}"
        )
    return source_of_samples(audio, channel=channel, track=track)


def is_pair(audio: object) -> bool:
    """Return whether a tuple is one recording, samples and their rate, and not two recordings."""
    return (
        isinstance(audio, tuple)
        and len(audio) == 2
        and any(isinstance(each, numbers.Number) for each in audio)
    )


def _samples_and_rate(audio: tuple[Any, ...]) -> tuple[Any, Any]:
    if not is_pair(audio) or isinstance(audio[0], numbers.Number):
        raise AudioError(
            f"samples and their rate are a tuple (samples, sampling rate), but got {shown(audio)}"
        )
    if _is_file(audio[0]):
        raise AudioError(f"{shown(audio[0])}: a file has a sampling rate of its own; leave it out")
    return audio[0], audio[1]


def _is_file(audio: object) -> bool:
    named = isinstance(audio, str | os.PathLike | bytes | bytearray | memoryview)
    return named or hasattr(audio, "read")
