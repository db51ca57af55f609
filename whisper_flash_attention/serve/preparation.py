"""Jobs before their first turn: they wait for room, and threads open and prepare their recordings.

Preparing is all that a recording needs before a window of it is encoded: reading, features, the
window. The same threads take the next window of a recording whose last one was decoded.

Short recordings and long ones have queues, room and threads of their own, so that none of the short
ones waits while long ones are read. Beside a GPU, processes decode the uploads: threads would keep
the interpreter's lock from the one that feeds the GPU.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from threading import Condition, Event, Lock
from typing import Any

import torch

from whisper_flash_attention.audio.audio_source import AudioInput, AudioSource, ChannelSources
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.engine.cuda_graphs import preparation_stream
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.serve.jobs import (
    BoundedSource,
    Cancelled,
    Entry,
    Job,
    check_length,
    take_window,
)
from whisper_flash_attention.transcribe.arguments import CallOptions
from whisper_flash_attention.transcribe.recording import recordings_of
from whisper_flash_attention.transcribe.sequential import SequentialReader
from whisper_flash_attention.transcribe.transcriber import Reader, Transcriber

# Jobs that are prepared or have begun, per slot.
SHORT_PER_SLOT, LONG_PER_SLOT = 4, 1
# Threads that prepare short recordings, at most, and long ones.
SHORT_THREADS, LONG_THREADS = 8, 2
# Options whose readers are kept.
MOST_READERS = 64


class Preparation:
    """Jobs that wait or have begun, and the threads that prepare recordings of one model.

    Args:
        wake: guards the jobs, and is notified when some come or end.
        on_ready: takes recordings whose next window is there.
        on_end: takes a job that has ended, and its error if it failed.

    Attributes:
        device: of the model.
    """

    def __init__(
        self,
        wake: Condition,
        on_ready: Callable[[Sequence[Entry]], None],
        on_end: Callable[[Job, BaseException | None], None],
    ) -> None:
        self._wake, self._on_ready, self._on_end = wake, on_ready, on_end
        self.device = torch.device("cpu")
        self._coming: dict[bool, deque[Job]] = {False: deque(), True: deque()}
        self._begun: dict[bool, set[Job]] = {False: set(), True: set()}
        self._readers: OrderedDict[DecodeOptions, Reader] = OrderedDict()
        self._reading = Lock()
        self._opener: AudioOpener | None = None
        self._pools = {
            is_long: ThreadPoolExecutor(count, thread_name_prefix="whisper-flash-open")
            for is_long, count in ((False, short_threads()), (True, LONG_THREADS))
        }

    # Jobs.

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return sum(map(len, self._coming.values()))

    @property
    def begun(self) -> tuple[int, int]:
        """Numbers of jobs, of short and of long recordings, that are prepared or transcribed."""
        return len(self._begun[False]), len(self._begun[True])

    def add(self, job: Job) -> None:
        """Have a job wait."""
        with self._wake:
            self._coming[job.is_long].append(job)
            self._wake.notify()

    def has_room(self, slots: int) -> bool:
        """Whether a job that waits could be prepared now."""
        return any(
            jobs and len(self._begun[is_long]) < _most(is_long, slots)
            for is_long, jobs in self._coming.items()
        )

    def admit(self, transcriber: Transcriber, slots: int) -> None:
        """Have jobs that wait prepared, as far as there is room for them."""
        for is_long, jobs in self._coming.items():
            while jobs and len(self._begun[is_long]) < _most(is_long, slots):
                job = jobs.popleft()
                self._begun[is_long].add(job)
                self._pools[is_long].submit(self._prepare, job, transcriber)

    def forget(self, job: Job) -> None:
        """Make room for another job; `wake` is held."""
        self._begun[job.is_long].discard(job)
        self._wake.notify()

    def take_waiting(self) -> list[Job]:
        """Jobs that have not begun, which do not wait any more."""
        with self._wake:
            jobs = [*self._coming[False], *self._coming[True]]
            for queue in self._coming.values():
                queue.clear()
        return jobs

    # The model.

    def start_decoders(self) -> None:
        """Have processes decode: threads would keep the lock from the one that feeds the GPU."""
        self._opener = AudioOpener(
            DecoderPool(short_threads() + LONG_THREADS), in_parts=False, least_bytes=0
        )
        clip = AudioInput(bundled_recordings()[0].path)
        for _ in range(short_threads()):
            self._pools[False].submit(self._opened, clip, Event())

    def unload(self) -> None:
        """Forget what belongs to the model; no job has begun."""
        self._readers.clear()
        if self._opener is not None:
            self._opener.close()
            self._opener = None

    def close(self) -> list[Job]:
        """End threads and processes; return the jobs that are left."""
        if self._opener is not None:
            self._opener.close()
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        return [*self.take_waiting(), *self._begun[False], *self._begun[True]]

    # Threads.

    def take_next(self, entry: Entry) -> None:
        """Have a thread take the next window of a recording."""
        self._pools[False].submit(self._take_next, entry)

    def _take_next(self, entry: Entry) -> None:
        try:
            with self._aside():
                take_window(entry)
        except Exception as error:  # of this recording; others go on
            self._on_end(entry.job, error)
            return
        self._on_ready([entry])

    def _prepare(self, job: Job, transcriber: Transcriber) -> None:
        """Open a job's recording and compute its features."""
        entries: list[Entry] = []
        try:
            reader = self._check(job, transcriber)
            self._open(job)
            for recording in job.recordings:
                if job.cancelled.is_set():
                    raise Cancelled("the client is gone")
                assert recording.source is not None
                silence = recording.source.seconds_of_silence()
                if silence is not None:
                    recording.add_silence(silence)
                    continue
                entry = Entry(job, recording, reader)
                with self._aside():
                    reader.prepare(recording)
                    take_window(entry)
                if not recording.is_done:
                    entries.append(entry)
        except Exception as error:  # of this job; the thread goes on with others
            self._on_end(job, error)
            return
        if entries:
            self._on_ready(entries)
        else:
            self._on_end(job, None)

    def _check(self, job: Job, transcriber: Transcriber) -> Reader:
        """Check the options of a job against the model; return the reader for them.

        Raises:
            OptionError: the model cannot do this.
        """
        call = CallOptions.of(job.arguments, 1, transcriber.languages)
        [options] = call.recordings
        for language in job.languages:
            replace(options, language=language).check_model(transcriber.languages)
        job.options = replace(options, candidates=job.languages)
        # Prompts are the recording's: readers are shared by all jobs with the same options.
        job.decode = replace(call.decode, initial_prompt=None, hotwords=None, prefix=None)
        with self._reading:  # once for all jobs with these options
            reader = self._readers.get(job.decode) or transcriber.reader(job.decode)
            if isinstance(reader, SequentialReader):  # others have a state of their own
                self._readers[job.decode] = reader
                self._readers.move_to_end(job.decode)
                while len(self._readers) > MOST_READERS:
                    self._readers.popitem(last=False)
        return reader

    def _open(self, job: Job) -> None:
        options = job.options
        audio = self._opened(
            AudioInput(job.audio, options.channel, options.audio_track), job.cancelled
        )
        job.recordings = recordings_of(audio, options, 0)
        for recording in job.recordings:
            source = recording.source
            assert source is not None
            if source.seconds is None:
                recording.source = BoundedSource(
                    *(None, source.source, source.channel, source.track, source.reader),
                    most_seconds=job.most_seconds,
                    stop=job.cancelled,
                )
            else:
                check_length(source.name, source.seconds, job.most_seconds)

    def _opened(self, audio: AudioInput, stop: Event) -> AudioSource | ChannelSources:
        if self._opener is None or not audio.is_file:
            return audio.open(stop)
        with closing(self._opener.open_each([audio], ahead=1)) as opened:
            return next(opened).result()

    def _aside(self) -> AbstractContextManager[Any]:
        """Have work on a GPU done beside that of the windows, which would be waited for."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(preparation_stream(self.device))


def short_threads() -> int:
    """Threads that prepare short recordings: half the cores, since a device is fed beside them."""
    return max(2, min(SHORT_THREADS, (os.cpu_count() or 1) // 2))


def _most(is_long: bool, slots: int) -> int:
    """Jobs that are prepared or have begun at a time."""
    return (LONG_PER_SLOT if is_long else SHORT_PER_SLOT) * max(1, slots)
