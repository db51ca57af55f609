"""Recordings opened ahead of use: many files in processes, few and small ones in threads.

Decoding is a call of Python for every packet. Threads that decode hold the interpreter's lock in
turn, and with it the thread that feeds a device; a decoder that crashes ends the program. So files
that are worth the start of a process (`LEAST_BYTES` together) are decoded by a `DecoderPool`, where
a crash or a hang costs one recording. Bytes are sent there. What lasts less than that start,
open files and pipes are decoded by threads of this process. Free processes decode one long
recording in parts (`parts`), if it is the next to be given.

Memory: what is decoded ahead is at most `AHEAD_SECONDS` of audio, and beyond that one block of 30 s
for every process and what the oldest recording needs (`HELD_SECONDS`). Longer recordings have
`LONG_SECONDS` in memory, together and until they are transcribed; the others of them stay in their
files. Each process takes about 60 MB and 8 MB of shared memory. None of it grows with the
number of recordings.
"""

from __future__ import annotations

import io
import logging
import math
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from threading import BoundedSemaphore, Condition, Event, Lock
from typing import Any, Self

from whisper_flash_attention.audio.audio_source import (
    HELD_SECONDS,
    AudioInput,
    AudioSource,
    ChannelSources,
    HeldBlocks,
    SampleBudget,
    chosen_track,
    stream_audio,
)
from whisper_flash_attention.audio.container import Shared, name_of
from whisper_flash_attention.audio.decode import MOST_SECONDS
from whisper_flash_attention.audio.decoder_pool import (
    DecodeRequest,
    DecoderPool,
    default_workers,
)
from whisper_flash_attention.audio.decoder_process import SLOT_SAMPLES, ProcessEnded
from whisper_flash_attention.audio.parts import (
    LEAST_PARTS,
    MOST_PARTS,
    OVERLAP,
    InexactPart,
    join_parts,
)
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.errors import AudioError, DecoderError, OptionError, is_bug

logger = logging.getLogger(__name__)

