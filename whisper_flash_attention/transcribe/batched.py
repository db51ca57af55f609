"""Transcribe chunks of speech side by side, wherever in whichever recording they are.

No chunk waits for another, so that one long recording fills a batch as well as many short ones do.
A chunk is not told what was said before. Its answer is judged and decoded again as in the
sequential algorithm, and all of it is kept: what follows the last pair of timestamps is a segment,
too, for no later window reads it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from whisper_flash_attention.audio.load import Samples
from whisper_flash_attention.audio.log_mel import log_mel
from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.loop import Engine
from whisper_flash_attention.transcribe.cutting import FRAMES_PER_SECOND, Piece, cut
from whisper_flash_attention.transcribe.prompting import Hints, Prompter
from whisper_flash_attention.transcribe.reading import Read
from whisper_flash_attention.transcribe.segments import Segment
from whisper_flash_attention.transcribe.sequential import segment_of
from whisper_flash_attention.transcribe.staging import staged_ahead
from whisper_flash_attention.transcribe.streaming import Window, decode_windows
from whisper_flash_attention.transcribe.vocabulary import Vocabulary
from whisper_flash_attention.transcribe.windows import Answer, WindowDecoder
from whisper_flash_attention.transcribe.words import SpokenWindow, WordAligner

# Chunks are encoded, and words looked for, in so many groups for all slots.
GROUPS = 4


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


@dataclass(frozen=True)
class Item:
    """A chunk on its way, the number of its recording, and whether it is the first of it."""

    index: int
    owner: Speech
    chunk: Chunk
    is_first: bool

    def __str__(self) -> str:
        return f"the speech at {self.chunk.start:.1f} s of recording {self.index + 1}"


# A batch, and its clips where they are to be encoded.
_Staged = tuple[list[Item], list[Any]]


class BatchedReader:
    """Reads chunks of speech of many recordings on an engine, `batch_size` at a time.

    Chunks share slots: one whose answer has ended makes room for the next. Where all answers have
    one length, or tokens are drawn, they are decoded batch by batch; on a GPU the host is then one
    batch ahead with samples and one behind with text, so that neither waits for the other.
    """

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        tokenizer: Any,
        options: DecodeOptions,
        aligner: WordAligner | None = None,
    ) -> None:
        self._engine = engine
        # A CPU has no time to spare while it decodes.
        self._follows_later = engine.weights.device.type != "cpu"
        self._aligner = aligner
        self._vocabulary = vocabulary
        self._decoder = WindowDecoder(engine, vocabulary, tokenizer, options)
        self._prompter = Prompter(vocabulary, tokenizer, options)

    def read(self, recordings: Iterable[Speech], batch_size: int) -> Iterator[Read]:
        """Read all recordings, in their order; every chunk is given as it is done.

        Args:
            recordings: taken when their first chunk's turn has come.
        """
        in_slots = self._decoder.fits_slots
        size = max(1, batch_size // GROUPS) if in_slots else batch_size
        staged = staged_ahead(_batches(recordings, size), _clips, self._engine.weights.device)
        # Behind an error no thread takes recordings any more.
        with closing(staged):
            if in_slots:
                yield from self._read_in_slots(staged, batch_size)
            else:
                yield from self._read_in_batches(staged)

    def _read_in_slots(self, groups: Iterator[_Staged], slots: int) -> Iterator[Read]:
        ready: deque[Window] = deque()
        order: deque[Item] = deque()

        def more(count: int) -> list[Window]:
            while len(ready) < count and (group := next(groups, None)) is not None:
                order.extend(group[0])
                ready.extend(self._windows(*group))
            return [ready.popleft() for _ in range(min(count, len(ready)))]

        answered = decode_windows(self._engine, self._decoder, more, slots)
        # Words are looked for in several chunks together.
        together = 1 if self._aligner is None else max(1, slots // GROUPS)
        done: dict[int, Read] = {}
        behind: deque[Iterator[list[Read]]] = deque()
        while some := list(islice(answered, together)):
            behind.append(self._follow_into(done, some))
            _advance(behind)
            while behind and not self._follows_later:
                _advance(behind)
            yield from _in_order(order, done)
        while behind:
            _advance(behind)
        yield from _in_order(order, done)

    def _follow_into(
        self, done: dict[int, Read], answered: list[tuple[Window, Answer]]
    ) -> Iterator[list[Read]]:
        """As `_follow`, and what chunks say is kept by their items' ids."""
        items = [window.owner for window, _ in answered]
        states = [window.states for window, _ in answered]
        for reads in self._follow(items, states, lambda: [answer for _, answer in answered]):
            done |= {id(item): read for item, read in zip(items, reads, strict=False)}
            yield reads

    def _windows(self, items: list[Item], clips: list[Any]) -> list[Window]:
        """Chunks with their states, and what they are told."""
        states = self._encode(clips)
        self._detect_languages([each.owner for each in items], states)
        # States of their own: those of a group would be held until the last of it is done.
        return [
            Window(row.clone(), self._prompt(item), item)
            for row, item in zip(states, items, strict=True)
        ]

    def _read_in_batches(self, batches: Iterator[_Staged]) -> Iterator[Read]:
        behind: deque[Iterator[list[Read]]] = deque()
        for batch, clips in batches:
            states = self._encode(clips)
            self._detect_languages([each.owner for each in batch], states)
            prompts = [self._prompt(each) for each in batch]
            ready: list[Read] = []

            def catch_up(ready: list[Read] = ready) -> None:
                ready += _advance(behind)

            later = self._decoder.decode_first(states, prompts, catch_up)
            behind.append(self._follow(batch, states, later))
            yield from ready
            while behind and not self._follows_later:
                yield from _advance(behind)
        while behind:
            yield from _advance(behind)

    def _follow(
        self,
        batch: list[Item],
        states: Tensor | list[Tensor],
        later: Callable[[], list[Answer]],
    ) -> Iterator[list[Read]]:
        """What the host does of a batch while the device decodes the next.

        Nothing is given where the device was asked for more, and the next batch may go first.
        """
        said = self.segments(batch, later())
        if self._aligner is not None:
            spoken = [spoken_window(*each) for each in zip(batch, states, said, strict=True)]
            words = self._aligner.begin(spoken)
            yield []
            said = [each.segments for each in words()]
        yield [_read(each, segments) for each, segments in zip(batch, said, strict=True)]

    def _encode(self, clips: list[Any]) -> Tensor:
        weights = self._engine.weights
        features = log_mel(
            clips,
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

    def _prompt(self, item: Item) -> list[int]:
        owner = item.owner
        assert owner.language is not None
        before = self._prompter.tokens(owner.hints.initial_prompt)
        return self._prompter.prompt(
            owner.language, owner.task, before, owner.hints, is_first=item.is_first
        )

    def segments(
        self, batch: Sequence[Item], answers: Sequence[Answer]
    ) -> list[tuple[Segment, ...]]:
        """What each chunk of a batch says, in seconds of its recording."""
        return [
            self._segments(each.chunk, answer) for each, answer in zip(batch, answers, strict=True)
        ]

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


def _batches(recordings: Iterable[Speech], size: int) -> Iterator[list[Item]]:
    waiting = (
        Item(index, owner, chunk, is_first=number == 0)
        for index, owner in enumerate(recordings)
        for number, chunk in enumerate(owner.chunks)
    )
    while batch := list(islice(waiting, size)):
        yield batch


def _clips(batch: list[Item]) -> list[Samples]:
    return [each.chunk.samples for each in batch]


def _advance(behind: deque[Iterator[list[Read]]]) -> list[Read]:
    """Take all batches that are behind one step further; what those say that are done."""
    found: list[Read] = []
    for each in list(behind):
        if reads := next(each):
            found += reads
            behind.popleft()
    return found


def _in_order(order: deque[Item], done: dict[int, Read]) -> Iterator[Read]:
    """What chunks say, as far as all before them are done."""
    while order and id(order[0]) in done:
        yield done.pop(id(order.popleft()))


def _read(item: Item, segments: tuple[Segment, ...]) -> Read:
    done = round((item.chunk.start + item.chunk.seconds) * FRAMES_PER_SECOND)
    total = round(item.owner.seconds * FRAMES_PER_SECOND)
    return Read(item.index, segments, min(done, total), total)


def spoken_window(item: Item, states: Tensor, segments: tuple[Segment, ...]) -> SpokenWindow:
    """What is needed to find the words of a chunk; nobody speaks right before it."""
    owner, chunk = item.owner, item.chunk
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
