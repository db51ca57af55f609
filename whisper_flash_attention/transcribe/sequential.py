"""OpenAI's sequential algorithm, for many recordings side by side.

A recording is read window by window: each begins where the last complete segment of the one before
ended, and may be told what was said before. Windows of one recording follow one another; those of
several are encoded and decoded together, and a recording that is done makes room for the next.

Source: `transcribe` in OpenAI's whisper/transcribe.py. As there and in Transformers' long form,
features are normalised over the whole recording, and zeros follow its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.loop import Engine
from whisper_flash_attention.transcribe.cutting import (
    FRAMES_PER_SECOND,
    Piece,
    cut,
    ends_in_silence,
)
from whisper_flash_attention.transcribe.hallucination import Heard, last_end, skip_silence
from whisper_flash_attention.transcribe.prompting import Hints, Prompter
from whisper_flash_attention.transcribe.segments import Segment
from whisper_flash_attention.transcribe.vocabulary import Vocabulary
from whisper_flash_attention.transcribe.windows import Answer, WindowDecoder
from whisper_flash_attention.transcribe.words import SpokenWindow, WindowWords, WordAligner

FRAMES = 3000
# A text that was hard to read is no guide to the next window.
UNSURE_TEMPERATURE = 0.5
# Log-mel features of sound within two steps of 16 bits around 0 are less, whatever it is.
FAINT = -0.75


class Windows(Protocol):
    """Features of one recording, as `MelWindows` has them."""

    @property
    def frames(self) -> int:
        """Of the recording, at least 1."""

    def window(self, start: int, length: int) -> Tensor:
        """Features `[mel bins, length]` from frame `start` on; starts do not decrease."""


@dataclass
class Reading:
    """A recording that is being read.

    Args:
        features: of which windows are taken.
        task: "transcribe" or "translate".
        language: code of the language spoken; None until it is detected.
        hints: what its windows are told.
        parts: first frames and ends of what is read, in order; None is all.
        said: tokens so far, the initial prompt's first.
        reset: from which of them on they are told to the next window.
        seek: the frame at which the next window begins.
        end: the frame at which the part ends that it belongs to.
        last_speech: where the last word ended, in seconds, if words are looked for.
    """

    features: Windows
    task: str
    language: str | None
    hints: Hints = field(default_factory=Hints)
    parts: tuple[tuple[int, int], ...] | None = None
    said: list[int] = field(default_factory=list)
    reset: int = 0
    seek: int = 0
    end: int = 0
    last_speech: float = 0.0

    def __post_init__(self) -> None:
        self.go_on()

    @property
    def frames(self) -> int:
        """Of the recording; features beyond are silence."""
        return self.features.frames

    @property
    def is_done(self) -> bool:
        return self.seek >= self.frames

    @property
    def is_first(self) -> bool:
        """Whether nothing was read."""
        return self.seek == (self.parts[0][0] if self.parts else 0)

    def go_on(self) -> None:
        """Move on to the next part if this one was read to its end."""
        parts = ((0, self.frames),) if self.parts is None else self.parts
        for begin, end in parts:
            if self.seek < end:
                self.seek, self.end = max(self.seek, begin), end
                return
        self.seek = self.end = self.frames

    def window(self, length: int) -> Tensor:
        """Features of the next window, `[mel bins, length]`, zeros beyond the end."""
        if self.end == self.frames:
            return self.features.window(self.seek, length)
        covered = min(length, self.end - self.seek)
        part = self.features.window(self.seek, covered)
        return torch.nn.functional.pad(part, (0, length - covered))


@dataclass(frozen=True)
class Read:
    """What one window gave.

    Args:
        index: which recording it belongs to, counted from 0.
        segments: those that say something, in seconds of the recording.
        done, total: frames read so far, and of the recording.
    """

    index: int
    segments: tuple[Segment, ...]
    done: int
    total: int


class SequentialReader:
    """Reads recordings window by window on an engine."""

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        tokenizer: Any,
        options: DecodeOptions,
        aligner: WordAligner | None = None,
    ) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._options = options
        self._aligner = aligner
        self._decoder = WindowDecoder(engine, vocabulary, tokenizer, options)
        self._prompter = Prompter(vocabulary, tokenizer, options)

    def read(self, readings: Iterable[Reading], batch_size: int) -> Iterator[Read]:
        """Read all recordings; every window is given as it is done.

        Args:
            readings: taken as there is room for them; their state goes on with the windows.
            batch_size: windows at a time, at most.
        """
        waiting = iter(enumerate(readings))
        active: dict[int, Reading] = {}
        while True:
            for index, reading in islice(waiting, batch_size - len(active)):
                reading.said[:0] = self._prompter.tokens(reading.hints.initial_prompt)
                active[index] = reading
            if not active:
                return
            yield from self._windows(active)
            active = {index: each for index, each in active.items() if not each.is_done}

    def _windows(self, active: dict[int, Reading]) -> Iterator[Read]:
        """One window of every active recording."""
        length = 2 * self._engine.weights.encoder.positions.shape[0]
        windows = torch.stack([each.window(length) for each in active.values()])
        heard = {
            index: reading
            for (index, reading), is_silent in zip(active.items(), _silent(windows), strict=True)
            if not is_silent
        }
        kept = windows if len(heard) == len(active) else windows[[i in heard for i in active]]
        taken = self._hear(list(heard.values()), kept) if heard else []
        segments = dict(zip(heard, taken, strict=True))
        for index, reading in active.items():
            if index not in heard:
                reading.seek = min(reading.seek + length, reading.end)
            reading.go_on()
            done = min(reading.seek, reading.frames)
            yield Read(index, segments.get(index, ()), done, reading.frames)

    def _hear(self, readings: list[Reading], windows: Tensor) -> list[tuple[Segment, ...]]:
        """What windows `[B, mel bins, length]` of so many recordings say."""
        states = self._engine.encode(windows)
        self._detect_languages(readings, states)
        answers = self._decoder.decode(states, [self._prompt(reading) for reading in readings])
        starts, length = [reading.seek for reading in readings], windows.shape[2]
        taken = [
            self._take(reading, answer, length)
            for reading, answer in zip(readings, answers, strict=True)
        ]
        if self._aligner is not None:
            spoken = [
                _window(reading, states[row], taken[row], starts[row], length)
                for row, reading in enumerate(readings)
            ]
            for row, found in enumerate(self._aligner.add_words(spoken)):
                taken[row] = self._go_on_behind_words(
                    readings[row], answers[row], found, starts[row], length
                )
        for reading, answer, segments in zip(readings, answers, taken, strict=True):
            self._note(reading, answer, segments)
        return taken

    def _detect_languages(self, readings: list[Reading], states: Tensor) -> None:
        """Detect what is spoken where that was not said, in the first window."""
        unknown = [i for i, reading in enumerate(readings) if reading.language is None]
        if unknown:
            for i, code in zip(unknown, self._decoder.languages(states[unknown]), strict=True):
                readings[i].language = code

    def _prompt(self, reading: Reading) -> list[int]:
        assert reading.language is not None
        return self._prompter.prompt(
            reading.language,
            reading.task,
            reading.said,
            reading.hints,
            is_first=reading.is_first,
            forgotten=reading.reset,
        )

    def _take(self, reading: Reading, answer: Answer, length: int) -> tuple[Segment, ...]:
        """What a window says, if anything; the recording moves on."""
        frames = min(length, reading.end - reading.seek)
        if self._decoder.is_silent(answer):
            reading.seek += frames
            return ()
        offset = reading.seek / FRAMES_PER_SECOND
        pieces, advance = cut(answer.tokens, frames, self._vocabulary)
        # A window that says that nothing was complete would be read for ever.
        reading.seek = min(reading.seek + (advance or frames), reading.end)
        spoken = [(piece, text) for piece in pieces if (text := self._text(piece))]
        return tuple(segment_of(piece, text, offset, answer) for piece, text in spoken)

    def _go_on_behind_words(
        self, reading: Reading, answer: Answer, found: WindowWords, start: int, length: int
    ) -> tuple[Segment, ...]:
        """A window's segments with words; what is read again is read from behind the last word."""
        before, reading.last_speech = reading.last_speech, found.last_speech
        is_partly = reading.seek < min(start + length, reading.end)
        if is_partly and found.last_word_end is not None:
            behind = round(found.last_word_end * FRAMES_PER_SECOND)
            reading.seek = behind if behind > start else reading.seek
        threshold = self._options.hallucination_silence_threshold
        if threshold is None or not found.segments:
            return found.segments
        heard = Heard(
            segments=found.segments,
            start=start,
            frames=min(length, reading.end - start),
            length=length,
            total=reading.frames,
            seek=reading.seek,
            last_speech=before,
            ends_in_silence=ends_in_silence(answer.tokens, self._vocabulary),
        )
        kept, reading.seek = skip_silence(heard, threshold)
        reading.last_speech = last_end(kept) if kept else before
        return kept

    def _note(self, reading: Reading, answer: Answer, segments: tuple[Segment, ...]) -> None:
        """Remember what a window said, for the next ones, unless it was silent."""
        if self._decoder.is_silent(answer):
            return
        for segment in segments:
            reading.said += segment.tokens
        if not self._options.condition_on_previous_text or self._is_unsure(answer):
            reading.reset = len(reading.said)

    def _is_unsure(self, answer: Answer) -> bool:
        return answer.temperature > UNSURE_TEMPERATURE or self._decoder.is_bad(answer)

    def _text(self, piece: Piece) -> str:
        """What a piece says; nothing if it takes no time."""
        return "" if piece.start == piece.end else self._decoder.text(piece.tokens)


