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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from whisper_flash_attention.audio.log_mel import HOP
from whisper_flash_attention.audio.samples import SHORTEST
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.transcribe.hallucination import AlignedWindow, last_end, skip_silence
from whisper_flash_attention.transcribe.prompts import PromptBuilder
from whisper_flash_attention.transcribe.reading import Read, Reading
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.segmentation import (
    FRAMES_PER_SECOND,
    TokenSpan,
    ends_in_silence,
    split_at_timestamps,
)
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import (
    DecodingResult,
    Window,
    WindowDecoder,
    decode_windows,
)
from whisper_flash_attention.transcribe.words import SpokenWindow, WindowWords, WordAligner

Entry = TypeVar("Entry")


class ReadyQueue(Generic[Entry]):
    """Which recordings' next windows can be read now.

    Args:
        recordings: begun as there is room for them, and known by their numbers from 0 on.
        most: of them that are being read at a time.
    """

    def __init__(self, recordings: Iterable[Entry], most: int) -> None:
        self._waiting = iter(enumerate(recordings))
        self._room = most
        self._ready: deque[tuple[int, Entry]] = deque()

    def take(self, count: int) -> list[tuple[int, Entry]]:
        """Recordings whose turn it is, at most so many; those that have begun come first."""
        known = min(count, len(self._ready))
        taken = [self._ready.popleft() for _ in range(known)]
        new = list(islice(self._waiting, min(count - known, self._room)))
        self._room -= len(new)
        return taken + new

    def put_back(self, index: int, recording: Entry, *, is_done: bool) -> None:
        """A recording that was taken has been read one window further, or to its end."""
        if is_done:
            self._room += 1
        else:
            self._ready.append((index, recording))


