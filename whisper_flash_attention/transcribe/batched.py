"""Transcribe chunks of speech side by side, wherever in whichever recording they are.

No chunk waits for another, so that one long recording fills a batch as well as many short ones do.
A chunk has no text before it as context. Its result is judged and decoded again as in the
sequential algorithm, and all of it is kept: what follows the last pair of timestamps is a segment,
too. What the result leaves out of the chunk (`leftovers`) is read once more, with other chunks.

On a GPU a thread prepares the next batch and copies it (`prefetch`) while the device works on the
one before; copies are not interrupted by other Python threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whisper_flash_attention.audio.log_mel import log_mel
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.engine.cuda_graphs import copying_stream
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.transcribe.prompts import PromptBuilder, PromptFields
from whisper_flash_attention.transcribe.reading import Read
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.segmentation import (
    FRAMES_PER_SECOND,
    TokenSpan,
    leftovers,
    split_at_timestamps,
)
from whisper_flash_attention.transcribe.sequential import segment_of
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import (
    DecodingResult,
    Window,
    WindowDecoder,
    decode_windows,
)
from whisper_flash_attention.transcribe.words import SpokenWindow, WordAligner

Batch = TypeVar("Batch")
Clip = npt.NDArray[np.float32]
# Clips that share one piece of pinned memory, which is used again once it is copied.
CLIPS_AT_A_TIME = 32


def prefetch(
    batches: Iterator[Batch], clips_of: Callable[[Batch], list[Clip]], device: torch.device
) -> Generator[tuple[Batch, list[Any]]]:
    """Each batch, and its clips on the device; the next batch is made ready meanwhile.

    What `batches` raises is raised where its batch would come. On a CPU nothing is copied, and
    nothing is done ahead. Once this generator is closed, no batch is taken any more.

    Args:
        batches: taken from another thread if there is a GPU.
        clips_of: a batch's mono clips `[T]`.
        device: of the copies.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, list(clips_of(batch))
        return

    # Made here: a new thread has no CUDA context to make it in.
    stream = copying_stream(device)

    def make() -> tuple[Batch, _Copies] | None:
        batch = next(batches, None)
        return None if batch is None else (batch, _Copies(clips_of(batch), stream))

    with ThreadPoolExecutor(1, thread_name_prefix="whisper-flash-staging") as thread:
        coming = thread.submit(make)
        while (made := coming.result()) is not None:
            coming = thread.submit(make)
            batch, copies = made
            yield batch, copies.arrived()


class _Copies:
    """Clips on their way to a GPU, on a stream beside the one that computes."""

    def __init__(self, clips: list[Clip], stream: torch.cuda.Stream) -> None:
        self._clips: list[Tensor] = []
        self._rooms: list[Tensor] = []
        with torch.cuda.stream(stream):
            for start in range(0, len(clips), CLIPS_AT_A_TIME):
                self._copy(clips[start : start + CLIPS_AT_A_TIME], stream.device)
            self._event = stream.record_event()

    def _copy(self, clips: list[Clip], device: torch.device) -> None:
        room = torch.empty((len(clips), max(len(clip) for clip in clips)), pin_memory=True)
        for row, clip in zip(room.numpy(), clips, strict=True):
            row[: len(clip)] = clip
        there = room.to(device, non_blocking=True)
        self._rooms.append(there)
        self._clips += [row[: len(clip)] for row, clip in zip(there, clips, strict=True)]

    def arrived(self) -> list[Tensor]:
        """The clips, which the current stream does not touch before they are there."""
        stream = torch.cuda.current_stream(self._rooms[0].device)
        stream.wait_event(self._event)
        for room in self._rooms:
            room.record_stream(stream)
        return self._clips


# Chunks are encoded, and words looked for, in so many groups for all slots.
GROUPS = 4
# Leftovers of leftovers are read, too, up to this depth.
MOST_DEPTH = 3


