"""OpenAI's sequential algorithm, for many recordings side by side.

A recording is read window by window: each begins where the last complete segment of the one before
ended, and may be told what was said before. Windows of one recording follow one another; those of
several are decoded side by side, in slots where that is possible: a recording whose window has
ended goes on with its next one, and one that is done makes room for another.

Source: `transcribe` in OpenAI's whisper/transcribe.py. As there and in Transformers' long form,
features are normalised over the whole recording, and zeros follow its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.loop import Engine
from whisper_flash_attention.transcribe.cutting import FRAMES_PER_SECOND, Piece, cut
from whisper_flash_attention.transcribe.segments import Segment
from whisper_flash_attention.transcribe.streaming import Window, decode_windows
from whisper_flash_attention.transcribe.turns import Turns
from whisper_flash_attention.transcribe.vocabulary import Vocabulary
from whisper_flash_attention.transcribe.windows import Answer, WindowDecoder
from whisper_flash_attention.transcribe.words import SpokenWindow, WindowWords, WordAligner

FRAMES = 3000
# A text that was hard to read is no guide to the next window.
UNSURE_TEMPERATURE = 0.5


@dataclass
class Reading:
    """A recording that is being read.

    Args:
        features: of all of it, `[mel bins, frames]`, or more.
        frames: of the recording; features beyond are silence.
        task: "transcribe" or "translate".
        language: code of the language spoken; None until it is detected.
        said: tokens so far, the initial prompt's first.
        reset: from which of them on they are told to the next window.
        seek: the frame at which the next window begins.
        last_speech: where the last word ended, in seconds, if words are looked for.
    """

    features: Tensor
    frames: int
    task: str
    language: str | None
    said: list[int] = field(default_factory=list)
    reset: int = 0
    seek: int = 0
    last_speech: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.seek >= self.frames

    def window(self, length: int) -> Tensor:
        """Features of the next window, `[mel bins, length]`, zeros beyond the end."""
        part = self.features[:, self.seek : self.seek + length]
        return torch.nn.functional.pad(part, (0, length - part.shape[1]))


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


@dataclass(frozen=True)
class _Owner:
    """The recording that a window belongs to."""

    index: int
    reading: Reading

    def __str__(self) -> str:
        seconds = self.reading.seek / FRAMES_PER_SECOND
        return f"the window at {seconds:.1f} s of recording {self.index + 1}"


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
        self._initial = self._decoder.initial_tokens()

    def read(self, readings: Sequence[Reading], batch_size: int) -> Iterator[Read]:
        """Read all recordings; every window is given as it is done.

        Args:
            readings: what they are; their state goes on with the windows.
            batch_size: windows at a time, at most.
        """
        in_slots = self._decoder.fits_slots and min(batch_size, len(readings)) > 1
        return (self._read_in_slots if in_slots else self._read_together)(readings, batch_size)

    def _read_in_slots(self, readings: Sequence[Reading], slots: int) -> Iterator[Read]:
        """A recording goes on with its next window without waiting for the others."""
        length = 2 * self._engine.weights.encoder.positions.shape[0]
        turns = Turns(map(self._begin, readings), slots)
        unheard: deque[Read] = deque()

        def more(count: int) -> list[Window]:
            heard: list[tuple[int, Reading]] = []
            kept: list[Tensor] = []
            while len(heard) < count and (taken := turns.take(count - len(heard))):
                windows = torch.stack([reading.window(length) for _, reading in taken])
                for owner, window, is_flat in zip(taken, windows, _flat(windows), strict=True):
                    index, reading = owner
                    if is_flat:
                        reading.seek += length
                        unheard.append(_read(index, reading, ()))
                        turns.give_back(index, reading, is_done=reading.is_done)
                    else:
                        heard.append(owner)
                        kept.append(window)
            return self._prepare(heard, torch.stack(kept)) if heard else []

        for window, answer in decode_windows(self._engine, self._decoder, more, slots):
            index, reading = window.owner.index, window.owner.reading
            [segments] = self._finish([reading], window.states[None], [answer], length)
            yield from _drain(unheard)
            yield _read(index, reading, segments)
            turns.give_back(index, reading, is_done=reading.is_done)
        yield from _drain(unheard)

    def _begin(self, reading: Reading) -> Reading:
        reading.said[:0] = self._initial
        return reading

    def _prepare(self, heard: list[tuple[int, Reading]], features: Tensor) -> list[Window]:
        """The next windows of recordings, of features `[B, mel bins, length]`."""
        states = self._engine.encode(features)
        self._detect_languages([reading for _, reading in heard], states)
        # States of their own: those of all would be held until the last of them is done.
        return [
            Window(row.clone(), self._prompt(reading), _Owner(index, reading))
            for row, (index, reading) in zip(states, heard, strict=True)
        ]

    def _read_together(self, readings: Sequence[Reading], batch_size: int) -> Iterator[Read]:
        """All recordings wait for the longest answer of their windows."""
        waiting = iter(enumerate(readings))
        active: dict[int, Reading] = {}
        while True:
            for index, reading in islice(waiting, batch_size - len(active)):
                active[index] = self._begin(reading)
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
            for (index, reading), is_flat in zip(active.items(), _flat(windows), strict=True)
            if not is_flat
        }
        kept = windows if len(heard) == len(active) else windows[[i in heard for i in active]]
        taken = self._hear(list(heard.values()), kept) if heard else []
        segments = dict(zip(heard, taken, strict=True))
        for index, reading in active.items():
            if index not in heard:
                reading.seek += length
            yield _read(index, reading, segments.get(index, ()))

    def _hear(self, readings: list[Reading], windows: Tensor) -> list[tuple[Segment, ...]]:
        """What windows `[B, mel bins, length]` of so many recordings say."""
        states = self._engine.encode(windows)
        self._detect_languages(readings, states)
        answers = self._decoder.decode(states, [self._prompt(reading) for reading in readings])
        return self._finish(readings, states, answers, windows.shape[2])

    def _finish(
        self, readings: list[Reading], states: Tensor, answers: list[Answer], length: int
    ) -> list[tuple[Segment, ...]]:
        """What windows say that have been answered; their recordings move on."""
        starts = [reading.seek for reading in readings]
        taken = [
            self._take(reading, answer, length)
            for reading, answer in zip(readings, answers, strict=True)
        ]
        if self._aligner is None:
            return taken
        spoken = [
            _window(reading, states[row], taken[row], starts[row], length)
            for row, reading in enumerate(readings)
        ]
        for row, found in enumerate(self._aligner.add_words(spoken)):
            taken[row] = found.segments
            _go_on_behind_words(readings[row], found, starts[row], length)
        return taken

    def _detect_languages(self, readings: list[Reading], states: Tensor) -> None:
        """Detect what is spoken where that was not said, in the first window."""
        unknown = [i for i, reading in enumerate(readings) if reading.language is None]
        if unknown:
            for i, code in zip(unknown, self._decoder.languages(states[unknown]), strict=True):
                readings[i].language = code

    def _prompt(self, reading: Reading) -> list[int]:
        assert reading.language is not None
        before = reading.said[reading.reset :]
        return self._vocabulary.prompt(reading.language, reading.task, before)

    def _take(self, reading: Reading, answer: Answer, length: int) -> tuple[Segment, ...]:
        """Note what a window says, if anything, and move on."""
        frames = min(length, reading.frames - reading.seek)
        if self._decoder.is_silent(answer):
            reading.seek += frames
            return ()
        offset = reading.seek / FRAMES_PER_SECOND
        pieces, advance = cut(answer.tokens, frames, self._vocabulary)
        # A window that says that nothing was complete would be read for ever.
        reading.seek += advance or frames
        spoken = [(piece, text) for piece in pieces if (text := self._text(piece))]
        for piece, _ in spoken:
            reading.said += piece.tokens
        if not self._options.condition_on_previous_text or self._is_unsure(answer):
            reading.reset = len(reading.said)
        return tuple(segment_of(piece, text, offset, answer) for piece, text in spoken)

    def _is_unsure(self, answer: Answer) -> bool:
        return answer.temperature > UNSURE_TEMPERATURE or self._decoder.is_bad(answer)

    def _text(self, piece: Piece) -> str:
        """What a piece says; nothing if it takes no time."""
        return "" if piece.start == piece.end else self._decoder.text(piece.tokens)


def _read(index: int, reading: Reading, segments: tuple[Segment, ...]) -> Read:
    return Read(index, segments, min(reading.seek, reading.frames), reading.frames)


def _drain(reads: deque[Read]) -> Iterator[Read]:
    while reads:
        yield reads.popleft()


def _window(
    reading: Reading, states: Tensor, segments: tuple[Segment, ...], start: int, length: int
) -> SpokenWindow:
    """What is needed to find the words of a window that begins at frame `start`."""
    assert reading.language is not None
    return SpokenWindow(
        states=states,
        segments=segments,
        start=start / FRAMES_PER_SECOND,
        frames=min(length, reading.frames - start),
        seconds=reading.frames / FRAMES_PER_SECOND,
        language=reading.language,
        task=reading.task,
        last_speech=reading.last_speech,
    )


def _go_on_behind_words(reading: Reading, found: WindowWords, start: int, length: int) -> None:
    """A window that is read again in part is read again from behind its last word."""
    reading.last_speech = found.last_speech
    is_partly = reading.seek < min(start + length, reading.frames)
    if is_partly and found.last_word_end is not None:
        behind = round(found.last_word_end * FRAMES_PER_SECOND)
        reading.seek = behind if behind > start else reading.seek


def _flat(windows: Tensor) -> list[bool]:
    """Of which windows `[B, mel bins, T]` the sound is one number: digital silence, for which
    Whisper likes to invent words.

    Beyond the end of a recording features are 0, in silence another constant.
    """
    sound = windows.flatten(1)
    level = sound[:, :1]
    flat: list[bool] = ((sound == level) | (sound == 0)).all(dim=1).tolist()
    return flat


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