# Bytes of files from which on processes decode: some minutes of audio, which one thread decodes
# about as fast as a process starts. A byte of a lossy codec counts as several: it takes longer.
LEAST_BYTES = 16 * 2**20
LOSSLESS = frozenset((".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".w64", ".wav"))
LOSSY_BYTE = 4
# Bytes that are sent to a process: it holds a copy of them.
MOST_SENT_BYTES = 256 * 2**20
# More threads than this wait for one another's calls of Python.
THREADS = 4
# Recordings whose decoding has begun and that were not taken, and how long they may be together:
# 0.46 GB. Two batches of 128 windows are 7,680 s.
AHEAD_FILES = 256
AHEAD_SECONDS = 7_200.0
# Of recordings of more than `HELD_SECONDS` that are in memory, in work or ahead: 0.92 GB.
LONG_SECONDS = 14_400.0


@dataclass(frozen=True, slots=True)
class OpenedAudio:
    """One recording that can be read, or the error that was raised instead."""

    input: AudioInput | DecodeRequest
    audio: AudioSource | ChannelSources | None = None
    error: Exception | None = None

    def result(self) -> AudioSource | ChannelSources:
        """The recording. Raises the error if it cannot be read."""
        if self.audio is None:
            assert self.error is not None
            raise self.error
        return self.audio


class AudioOpener:
    """Opens recordings, and keeps the processes that decode them until it is closed.

    Use it as a context manager, or close it. What it opened may be longer than `held_seconds`; that
    is read through it, and so before it is closed.

    Args:
        pool: of decoder processes, for this object alone, and closed with it; None is one that is
            made when it is needed, with a process for every core but one; these are kept for some
            time, for the next call.
        in_parts: whether free processes decode one long recording side by side.
        held_seconds: a recording up to this length is held in memory.
        long_seconds: longer ones are held up to this length together; beyond it, a recording stays
            in its file and is decoded whenever it is read.
        least_bytes: size of files, all together, from which on processes decode them.
    """

    def __init__(
        self,
        pool: DecoderPool | None = None,
        *,
        in_parts: bool = True,
        held_seconds: float = HELD_SECONDS,
        long_seconds: float = LONG_SECONDS,
        least_bytes: int = LEAST_BYTES,
    ) -> None:
        self._pool, self._in_parts = pool, in_parts
        self._held_seconds, self._least_bytes = held_seconds, least_bytes
        self._budget = SampleBudget(long_seconds)
        self._bytes = 0  # of files that were taken
        self._threads: ThreadPoolExecutor | None = None
        self._rooms: list[_Room] = []
        self._is_closed = False
        self._lock = Lock()  # of closing, against what is begun meanwhile
        self._rereads = BoundedSemaphore(default_workers() if pool is None else pool.workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End processes and threads; from any thread, repeatedly.

        What is being opened elsewhere raises `DecoderError`.
        """
        with self._lock:
            self._is_closed = True
            rooms, pool, threads = list(self._rooms), self._pool, self._threads
        for room in rooms:
            room.stop()
        if pool is not None:
            pool.close()
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)

    def open_each(
        self,
        inputs: Iterable[AudioInput | DecodeRequest],
        *,
        ahead: int = AHEAD_FILES,
        ahead_seconds: float = AHEAD_SECONDS,
    ) -> Generator[OpenedAudio]:
        """Open recordings in their order, files ahead of use.

        A recording that cannot be read gives its error, and the others follow.

        Args:
            inputs: taken as they are needed, in the caller's thread; what is no file is taken when
                its turn comes, and nothing beyond it. A `DecodeRequest` is decoded by a process,
                whatever its size, and held whatever its length.
            ahead: the most recordings in memory at a time, decoded or being decoded, the one given
                last included. With 1 nothing is decoded ahead.
            ahead_seconds: seconds of audio decoded ahead by processes, beyond which only the oldest
                recording is decoded on.

        Raises:
            OptionError: at once, if `ahead` is below 1, or `ahead_seconds` negative.
            DecoderError: processes cannot be started, or this object was closed.
            Exception: what `is_bug` says no recording is the cause of.
        """
        if ahead < 1:
            raise OptionError(f"ahead must be at least 1, got {ahead}")
        if not ahead_seconds >= 0:
            raise OptionError(f"ahead_seconds must be seconds, not negative, got {ahead_seconds}")
        return self._in_order(iter(inputs), ahead, ahead_seconds * SAMPLING_RATE)

    def _in_order(
        self, inputs: Iterator[AudioInput | DecodeRequest], most: int, most_samples: float
    ) -> Generator[OpenedAudio]:
        room = _Room(most_samples)
        taken: deque[AudioInput | DecodeRequest] = deque()
        begun: deque[Callable[[], OpenedAudio]] = deque()
        with self._lock:
            self._raise_if_closed()
            self._rooms.append(room)
        try:
            while True:
                # What is no file waits here for its turn, so that none beyond it is taken.
                while len(taken) + len(begun) < most and (not taken or _is_file(taken[-1])):
                    if (each := next(inputs, None)) is None:
                        break
                    self._bytes += _work(each)
                    taken.append(each)
                limit = most if self._uses_processes(taken) else min(most, _threads() + 1)
                while taken and len(begun) < limit and (_is_file(taken[0]) or not begun):
                    begun.append(self._begin(taken.popleft(), room))
                if not begun:
                    return
                # Not bound to a name here, so that the caller alone decides how long it lives.
                yield begun.popleft()()
        finally:
            room.stop()
            self._rooms.remove(room)

    def _uses_processes(self, taken: Iterable[AudioInput | DecodeRequest]) -> bool:
        is_worth_it = self._bytes >= self._least_bytes
        return is_worth_it or any(isinstance(each, DecodeRequest) for each in taken)

    def _begin(self, each: AudioInput | DecodeRequest, room: _Room) -> Callable[[], OpenedAudio]:
        """Begin to open a recording; the call that waits for the end."""
        request = each if isinstance(each, DecodeRequest) else None
        if isinstance(each, AudioInput):
            request = _request(each) if self._bytes >= self._least_bytes else None
            if request is None:
                open_here = partial(self._opened, each, partial(self._open_here, each, room))
                return self._executor().submit(open_here).result if each.is_file else open_here
        assert request is not None
        number = room.add()
        open_it = partial(self._decode, each, request, room, number)
        future = self._executor().submit(self._opened, each, open_it)

        def result() -> OpenedAudio:
            opened = future.result()
            room.give_back(number)
            return opened

        return result

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            self._raise_if_closed()
            if self._threads is None:
                workers = default_workers() if self._pool is None else self._pool.workers
                most = max(workers, _threads())
                self._threads = ThreadPoolExecutor(most, thread_name_prefix="opener")
            return self._threads

    def _processes(self) -> DecoderPool:
        with self._lock:
            self._raise_if_closed()
            if self._pool is None:
                self._pool = DecoderPool(reuse=True)
            return self._pool

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise DecoderError("recordings cannot be opened any more: the opener was closed")

    def _opened(
        self,
        each: AudioInput | DecodeRequest,
        open_it: Callable[[], AudioSource | ChannelSources],
    ) -> OpenedAudio:
        try:
            return OpenedAudio(each, open_it())
        except DecoderError:
            raise
        except Exception as error:  # of this recording, unless it is a bug
            if not is_bug(error):
                return OpenedAudio(each, error=error)
            if _is_file(each):
                error.add_note(f"while {_name(each)} was decoded")
            raise

    def _open_here(self, each: AudioInput, room: _Room) -> AudioSource | ChannelSources:
        """Open a recording in this process; stop early if the opener is closed."""
        found = each.open(room.stopped, self._held_seconds, self._budget)
        self._raise_if_closed()
        return found

    def _decode(
        self, each: AudioInput | DecodeRequest, request: DecodeRequest, room: _Room, number: int
    ) -> AudioSource | ChannelSources:
        """Have a process decode a recording, as far as it may be held."""
        most = self._held_seconds if isinstance(each, AudioInput) else math.inf
        budget = None if isinstance(request.channel, str) else self._budget
        held = HeldBlocks(request.source, most, budget)
        channels = 1

        def blocks() -> Generator[Samples]:
            nonlocal channels
            pool = self._processes()
            with pool.reserved(1) as own:  # for whatever follows, so as not to wait for it again
                if own and room.is_oldest(number):
                    parts = self._parts(request, held, room.stopped)
                    if parts is not None:
                        yield from parts
                        return
                channels = yield from pool.stream(request, beside=own > 0)

        try:
            with closing(blocks()) as stream:
                for block in stream:
                    if not held.add(block):
                        room.give_back(number)
                        return self._left_in_file(request)
                    if not room.wait_for_room(number, block.size):
                        break
            self._raise_if_closed()
            return _held(request, held, channels)
        except BaseException:
            held.drop()  # the error's traceback keeps it
            room.give_back(number)
            raise
        finally:
            room.finish(number)

    def _parts(
        self, request: DecodeRequest, held: HeldBlocks, stopped: Event
    ) -> list[Samples] | None:
        """Decode a long recording in parts on free processes; None if one must decode it all.

        The caller has reserved one process.

        Raises:
            AudioError: the decoder crashed or hung on it.
            DecoderError: as `open_each`.
        """
        pool = self._processes()
        is_whole_file = isinstance(request.source, str | Path) and request.opener is None
        is_usual = (request.start, request.end, request.sampling_rate) == (0, None, SAMPLING_RATE)
        if not (self._in_parts and pool.decodes_parts and is_whole_file and is_usual):
            return None
        if pool.workers < LEAST_PARTS or isinstance(request.channel, str):
            return None
        failed = Event()

        def decode(start: int, end: int, is_last: bool) -> list[Samples]:
            last = None if is_last else end / SAMPLING_RATE
            part = replace(request, start=start / SAMPLING_RATE, end=last, is_part=True)
            blocks: list[Samples] = []
            room = end - start + OVERLAP + SLOT_SAMPLES
            try:
                with closing(pool.stream(part, beside=True)) as stream:
                    for block in stream:
                        blocks.append(block)
                        room -= block.size
                        if room < 0:
                            raise InexactPart("it is longer than its container states")
                        if failed.is_set() or stopped.is_set():
                            break
                return blocks
            except BaseException:
                failed.set()
                raise

        try:
            with pool.reserved(MOST_PARTS - 1) as others:
                bounds = self._part_bounds(request, 1 + others)
                if not bounds or not held.take_room(bounds[-1]):
                    return None
                count = len(bounds) - 1
                with ThreadPoolExecutor(count, thread_name_prefix="opener") as threads:
                    is_last = [False] * (count - 1) + [True]
                    parts = list(threads.map(decode, bounds[:-1], bounds[1:], is_last))
            if stopped.is_set():
                raise DecoderError("recordings are not taken any more")
            return join_parts(parts)
        except DecoderError:
            raise
        except Exception as error:  # whatever is wrong with it, decoding it whole says it best
            self._raise_if_closed()
            if isinstance(error.__cause__, ProcessEnded):
                raise
            logger.debug("%s: one process decodes it: %s", name_of(request.source), error)
            return None

    def _part_bounds(self, request: DecodeRequest, free: int) -> list[int]:
        """Compute the bounds of parts in a decoder process, given the number of free processes."""
        if free < LEAST_PARTS:
            return []
        reply = self._processes().stream(replace(request, most_parts=free), beside=True)
        try:
            next(reply)
        except StopIteration as end:
            bounds: list[int] = end.value
            return bounds
        raise AssertionError("bounds of parts have no samples")

    def _left_in_file(self, request: DecodeRequest) -> AudioSource | ChannelSources:
        if request.channel == "each":
            channels = chosen_track(request.source, request.track).channels
            each = (replace(request, channel=number) for number in range(1, channels + 1))
            return ChannelSources(tuple(map(self._source, each)))
        return self._source(request)

    def _source(self, request: DecodeRequest) -> AudioSource:
        reader = _Reader(request, self._processes(), self._rereads)
        return AudioSource(source=request.source, reader=reader.read)


@dataclass(slots=True)
class _Reader:
    """Reads a long recording through a process, as often as needed.

    The first time there is a process for it in any case. A file that was decoded to its end there
    neither crashes nor hangs a decoder; while all processes for further readings are taken, as by
    many long recordings side by side, it is read in this process.
    """

    request: DecodeRequest
    pool: DecoderPool
    free: BoundedSemaphore
    was_read: bool = False

    def read(self) -> Iterator[Samples]:
        is_free = self.free.acquire(blocking=False)
        try:
            if is_free or not self.was_read:
                yield from self.pool.stream(self.request, beside=True)
                self.was_read = True
            else:
                channel, track = self.request.channel, self.request.track
                assert not isinstance(channel, str)
                yield from stream_audio(self.request.source, channel=channel, track=track)
        finally:
            if is_free:
                self.free.release()


class _Room:
    """Has only the oldest recording decoded on, once processes are `most` samples ahead."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._held: Counter[int] = Counter()  # samples by recording
        self._changed = Condition()
        self._numbers = count()
        self._unfinished: dict[int, None] = {}  # in the order of the recordings
        self.stopped = Event()

    def add(self) -> int:
        """A number for the next recording."""
        with self._changed:
            number = next(self._numbers)
            self._unfinished[number] = None
            return number

    def is_oldest(self, number: int) -> bool:
        """Whether a recording is the next to be given, so that none is waited for before it."""
        with self._changed:
            return next(iter(self._unfinished)) == number

    def wait_for_room(self, number: int, size: int) -> bool:
        """Count samples of a recording, and wait until it may continue; False if that is over."""

        def may_continue() -> bool:
            is_oldest = next(iter(self._unfinished)) == number
            return self.stopped.is_set() or is_oldest or self._held.total() <= self._most

        with self._changed:
            self._held[number] += size
            self._changed.wait_for(may_continue)
            return not self.stopped.is_set()

    def finish(self, number: int) -> None:
        """No more samples of a recording will come."""
        with self._changed:
            del self._unfinished[number]
            self._changed.notify_all()

    def give_back(self, number: int) -> None:
        """Count a recording's samples no more."""
        with self._changed:
            self._held.pop(number, None)
            self._changed.notify_all()

    def stop(self) -> None:
        """Note that recordings are not taken any more."""
        with self._changed:
            self.stopped.set()
            self._changed.notify_all()


def _threads() -> int:
    return min(THREADS, os.cpu_count() or 1)


def _is_file(each: AudioInput | DecodeRequest) -> bool:
    return isinstance(each, DecodeRequest) or each.is_file


def _name(each: AudioInput | DecodeRequest) -> str:
    source: Any = each.source if isinstance(each, DecodeRequest) else each.audio
    return name_of(source)


def _status(each: AudioInput | DecodeRequest) -> os.stat_result | None:
    """Of a file that is named; opening it will say what is wrong with another."""
    if isinstance(each, AudioInput) and isinstance(each.audio, str | os.PathLike):
        with suppress(OSError, ValueError):
            return os.stat(each.audio)
    return None


def _size(each: AudioInput | DecodeRequest) -> int:
    status = _status(each)
    if status is not None:
        return status.st_size
    source = each.source if isinstance(each, DecodeRequest) else each.audio
    if isinstance(source, Shared):
        return source.again().seek(0, os.SEEK_END)
    return len(source) if isinstance(source, bytes) else 0


def _work(each: AudioInput | DecodeRequest) -> int:
    """How long it takes to decode, as bytes of a lossless codec."""
    source = each.source if isinstance(each, DecodeRequest) else each.audio
    if not isinstance(source, str | os.PathLike):
        return _size(each)
    suffix = os.path.splitext(os.fsdecode(source))[1].lower()
    return _size(each) * (1 if suffix in LOSSLESS else LOSSY_BYTE)


def _request(each: AudioInput) -> DecodeRequest | None:
    """What a process gets of a file on disk, and of bytes; None of other files."""
    audio = each.audio
    source: str | Shared
    if isinstance(audio, bytes | Shared) and _size(each) <= MOST_SENT_BYTES:
        source = Shared(io.BytesIO(audio), name_of(audio)) if isinstance(audio, bytes) else audio
    elif (status := _status(each)) is not None and stat.S_ISREG(status.st_mode):
        assert isinstance(audio, str | os.PathLike)
        source = os.fsdecode(audio)
    else:
        return None
    return DecodeRequest(
        source,
        channel=None if each.channel == "mix" else each.channel,
        track=each.track,
        most_seconds=MOST_SECONDS,
    )


def _held(request: DecodeRequest, held: HeldBlocks, channels: int) -> AudioSource | ChannelSources:
    if not isinstance(request.channel, str):
        return held.as_source(request.channel, request.track)
    samples = held.as_source().whole()
    if samples.size % channels:
        name = name_of(request.source)
        raise AudioError(f"{name}: its {channels} channels differ in length")
    return ChannelSources(tuple(map(AudioSource, samples.reshape(channels, -1))))