@dataclass
class Speech:
    """A recording's chunks of speech, and what is asked of it.

    Args:
        chunks: in order of time.
        seconds: length of the recording.
        task: "transcribe" or "translate".
        language: code of the language spoken; None until it is detected, in the first chunk.
        prompt_fields: what its chunks are told.
        detected: probabilities of languages by code, of every chunk in which they were detected.
    """

    chunks: Iterable[Chunk]
    seconds: float
    task: str
    language: str | None
    prompt_fields: PromptFields = field(default_factory=PromptFields)
    detected: list[dict[str, float]] = field(default_factory=list)


@dataclass(eq=False)
class Item:
    """A chunk on its way.

    Args:
        index: the number of its recording.
        is_first: whether it is the first of its recording.
        language: of this chunk, if that is detected in every one.
        whole: the chunk of which this one is left, if it is.
        segments: what its result says.
        parts: what its result left, on their way, too.
        is_split: whether these parts are all of the chunk, to take the result's place.
        is_read: whether `segments` is known.
    """

    index: int
    owner: Speech
    chunk: Chunk
    is_first: bool
    language: str | None = None
    whole: Item | None = None
    segments: tuple[Segment, ...] = ()
    parts: tuple[Item, ...] = ()
    is_split: bool = False
    is_read: bool = False

    @property
    def depth(self) -> int:
        """0 for a chunk of the recording, 1 for what its result left, and so on."""
        return 0 if self.whole is None else 1 + self.whole.depth

    @property
    def is_done(self) -> bool:
        """Whether it and all that it left were read."""
        return self.is_read and all(part.is_done for part in self.parts)

    def all_segments(self) -> tuple[Segment, ...]:
        """Segments of it and of what it left, in order of time."""
        left = [segment for part in self.parts for segment in part.all_segments()]
        if self.is_split:
            return max(self.segments, tuple(left), key=_text_length)
        return tuple(sorted([*self.segments, *left], key=lambda segment: segment.start))

    def __str__(self) -> str:
        return f"the speech at {self.chunk.start:.1f} s of recording {self.index + 1}"


# A batch, and its clips where they are to be encoded.
_Prefetched = tuple[list[Item], list[Any]]


