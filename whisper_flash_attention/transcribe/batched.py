"""Transcribe chunks of speech side by side, of any number of recordings.

No chunk waits for another, so that one long recording fills a batch as well as many short ones do.
A chunk has no previous text as context. Its result falls back to higher temperatures as in the
sequential algorithm, and all of it is kept: what follows the last pair of timestamps is a segment,
too. What the result leaves out of the chunk (`leftovers`) is decoded with other chunks.

On a GPU a thread prepares the next batch and copies it (`prefetch`) while the device works on the
one before; copies are not interrupted by other Python threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whisper_flash_attention.audio.log_mel import frame_levels, log_mel
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.audio.threads import in_threads, threads_beside
from whisper_flash_attention.audio.vad import Chunk, cut_all, find_speech
from whisper_flash_attention.engine.cuda_graphs import copy_stream
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.segmentation import (
    FRAMES_PER_SECOND,
    TokenSpan,
    chunks_within,
    leftovers,
    segment_of,
    spans_of,
    split_at_timestamps,
)
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import (
    DecodingResult,
    Window,
    WindowDecoder,
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
    stream = copy_stream(device)

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


# Where kernels are compiled, or graphs recorded, for a number of rows.
PADDED_DEVICES = ("cuda",)


def padded_rows(count: int, most: int) -> int:
    """Rows that are computed for `count` of them: `most`, half of that, a quarter ... as fits.

    So the last batch of a run, of whatever number of chunks, has one of a few shapes.
    """
    rows = most
    while rows > 1 and (half := (rows + 1) // 2) >= count:
        rows = half
    return rows


# Chunks are encoded, and words aligned, in this many groups for all slots.
GROUPS = 4
# Leftovers of leftovers are decoded, too, up to this depth.
MOST_DEPTH = 3


@dataclass(eq=False)
class PendingChunk:
    """A chunk of a recording until it and what its result left out of it are decoded.

    Args:
        is_first: whether it is the first of its recording.
        language: of this chunk, if that is detected in every one.
        parent: the chunk of which this one was left, if it was.
        segments: of its result.
        parts: chunks that its result left.
        is_split: whether these parts are all of the chunk, to replace its result.
        is_decoded: whether `segments` is known.
        levels: of its frames, in dB, if its words get times.
    """

    recording: Recording
    chunk: Chunk
    is_first: bool
    language: str | None = None
    parent: PendingChunk | None = None
    segments: tuple[Segment, ...] = ()
    parts: tuple[PendingChunk, ...] = ()
    is_split: bool = False
    is_decoded: bool = False
    levels: Tensor | None = None

    @property
    def depth(self) -> int:
        """0 for a chunk of the recording, 1 for what its result left, and so on."""
        return 0 if self.parent is None else 1 + self.parent.depth

    @property
    def is_done(self) -> bool:
        """Whether it and all that it left are decoded."""
        return self.is_decoded and all(part.is_done for part in self.parts)

    def all_segments(self) -> tuple[Segment, ...]:
        """Segments of it and of what it left, in order of time."""
        left = [segment for part in self.parts for segment in part.all_segments()]
        if self.is_split:
            return max(self.segments, tuple(left), key=_text_length)
        return tuple(sorted([*self.segments, *left], key=lambda segment: segment.start))

    @property
    def spoken_language(self) -> str:
        """Code of the language, which is known once it was given or detected."""
        language = self.language or self.recording.language
        assert language is not None
        return language

    def __str__(self) -> str:
        return f"the speech at {self.chunk.start:.1f} s of recording {self.recording.index + 1}"


# A batch, and its clips where they are to be encoded.
_Prefetched = tuple[list[PendingChunk], list[Any]]
# A recording, and the segments of one chunk of it.
ChunkSegments = tuple[Recording, tuple[Segment, ...]]


class BatchedReader:
    """Transcribes chunks of speech of many recordings on an engine, `batch_size` at a time.

    Chunks share slots: one whose result has ended makes room for the next. Where all results have
    one length, or tokens are sampled, they are decoded batch by batch; on a GPU the host is then
    one batch ahead with samples and one batch late with text, so that neither waits for the other.
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
        most = options.max_new_tokens
        # Results that are all cut off leave nothing: without a detector no chunk is doubtful then.
        has_doubtful = options.uses_vad or most is None or (options.min_new_tokens or 0) < most
        self._decoder = WindowDecoder(
            engine, vocabulary, tokenizer, options, always_probe_no_speech=has_doubtful
        )
        self._threads = threads_beside(engine.weights.device)
        # Chunks that are encoded together, at most.
        self._size = 1
        # Leftovers that are not in a batch.
        self._left: deque[PendingChunk] = deque()

    def prepare(self, recording: Recording) -> Recording:
        """Find the speech of a recording; where there is none, the recording is done.

        Raises:
            AudioError: the recording cannot be read.
            MissingPackage: Silero's package is not installed.
            OptionError: its initial prompt contains a special token.
        """
        self._decoder.begin(recording)
        assert recording.source is not None
        if self._options.uses_vad:
            # Short recordings are prepared side by side.
            threads = self._threads if recording.source.seconds is None else min(1, self._threads)
            found = find_speech(
                recording.source, options=self._options.vad_parameters, threads=threads
            )
        else:
            found = cut_all(recording.source)
        seconds, chunks = found
        chunks = chunks_within(chunks, spans_of(self._options.clip_timestamps))
        recording.begin_chunks(chunks, seconds)
        return recording

    def prepared(self, recordings: Iterable[Recording]) -> Generator[Recording]:
        """Prepare all recordings; where a GPU would wait for the detector, several side by side.

        A long recording has several threads to itself, and is prepared when its turn has come.
        """
        if not (self._options.uses_vad and self._threads):
            yield from map(self.prepare, recordings)
            return
        for recording, is_prepared in in_threads(self._prepare_short, recordings, self._threads):
            yield recording if is_prepared else self.prepare(recording)

    def _prepare_short(self, recording: Recording) -> tuple[Recording, bool]:
        """Prepare a recording that is not long; the recording, and whether it is prepared."""
        assert recording.source is not None
        is_long = recording.source.seconds is None
        return (recording, False) if is_long else (self.prepare(recording), True)

    def read(self, recordings: Iterable[Recording], batch_size: int) -> Iterator[ChunkSegments]:
        """Transcribe all recordings, in their order; yield the segments of every chunk in turn.

        Args:
            recordings: prepared ones, taken when their first chunk is needed; on a GPU by another
                thread.
            batch_size: chunks that are decoded side by side, at most.
        """
        in_slots = self._decoder.fits_slots
        size = self._size = max(1, batch_size // GROUPS) if in_slots else batch_size
        prefetched = prefetch(_batches(recordings, size), _clips, self._engine.weights.device)
        # After an error no thread takes recordings any more.
        with closing(prefetched):
            if in_slots:
                yield from self._read_in_slots(prefetched, batch_size)
            else:
                yield from self._read_in_batches(prefetched, size)

    def _read_in_slots(self, groups: Iterator[_Prefetched], slots: int) -> Iterator[ChunkSegments]:
        ready: deque[Window] = deque()
        order: deque[PendingChunk] = deque()
        size = max(1, slots // GROUPS)

        def more(count: int) -> list[Window]:
            while len(ready) < count:
                # Few leftovers wait for others, so that the encoder has a group to work on.
                group = self._take_left(size) if len(self._left) >= size else next(groups, None)
                group = group or self._take_left(size)
                if group is None:
                    break
                order.extend(each for each in group[0] if each.parent is None)
                ready.extend(self._windows(*group))
            return [ready.popleft() for _ in range(min(count, len(ready)))]

        def with_leftovers() -> Iterator[tuple[Window, DecodingResult]]:
            # Noted before more windows are requested.
            for window, result in self._decoder.decode_windows(more, slots):
                self._note_left(window.owner, result)
                yield window, result

        decoded = with_leftovers()
        # Words of several chunks are aligned together.
        together = 1 if self._aligner is None else size
        late: deque[Iterator[bool]] = deque()
        while some := list(islice(decoded, together)):
            chunks = [window.owner for window, _ in some]
            states = [window.states for window, _ in some]
            results = [result for _, result in some]
            late.append(self._follow(chunks, states, partial(list, results)))
            _advance(late)
            while late and not self._follows_later:
                _advance(late)
            yield from _in_order(order)
        while late:
            _advance(late)
        yield from _in_order(order)

    def _take_left(self, most: int) -> _Prefetched | None:
        """Leftovers that are decoded next, and their clips; None if there are none."""
        chunks = [self._left.popleft() for _ in range(min(most, len(self._left)))]
        return (chunks, _clips(chunks)) if chunks else None

    def _note_left(self, pending: PendingChunk, result: DecodingResult) -> None:
        """Have what a result leaves out of its chunk decoded, too."""
        if pending.depth == MOST_DEPTH or not self._counts(pending.chunk, result):
            return
        most = self._options.max_new_tokens
        if most is not None and len(result.tokens) >= most:
            return  # cut off on purpose
        left = leftovers(
            pending.chunk,
            result.tokens,
            self._token_spans(pending.chunk, result),
            self._vocabulary,
            uses_vad=self._options.uses_vad,
        )
        pending.is_split = left.is_split
        pending.parts = tuple(
            PendingChunk(pending.recording, chunk, False, pending.language, pending)
            for chunk in left.chunks
        )
        self._left.extend(pending.parts)

    def _windows(self, chunks: list[PendingChunk], clips: list[Any]) -> list[Window]:
        """Windows of chunks, with their encoder states and prompts."""
        states = self._encode(chunks, clips)
        self._detect_languages(chunks, states)
        # States of their own: those of a group would be held until the last of it is done.
        return [
            Window(row.clone(), self._prompt(each), each)
            for row, each in zip(states[: len(chunks)], chunks, strict=True)
        ]

    def _read_in_batches(
        self, batches: Iterator[_Prefetched], size: int
    ) -> Iterator[ChunkSegments]:
        order: deque[PendingChunk] = deque()
        late: deque[Iterator[bool]] = deque()
        while True:
            group = next(batches, None) or self._take_left(size)
            if group is None:
                if not late:
                    return
                # What these leave is known once they are done.
                _advance(late)
                yield from _in_order(order)
                continue
            batch, clips = group
            order.extend(each for each in batch if each.parent is None)
            states = self._encode(batch, clips)
            self._detect_languages(batch, states)
            prompts = [self._prompt(each) for each in batch]
            prompts += prompts[-1:] * (len(states) - len(batch))

            def catch_up() -> None:
                _advance(late)

            later = self._decoder.decode_first(states, prompts, catch_up)
            late.append(self._follow(batch, states[: len(batch)], self._noting(batch, later)))
            yield from _in_order(order)
            while late and not self._follows_later:
                _advance(late)
                yield from _in_order(order)

    def _noting(
        self, batch: list[PendingChunk], later: Callable[[], list[DecodingResult]]
    ) -> Callable[[], list[DecodingResult]]:
        """The same results, of which it is noted what they leave."""

        def results() -> list[DecodingResult]:
            found = later()[: len(batch)]
            for pending, result in zip(batch, found, strict=True):
                self._note_left(pending, result)
            return found

        return results

    def _follow(
        self,
        batch: list[PendingChunk],
        states: Tensor | list[Tensor],
        later: Callable[[], list[DecodingResult]],
    ) -> Iterator[bool]:
        """What the host does of a batch while the device decodes the next; yields whether it ended.

        It yields False where the device was given more to do, and the next batch may go first.
        """
        found = self.segments(batch, later())
        if self._aligner is not None:
            spoken = [spoken_window(*each) for each in zip(batch, states, found, strict=True)]
            words = self._aligner.begin(spoken)
            yield False
            found = [each.segments for each in words()]
        for pending, segments in zip(batch, found, strict=True):
            pending.segments, pending.is_decoded = segments, True
        yield True

    def _encode(self, chunks: list[PendingChunk], clips: list[Any]) -> Tensor:
        """Encoder states of chunks, and after them of the last one again, as `padded_rows` says."""
        weights = self._engine.weights
        if weights.device.type in PADDED_DEVICES:
            most = max(self._size, len(clips))
            clips = clips + clips[-1:] * (padded_rows(len(clips), most) - len(clips))
        features = log_mel(
            clips,
            mel_bins=weights.encoder.conv1.weight.shape[1],
            device=weights.device,
            dtype=weights.dtype,
        )
        if self._aligner is not None:
            for pending, levels in zip(chunks, frame_levels(features), strict=False):
                pending.levels = levels
        return self._engine.encode(features)

    def _detect_languages(self, chunks: list[PendingChunk], states: Tensor) -> None:
        """Detect languages that are not known: of recordings in their first chunk, or of chunks.

        What a chunk leaves is short, and in the language of the chunk.
        """
        rows: dict[int, int] = {}
        for row, pending in enumerate(chunks):
            if self._options.multilingual and pending.language is None:
                rows.setdefault(id(pending), row)
            elif pending.recording.language is None:
                rows.setdefault(id(pending.recording), row)
        if not rows:
            return
        chosen = list(rows.values())
        found = self._decoder.detect_languages(
            [chunks[row].recording for row in chosen], states[chosen]
        )
        if self._options.multilingual:
            for row, language in zip(chosen, found, strict=True):
                chunks[row].language = language

    def _prompt(self, pending: PendingChunk) -> list[int]:
        return self._decoder.prompt(
            pending.recording, pending.spoken_language, is_first=pending.is_first
        )

    def segments(
        self, batch: Sequence[PendingChunk], results: Sequence[DecodingResult]
    ) -> list[tuple[Segment, ...]]:
        """Segments of each chunk of a batch, in seconds of its recording."""
        return [self._segments(*each) for each in zip(batch, results, strict=True)]

    def _segments(self, pending: PendingChunk, result: DecodingResult) -> tuple[Segment, ...]:
        chunk = pending.chunk
        if not self._counts(chunk, result):
            return ()
        found = []
        for span in self._token_spans(chunk, result):
            text = self._decoder.text(span.tokens)
            if text:
                found.append(segment_of(span, text, chunk.start, result, pending.language))
        return tuple(found)

    def _counts(self, chunk: Chunk, result: DecodingResult) -> bool:
        """Whether a result counts: it is not silence, and credible where speech is doubtful."""
        if chunk.is_doubtful and not self._decoder.is_credible(result):
            return False
        return not self._decoder.is_silent(result)

    def _token_spans(self, chunk: Chunk, result: DecodingResult) -> list[TokenSpan]:
        """Spans of all tokens of a chunk, none of them longer than the chunk."""
        frames = round(chunk.seconds * FRAMES_PER_SECOND)
        spans, _ = split_at_timestamps(result.tokens, frames, self._vocabulary)
        rest = result.tokens[sum(len(span.tokens) for span in spans) :]
        if rest:
            begins = self._vocabulary.seconds(rest[0])
            spans.append(TokenSpan(max(begins, 0.0), chunk.seconds, rest))
        return [_up_to(chunk.seconds, span) for span in spans]


def _batches(recordings: Iterable[Recording], size: int) -> Iterator[list[PendingChunk]]:
    waiting = (
        PendingChunk(recording, chunk, is_first=number == 0)
        for recording in recordings
        for number, chunk in enumerate(recording.chunks or ())
    )
    while batch := list(islice(waiting, size)):
        yield batch


def _clips(batch: list[PendingChunk]) -> list[Samples]:
    return [each.chunk.samples for each in batch]


def _advance(late: deque[Iterator[bool]]) -> None:
    """Take all batches whose text is late one step further, and drop those that ended."""
    for each in list(late):
        if next(each):
            late.remove(each)


def _in_order(order: deque[PendingChunk]) -> Iterator[ChunkSegments]:
    """Segments of chunks, as far as all chunks before them are done."""
    while order and order[0].is_done:
        pending = order.popleft()
        recording, segments = pending.recording, pending.all_segments()
        recording.add_chunk(segments, min(1.0, pending.chunk.end / recording.seconds))
        yield recording, segments


def _text_length(segments: Sequence[Segment]) -> int:
    return sum(len(segment.text) for segment in segments)


def spoken_window(
    pending: PendingChunk, states: Tensor, segments: tuple[Segment, ...]
) -> SpokenWindow:
    """What aligning words needs of a chunk, which follows no speech."""
    recording, chunk = pending.recording, pending.chunk
    return SpokenWindow(
        states=states,
        segments=segments,
        start=chunk.start,
        frames=round(chunk.seconds * FRAMES_PER_SECOND),
        seconds=min(recording.seconds, chunk.end),
        language=pending.spoken_language,
        task=recording.options.task,
        last_speech=chunk.start,
        words_end=chunk.start,
        levels=pending.levels,
    )


def _up_to(end: float, span: TokenSpan) -> TokenSpan:
    start = min(span.start, end)
    return TokenSpan(start, max(start, min(span.end, end)), span.tokens)
