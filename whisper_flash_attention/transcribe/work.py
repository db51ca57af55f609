"""Recordings on their way: how they are opened, what is asked of them, what was heard so far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.ahead import Opened, open_ahead
from whisper_flash_attention.audio.sound import Sound, open_sound
from whisper_flash_attention.audio.waveforms import unchecked_samples
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.transcribe.asking import Wish
from whisper_flash_attention.transcribe.prompting import Hints
from whisper_flash_attention.transcribe.segments import Segment, Transcription

if TYPE_CHECKING:
    from torch import Tensor

    from whisper_flash_attention.audio.vad import Chunk
    from whisper_flash_attention.transcribe.batched import Speech
    from whisper_flash_attention.transcribe.reading import Read, Reading

    # A file, mono samples `[T]` in floating point at 16 kHz, or what `open_sound` gave.
    Audio = str | Path | npt.NDArray[np.floating[Any]] | Tensor | Sound


@dataclass
class Work:
    """A recording, what is asked of it, and what was heard so far.

    Attributes:
        language: code of the language spoken; None until it is detected.
        seconds: length of the recording, once it is open.
        reading: what a reader works on, as long as it does.
        chunks: of speech, in batched mode.
        is_done: whether all of it was heard.
        detected: probabilities of languages, as a reading has them.
    """

    audio: Audio
    wish: Wish
    language: str | None = None
    seconds: float = 0.0
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
    def hints(self) -> Hints:
        return self.wish.hints

    def take(self, read: Read) -> None:
        """Note what a window says."""
        assert self.reading is not None
        self.language = self.reading.language
        self.detected = self.reading.detected
        self.segments += read.segments
        if self.chunks is None:
            self.is_done = read.done >= read.total
        else:  # what follows the last speech is not read
            self.chunks.answered()
            self.is_done = self.chunks.are_done
        if self.is_done:
            self.reading = None

    def within(self, segment: Segment) -> Segment:
        """The segment, not reaching beyond the recording."""
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


def open_sounds(works: Sequence[Work]) -> Generator[Sound]:
    """What is heard of every recording, in order; files are decoded ahead, a few at a time.

    Raises:
        AudioError: where a file cannot be read, or samples are not such.
    """
    files = [work.audio for work in works if isinstance(work.audio, str | Path)]
    with closing(cast("Generator[Opened]", open_ahead(files))) as opened:
        for work in works:
            is_file = isinstance(work.audio, str | Path)
            yield _sound(next(opened)) if is_file else sound_of(work.audio)


def sound_of(audio: Audio) -> Sound:
    """What is heard of a recording.

    Raises:
        AudioError: the file cannot be read, or samples are not such.
    """
    if isinstance(audio, Sound):
        return audio
    return open_sound(audio) if isinstance(audio, str | Path) else Sound(_mono_samples(audio))


def _sound(opened: Opened) -> Sound:
    if opened.sound is None:
        assert opened.error is not None
        raise opened.error
    return opened.sound


def _mono_samples(audio: npt.NDArray[np.floating[Any]] | Tensor) -> npt.NDArray[np.float32]:
    """Check samples that a caller brings, and return them as float32 `[T]`.

    Whether they are finite is found when they are listened to.
    """
    if not hasattr(audio, "dtype"):
        raise AudioError(f"a recording is a path, or samples, but got {type(audio).__name__}")
    if isinstance(audio, np.ndarray):
        is_floating = np.issubdtype(audio.dtype, np.floating)
    else:
        is_floating = audio.is_floating_point()
    if audio.ndim != 1 or not is_floating:
        kind = str(audio.dtype).removeprefix("torch.")
        raise AudioError(
            f"samples must be mono [T] in floating point at 16 kHz; got {kind} of shape "
            f"{list(audio.shape)}"
        )
    return unchecked_samples(audio, SAMPLING_RATE)