class BatchedReader:
    """Reads chunks of speech of many recordings on an engine, `batch_size` at a time.

    Chunks share slots: one whose result has ended makes room for the next. Where all results have
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
        self._options = options
        self._decoder = WindowDecoder(
            engine, vocabulary, tokenizer, options, always_watch_silence=True
        )
        # Leftovers whose turn has not come.
        self._left: deque[Item] = deque()
        self._prompt_builder = PromptBuilder(vocabulary, tokenizer, options)

    def read(self, recordings: Iterable[Speech], batch_size: int) -> Iterator[Read]:
        """Read all recordings, in their order; every chunk is given as it is done.

        Args:
            recordings: taken when their first chunk's turn has come.
        """
        in_slots = self._decoder.fits_slots
        size = max(1, batch_size // GROUPS) if in_slots else batch_size
        prefetched = prefetch(_batches(recordings, size), _clips, self._engine.weights.device)
        # Behind an error no thread takes recordings any more.
        with closing(prefetched):
            if in_slots:
                yield from self._read_in_slots(prefetched, batch_size)
            else:
                yield from self._read_in_batches(prefetched, size)

    def _read_in_slots(self, groups: Iterator[_Prefetched], slots: int) -> Iterator[Read]:
        ready: deque[Window] = deque()
        order: deque[Item] = deque()

        size = max(1, slots // GROUPS)

        def more(count: int) -> list[Window]:
            while len(ready) < count:
                # Few leftovers wait for others, so that the encoder has a group to work on.
                group = self._take_left(size) if len(self._left) >= size else next(groups, None)
                group = group or self._take_left(size)
                if group is None:
                    break
                order.extend(item for item in group[0] if item.whole is None)
                ready.extend(self._windows(*group))
            return [ready.popleft() for _ in range(min(count, len(ready)))]

        def with_leftovers() -> Iterator[tuple[Window, DecodingResult]]:
            # Noted before more windows are asked for.
            for window, result in decode_windows(self._engine, self._decoder, more, slots):
                self._note_left(window.owner, result)
                yield window, result

        answered = with_leftovers()
        # Words are looked for in several chunks together.
        together = 1 if self._aligner is None else max(1, slots // GROUPS)
        behind: deque[Iterator[bool]] = deque()
        while some := list(islice(answered, together)):
            items = [window.owner for window, _ in some]
            states = [window.states for window, _ in some]
            results = [result for _, result in some]
            behind.append(self._follow(items, states, partial(list, results)))
            _advance(behind)
            while behind and not self._follows_later:
                _advance(behind)
            yield from _in_order(order)
        while behind:
            _advance(behind)
        yield from _in_order(order)

    def _take_left(self, most: int) -> _Prefetched | None:
        """Leftovers that are read next, and their clips; None if there are none."""
        items = [self._left.popleft() for _ in range(min(most, len(self._left)))]
        return (items, _clips(items)) if items else None

    def _note_left(self, item: Item, result: DecodingResult) -> None:
        """Have what a result leaves out of its chunk read, too."""
        if item.depth == MOST_DEPTH or not self._is_heard(item.chunk, result):
            return
        most = self._options.max_new_tokens
        if most is not None and len(result.tokens) >= most:
            return  # cut off on purpose
        left = leftovers(
            item.chunk,
            result.tokens,
            self._token_spans(item.chunk, result),
            self._vocabulary,
            uses_vad=self._options.uses_vad,
        )
        item.is_split = left.is_split
        item.parts = tuple(
            Item(item.index, item.owner, chunk, False, item.language, item) for chunk in left.chunks
        )
        self._left.extend(item.parts)

    def _windows(self, items: list[Item], clips: list[Any]) -> list[Window]:
        """Chunks with their states, and what they are told."""
        states = self._encode(clips)
        self._detect_languages(items, states)
        # States of their own: those of a group would be held until the last of it is done.
        return [
            Window(row.clone(), self._prompt(item), item)
            for row, item in zip(states, items, strict=True)
        ]

    def _read_in_batches(self, batches: Iterator[_Prefetched], size: int) -> Iterator[Read]:
        order: deque[Item] = deque()
        behind: deque[Iterator[bool]] = deque()
        while True:
            group = next(batches, None) or self._take_left(size)
            if group is None:
                if not behind:
                    return
                # What these leave is known once they are done.
                _advance(behind)
                yield from _in_order(order)
                continue
            batch, clips = group
            order.extend(item for item in batch if item.whole is None)
            states = self._encode(clips)
            self._detect_languages(batch, states)
            prompts = [self._prompt(each) for each in batch]

            def catch_up() -> None:
                _advance(behind)

            later = self._decoder.decode_first(states, prompts, catch_up)
            behind.append(self._follow(batch, states, self._noting(batch, later)))
            yield from _in_order(order)
            while behind and not self._follows_later:
                _advance(behind)
                yield from _in_order(order)

    def _noting(
        self, batch: list[Item], later: Callable[[], list[DecodingResult]]
    ) -> Callable[[], list[DecodingResult]]:
        """The same results, of which it is noted what they leave."""

        def results() -> list[DecodingResult]:
            found = later()
            for item, result in zip(batch, found, strict=True):
                self._note_left(item, result)
            return found

        return results

    def _follow(
        self,
        batch: list[Item],
        states: Tensor | list[Tensor],
        later: Callable[[], list[DecodingResult]],
    ) -> Iterator[bool]:
        """What the host does of a batch while the device decodes the next; whether it is done.

        It is not where the device was asked for more, and the next batch may go first.
        """
        found = self.segments(batch, later())
        if self._aligner is not None:
            spoken = [spoken_window(*each) for each in zip(batch, states, found, strict=True)]
            words = self._aligner.begin(spoken)
            yield False
            found = [each.segments for each in words()]
        for item, segments in zip(batch, found, strict=True):
            item.segments, item.is_read = segments, True
        yield True

    def _encode(self, clips: list[Any]) -> Tensor:
        weights = self._engine.weights
        features = log_mel(
            clips,
            mel_bins=weights.encoder.conv1.weight.shape[1],
            device=weights.device,
            dtype=weights.dtype,
        )
        return self._engine.encode(features)

    def _detect_languages(self, items: list[Item], states: Tensor) -> None:
        """Detect languages that are not known: of recordings in their first chunk, or of chunks.

        What a chunk leaves is short, and in the chunk's language.
        """
        rows: dict[int, int] = {}
        for row, item in enumerate(items):
            if self._options.multilingual and item.language is None:
                rows.setdefault(id(item), row)
            elif item.owner.language is None:
                rows.setdefault(id(item.owner), row)
        if not rows:
            return
        chosen = list(rows.values())
        found = self._decoder.language_probabilities(states[chosen])
        for row, chances in zip(chosen, found, strict=True):
            item, code = items[row], next(iter(chances))
            item.owner.detected.append(chances)
            item.owner.language = code
            if self._options.multilingual:
                item.language = code

    def _prompt(self, item: Item) -> list[int]:
        owner, language = item.owner, _language(item)
        before = self._prompt_builder.tokens(owner.prompt_fields.initial_prompt)
        return self._prompt_builder.prompt(
            language, owner.task, before, owner.prompt_fields, is_first=item.is_first
        )

    def segments(
        self, batch: Sequence[Item], results: Sequence[DecodingResult]
    ) -> list[tuple[Segment, ...]]:
        """What each chunk of a batch says, in seconds of its recording."""
        return [self._segments(*each) for each in zip(batch, results, strict=True)]

    def _segments(self, item: Item, result: DecodingResult) -> tuple[Segment, ...]:
        if not self._is_heard(item.chunk, result):
            return ()
        found = []
        for span in self._token_spans(item.chunk, result):
            text = self._decoder.text(span.tokens)
            if text:
                found.append(segment_of(span, text, item.chunk.start, result, item.language))
        return tuple(found)

    def _is_heard(self, chunk: Chunk, result: DecodingResult) -> bool:
        """Whether a result counts: it is not silence, and believed where speech is doubtful."""
        if chunk.is_doubtful and not self._decoder.is_credible(result):
            return False
        return not self._decoder.is_silent(result)

    def _token_spans(self, chunk: Chunk, result: DecodingResult) -> list[TokenSpan]:
        """All that a chunk says, none of it longer than the chunk."""
        frames = round(chunk.seconds * FRAMES_PER_SECOND)
        spans, _ = split_at_timestamps(result.tokens, frames, self._vocabulary)
        rest = result.tokens[sum(len(span.tokens) for span in spans) :]
        if rest:
            begins = self._vocabulary.seconds(rest[0])
            spans.append(TokenSpan(max(begins, 0.0), chunk.seconds, rest))
        return [_up_to(chunk.seconds, span) for span in spans]


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


def _advance(behind: deque[Iterator[bool]]) -> None:
    """Take all batches that are behind one step further, and drop those that are done."""
    for each in list(behind):
        if next(each):
            behind.remove(each)


def _in_order(order: deque[Item]) -> Iterator[Read]:
    """What chunks say, as far as all before them are done."""
    while order and order[0].is_done:
        yield _read(order.popleft())


def _read(item: Item) -> Read:
    done = round(item.chunk.end * FRAMES_PER_SECOND)
    total = round(item.owner.seconds * FRAMES_PER_SECOND)
    return Read(item.index, item.all_segments(), min(done, total), total)


def _text_length(segments: Sequence[Segment]) -> int:
    return sum(len(segment.text) for segment in segments)


def _language(item: Item) -> str:
    language = item.language or item.owner.language
    assert language is not None
    return language


def spoken_window(item: Item, states: Tensor, segments: tuple[Segment, ...]) -> SpokenWindow:
    """What is needed to find the words of a chunk; nobody speaks right before it."""
    owner, chunk = item.owner, item.chunk
    return SpokenWindow(
        states=states,
        segments=segments,
        start=chunk.start,
        frames=round(chunk.seconds * FRAMES_PER_SECOND),
        seconds=min(owner.seconds, chunk.end),
        language=_language(item),
        task=owner.task,
        last_speech=chunk.start,
    )


def _up_to(end: float, span: TokenSpan) -> TokenSpan:
    start = min(span.start, end)
    return TokenSpan(start, max(start, min(span.end, end)), span.tokens)