FRAMES = 3000
# A text that was hard to read is no guide to the next window.
UNSURE_TEMPERATURE = 0.5
# Log-mel features of sound within two steps of 16 bits around 0 are less, whatever it is.
FAINT = -0.75
# Of what is left of a recording, that may hold a word.
SHORTEST_FRAMES = SHORTEST // HOP


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
        self._prompt_builder = PromptBuilder(vocabulary, tokenizer, options)

    def read(self, readings: Iterable[Reading], batch_size: int) -> Iterator[Read]:
        """Read all recordings; every window is given as it is done.

        Args:
            readings: taken as there is room for them; their state goes on with the windows.
            batch_size: windows at a time, at most.
        """
        in_slots, waiting = False, iter(readings)
        if batch_size > 1 and self._decoder.fits_slots:
            in_slots, waiting = _several(waiting)
        yield from (self._read_in_slots if in_slots else self._read_together)(waiting, batch_size)

    def _read_in_slots(self, readings: Iterator[Reading], slots: int) -> Iterator[Read]:
        """A recording goes on with its next window without waiting for the others."""
        length = 2 * self._engine.weights.encoder.positions.shape[0]
        ready = ReadyQueue(map(self._begin, readings), slots)
        unheard: deque[Read] = deque()

        def more(count: int) -> list[Window]:
            heard: list[tuple[int, Reading]] = []
            kept: list[Tensor] = []
            while len(heard) < count and (taken := ready.take(count - len(heard))):
                windows = torch.stack([reading.window(length) for _, reading in taken])
                silent = _silent(windows, [reading for _, reading in taken])
                for owner, window, is_silent in zip(taken, windows, silent, strict=True):
                    index, reading = owner
                    if is_silent:
                        self._skip(reading, length)
                        unheard.append(_read(index, reading, ()))
                        ready.put_back(index, reading, is_done=reading.is_done)
                    else:
                        heard.append(owner)
                        kept.append(window)
            return self._prepare(heard, torch.stack(kept)) if heard else []

        for window, result in decode_windows(self._engine, self._decoder, more, slots):
            index, reading = window.owner.index, window.owner.reading
            [segments] = self._finish([reading], window.states[None], [result], length)
            yield from _drain(unheard)
            yield _read(index, reading, segments)
            ready.put_back(index, reading, is_done=reading.is_done)
        yield from _drain(unheard)

    def _begin(self, reading: Reading) -> Reading:
        reading.said[:0] = self._prompt_builder.tokens(reading.prompt_fields.initial_prompt)
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

    def _read_together(self, readings: Iterator[Reading], batch_size: int) -> Iterator[Read]:
        """All recordings wait for the longest result of their windows."""
        waiting = iter(enumerate(readings))
        active: dict[int, Reading] = {}
        while True:
            for index, reading in islice(waiting, batch_size - len(active)):
                active[index] = self._begin(reading)
            if not active:
                return
            yield from self._windows(active)
            active = {index: each for index, each in active.items() if not each.is_done}

    def _skip(self, reading: Reading, length: int) -> None:
        """Move on behind a window in which there is no sound."""
        reading.seek = min(reading.seek + length, reading.end)
        reading.go_on()

    def _windows(self, active: dict[int, Reading]) -> Iterator[Read]:
        """One window of every active recording."""
        length = 2 * self._engine.weights.encoder.positions.shape[0]
        windows = torch.stack([each.window(length) for each in active.values()])
        heard = {
            index: reading
            for (index, reading), is_silent in zip(
                active.items(), _silent(windows, list(active.values())), strict=True
            )
            if not is_silent
        }
        kept = windows if len(heard) == len(active) else windows[[i in heard for i in active]]
        taken = self._hear(list(heard.values()), kept) if heard else []
        segments = dict(zip(heard, taken, strict=True))
        for index, reading in active.items():
            if index not in heard:
                self._skip(reading, length)
            yield _read(index, reading, segments.get(index, ()))

    def _hear(self, readings: list[Reading], windows: Tensor) -> list[tuple[Segment, ...]]:
        """What windows `[B, mel bins, length]` of so many recordings say."""
        states = self._engine.encode(windows)
        self._detect_languages(readings, states)
        results = self._decoder.decode(states, [self._prompt(reading) for reading in readings])
        return self._finish(readings, states, results, windows.shape[2])

    def _finish(
        self, readings: list[Reading], states: Tensor, results: list[DecodingResult], length: int
    ) -> list[tuple[Segment, ...]]:
        """What windows say that have been answered; their recordings move on."""
        starts = [reading.seek for reading in readings]
        taken = [
            self._take(reading, result, length)
            for reading, result in zip(readings, results, strict=True)
        ]
        if self._aligner is not None:
            spoken = [
                _window(reading, states[row], taken[row], starts[row], length)
                for row, reading in enumerate(readings)
            ]
            for row, found in enumerate(self._aligner.add_words(spoken)):
                taken[row] = self._go_on_behind_words(
                    readings[row], results[row], found, starts[row], length
                )
        for reading, result, segments in zip(readings, results, taken, strict=True):
            self._note(reading, result, segments)
            reading.go_on()
        return taken

    def _detect_languages(self, readings: list[Reading], states: Tensor) -> None:
        """Detect the languages that are not known, in the first window or in every one."""
        every = self._options.multilingual
        unknown = [i for i, each in enumerate(readings) if every or each.language is None]
        if unknown:
            found = self._decoder.language_probabilities(states[unknown])
            for i, chances in zip(unknown, found, strict=True):
                readings[i].language = next(iter(chances))
                readings[i].detected.append(chances)

    def _prompt(self, reading: Reading) -> list[int]:
        assert reading.language is not None
        return self._prompt_builder.prompt(
            reading.language,
            reading.task,
            reading.said,
            reading.prompt_fields,
            is_first=reading.is_first,
            forgotten=reading.reset,
        )

    def _take(self, reading: Reading, result: DecodingResult, length: int) -> tuple[Segment, ...]:
        """What a window says, if anything; the recording moves on."""
        frames = min(length, reading.end - reading.seek)
        if self._decoder.is_silent(result):
            reading.seek += frames
            return ()
        offset = reading.seek / FRAMES_PER_SECOND
        spans, advance = split_at_timestamps(result.tokens, frames, self._vocabulary)
        # A window that says that nothing was complete would be read for ever.
        reading.seek = min(reading.seek + (advance or frames), reading.end)
        spoken = [(span, text) for span in spans if (text := self._text(span))]
        language = reading.language if self._options.multilingual else None
        return tuple(segment_of(span, text, offset, result, language) for span, text in spoken)

    def _go_on_behind_words(
        self, reading: Reading, result: DecodingResult, found: WindowWords, start: int, length: int
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
        heard = AlignedWindow(
            segments=found.segments,
            start=start,
            frames=min(length, reading.end - start),
            length=length,
            total=reading.frames,
            seek=reading.seek,
            last_speech=before,
            ends_in_silence=ends_in_silence(result.tokens, self._vocabulary),
        )
        kept, reading.seek = skip_silence(heard, threshold)
        reading.last_speech = last_end(kept) if kept else before
        return kept

    def _note(
        self, reading: Reading, result: DecodingResult, segments: tuple[Segment, ...]
    ) -> None:
        """Remember what a window said, for the next ones, unless it was silent."""
        if self._decoder.is_silent(result):
            return
        for segment in segments:
            reading.said += segment.tokens
        if not self._options.condition_on_previous_text or self._is_unsure(result):
            reading.reset = len(reading.said)

    def _is_unsure(self, result: DecodingResult) -> bool:
        return result.temperature > UNSURE_TEMPERATURE or self._decoder.needs_fallback(result)

    def _text(self, span: TokenSpan) -> str:
        """What a span says; nothing if it takes no time."""
        return "" if span.start == span.end else self._decoder.text(span.tokens)


def _several(readings: Iterator[Reading]) -> tuple[bool, Iterator[Reading]]:
    """Whether there is more than one; and all of them."""
    first = list(islice(readings, 2))
    return len(first) > 1, chain(first, readings)


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
        frames=min(length, reading.end - start),
        seconds=reading.frames / FRAMES_PER_SECOND,
        language=reading.language,
        task=reading.task,
        last_speech=reading.last_speech,
    )


def _silent(windows: Tensor, readings: Sequence[Reading]) -> list[bool]:
    """In which windows `[B, mel bins, T]` there is no sound; Whisper would invent words for it.

    The sound is one number there (digital silence), or fainter than what rounding to 16 bits makes;
    or less is left of the recording than a word takes. Beyond the end of a recording features are
    0.
    """
    sound = windows.flatten(1)
    level, is_beyond = sound[:, :1], sound == 0
    is_flat = ((sound == level) | is_beyond).all(dim=1)
    is_faint = ((sound < FAINT) | is_beyond).all(dim=1)
    silent: list[bool] = (is_flat | is_faint).tolist()
    return [
        is_silent or reading.end - reading.seek < SHORTEST_FRAMES
        for is_silent, reading in zip(silent, readings, strict=True)
    ]


def segment_of(
    span: TokenSpan, text: str, offset: float, result: DecodingResult, language: str | None = None
) -> Segment:
    """The segment that a span of a window is, if the window begins `offset` seconds in.

    Args:
        language: of the window, if segments are to carry it.
    """
    # Timestamps are 0.02 s apart; rounding takes off what adding windows up left.
    start, end = round(offset + span.start, 2), round(offset + span.end, 2)
    return Segment(
        start=start,
        end=max(start, end),
        text=text,
        tokens=span.tokens,
        avg_logprob=result.avg_logprob,
        no_speech_prob=result.no_speech_prob,
        compression_ratio=result.compression_ratio,
        temperature=result.temperature,
        language=language,
    )
