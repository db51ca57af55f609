"""Transcribe chunks of speech side by side, wherever in whichever recording they are.

No chunk waits for another, so that one long recording fills a batch as well as many short ones do.
A chunk is not told what was said before. Its answer is judged and decoded again as in the
sequential algorithm, and all of it is kept: what follows the last pair of timestamps is a segment,
too, for no later window reads it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from whisper_flash_attention.audio.log_mel import log_mel
from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.loop import Engine
from whisper_flash_attention.transcribe.cutting import FRAMES_PER_SECOND, Piece, cut
from whisper_flash_attention.transcribe.prompting import Hints, Prompter
from whisper_flash_attention.transcribe.segments import Segment
from whisper_flash_attention.transcribe.sequential import Read, segment_of
from whisper_flash_attention.transcribe.vocabulary import Vocabulary
from whisper_flash_attention.transcribe.windows import Answer, WindowDecoder
from whisper_flash_attention.transcribe.words import SpokenWindow, WordAligner


@dataclass
class Speech:
    """A recording's chunks of speech, and what is asked of it.

    Args:
        chunks: in order of time.
        seconds: length of the recording.
        task: "transcribe" or "translate".
        language: code of the language spoken; None until it is detected, in the first chunk.
        hints: what its chunks are told.
    """

    chunks: Iterable[Chunk]
    seconds: float
    task: str
    language: str | None
    hints: Hints = field(default_factory=Hints)


class BatchedReader:
    """Reads chunks of speech of many recordings on an engine, `batch_size` at a time."""

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        tokenizer: Any,
        options: DecodeOptions,
        aligner: WordAligner | None = None,
    ) -> None:
        self._engine = engine
        self._aligner = aligner
        self._vocabulary = vocabulary
        self._decoder = WindowDecoder(engine, vocabulary, tokenizer, options)
        self._prompter = Prompter(vocabulary, tokenizer, options)

    def read(self, recordings: Iterable[Speech], batch_size: int) -> Iterator[Read]:
        """Read all recordings, in their order; every chunk is given as it is done.

        Args:
            recordings: taken when their first chunk's turn has come.
        """
        waiting = (
            (index, each, number == 0, chunk)
            for index, each in enumerate(recordings)
            for number, chunk in enumerate(each.chunks)
        )
        while batch := list(islice(waiting, batch_size)):
            indices, owners, are_first, chunks = (list(each) for each in zip(*batch, strict=True))
            states = self._encode(chunks)
            self._detect_languages(owners, states)
            answers = self._decoder.decode(states, list(map(self._prompt, owners, are_first)))
            said = [self._segments(*each) for each in zip(chunks, answers, strict=True)]
            if self._aligner is not None:
                spoken = map(_window, owners, chunks, states, said)
                said = [each.segments for each in self._aligner.add_words(list(spoken))]
            for index, owner, chunk, segments in zip(indices, owners, chunks, said, strict=True):
                done = round((chunk.start + chunk.seconds) * FRAMES_PER_SECOND)
                total = round(owner.seconds * FRAMES_PER_SECOND)
                yield Read(index, segments, min(done, total), total)

    def _encode(self, chunks: list[Chunk]) -> Tensor:
        weights = self._engine.weights
        features = log_mel(
            [chunk.samples for chunk in chunks],
            mel_bins=weights.encoder.conv1.weight.shape[1],
            device=weights.device,
            dtype=weights.dtype,
        )
        return self._engine.encode(features)

    def _detect_languages(self, owners: list[Speech], states: Tensor) -> None:
        """Detect what is spoken in recordings of which that was not said, by their first chunk."""
        first: dict[int, int] = {}
        for row, owner in enumerate(owners):
            if owner.language is None:
                first.setdefault(id(owner), row)
        rows = list(first.values())
        if rows:
            for row, code in zip(rows, self._decoder.languages(states[rows]), strict=True):
                owners[row].language = code

    def _prompt(self, owner: Speech, is_first: bool) -> list[int]:
        assert owner.language is not None
        before = self._prompter.tokens(owner.hints.initial_prompt)
        return self._prompter.prompt(
            owner.language, owner.task, before, owner.hints, is_first=is_first
        )

    def _segments(self, chunk: Chunk, answer: Answer) -> tuple[Segment, ...]:
        if self._decoder.is_silent(answer):
            return ()
        found = []
        for piece in self._pieces(chunk, answer):
            text = self._decoder.text(piece.tokens)
            if text:
                found.append(segment_of(piece, text, chunk.start, answer))
        return tuple(found)

    def _pieces(self, chunk: Chunk, answer: Answer) -> list[Piece]:
        """All that a chunk says, none of it longer than the chunk."""
        frames = round(chunk.seconds * FRAMES_PER_SECOND)
        pieces, _ = cut(answer.tokens, frames, self._vocabulary)
        rest = answer.tokens[sum(len(piece.tokens) for piece in pieces) :]
        if rest:
            begins = self._vocabulary.seconds(rest[0])
            pieces.append(Piece(max(begins, 0.0), chunk.seconds, rest))
        return [_up_to(chunk.seconds, piece) for piece in pieces]


def _window(
    owner: Speech, chunk: Chunk, states: Tensor, segments: tuple[Segment, ...]
) -> SpokenWindow:
    """What is needed to find the words of a chunk; nobody speaks right before it."""
    assert owner.language is not None
    return SpokenWindow(
        states=states,
        segments=segments,
        start=chunk.start,
        frames=round(chunk.seconds * FRAMES_PER_SECOND),
        seconds=min(owner.seconds, chunk.start + chunk.seconds),
        language=owner.language,
        task=owner.task,
        last_speech=chunk.start,
    )


def _up_to(end: float, piece: Piece) -> Piece:
    start = min(piece.start, end)
    return Piece(start, max(start, min(piece.end, end)), piece.tokens)