def _window(
    reading: Reading, states: Tensor, segments: tuple[Segment, ...], start: int, length: int
) -> SpokenWindow:
    """What is needed to find the words of a window that begins at frame `start`."""
    assert reading.language is not None
    return SpokenWindow(
        states=states,
        segments=segments,
        start=start / FRAMES_PER_SECOND,
        frames=min(length, reading.end - start),
        seconds=reading.frames / FRAMES_PER_SECOND,
        language=reading.language,
        task=reading.task,
        last_speech=reading.last_speech,
    )


def _silent(windows: Tensor) -> list[bool]:
    """In which windows `[B, mel bins, T]` there is no sound; Whisper would invent words for it.

    The sound is one number there (digital silence), or fainter than what rounding to 16 bits makes.
    Beyond the end of a recording features are 0.
    """
    sound = windows.flatten(1)
    level, is_beyond = sound[:, :1], sound == 0
    is_flat = ((sound == level) | is_beyond).all(dim=1)
    is_faint = ((sound < FAINT) | is_beyond).all(dim=1)
    silent: list[bool] = (is_flat | is_faint).tolist()
    return silent


def segment_of(piece: Piece, text: str, offset: float, answer: Answer) -> Segment:
    """The segment that a piece of a window is, if the window begins `offset` seconds in."""
    # Timestamps are 0.02 s apart; rounding takes off what adding windows up left.
    start, end = round(offset + piece.start, 2), round(offset + piece.end, 2)
    return Segment(
        start=start,
        end=max(start, end),
        text=text,
        tokens=piece.tokens,
        avg_logprob=answer.avg_logprob,
        no_speech_prob=answer.no_speech_prob,
        compression_ratio=answer.compression_ratio,
        temperature=answer.temperature,
    )
