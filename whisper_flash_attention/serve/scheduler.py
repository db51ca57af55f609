"""Continuous batching: the windows of all requests share the slots of one running stream.

A `Scheduler` owns one model and the only thread that uses its engine. Jobs are prepared by other
threads (`Preparation`); then each recording of a job waits for a turn, and waits again after every
window, so that long recordings and short ones take turns.

A recording takes its turn in one of three ways. Windows decoded greedily by the rules of the
running stream join its free slots. Sequential recordings with other rules (beams, sampling) decode
one window together with those of the same options that wait. All others (batched mode, models that
the engine does not run) decode their next chunk by themselves. Where several are decoded together
and that fails, each is tried alone, so that one fails for its own errors only.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from threading import Condition, Event, Thread

import torch
from torch import Tensor

from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.engine.cuda_graphs import preparation_stream
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.scheduler import DecodeJob
from whisper_flash_attention.options import DecodeOptions, ModelOptions
from whisper_flash_attention.serve.jobs import (
    Cancelled,
    Entry,
    Job,
)
from whisper_flash_attention.serve.preparation import Preparation
from whisper_flash_attention.transcribe.arguments import (
    TranscribeArguments,
    automatic_batch_size,
)
from whisper_flash_attention.transcribe.recording import (
    Recording,
    are_done,
    merge_channels,
)
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.sequential import SequentialReader
from whisper_flash_attention.transcribe.tokenizer import Detokenizer
from whisper_flash_attention.transcribe.transcriber import Transcriber
from whisper_flash_attention.transcribe.window_decoder import SLOTS_PER_FALLBACK, DecodingResult

LOG = logging.getLogger(__name__)
# Slots of a stream on a GPU, where every step takes the time of all slots, used or not: these, or
# as many as there are at most. A stream with this share of its slots in use makes room for one of
# fewer.
WIDTHS = (8, 32)
FEW_IN_USE = 1 / 8
# A full stream on a GPU waits until a quarter of its slots is free: each prompt delays them all.
SLOTS_PER_REFILL = 4
# Windows that are encoded together on a GPU are 1, 2, 4 ... up to this number, since each number
# has a graph of its own.
MOST_ENCODED = 32
# A pass is launched first, and recorded when it runs again; buffers may have grown meanwhile.
RECORDING_ROUNDS = 3
# Of `warm_up`, after which the rest of a slot's buffers and graphs is made.
WARM_UP_CLIPS = 2


class Scheduler:
    """One model, and the thread that transcribes all jobs on it.

    Args:
        name: of the model, as clients give it.
        model: the checkpoint and where it runs.
        slots: windows that are decoded side by side; None is what suits the device.
        idle_unload: seconds without a job after which the model is dropped; None keeps it.
        transcriber: an open one, which is never dropped.

    Attributes:
        waiting, in_slots: numbers of recordings.
        preparation: of jobs that wait or have begun.
        ready: set once the model is loaded and has transcribed something.
        failure: why the model could not be loaded at first.
    """

    def __init__(
        self,
        name: str,
        model: ModelOptions,
        *,
        slots: int | None = None,
        idle_unload: float | None = None,
        transcriber: Transcriber | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.ready = Event()
        self.failure: BaseException | None = None
        self._slots = slots
        self._widths: tuple[int, ...] = ()
        self._width = 0
        self._idle_unload = idle_unload
        self._is_kept = transcriber is not None
        self.transcriber = transcriber
        self._tokenizer = None if transcriber is None else transcriber.tokenizer
        self._wake = Condition()
        self._stopping = False
        self.preparation = Preparation(self._wake, self._wait, self._finish)
        self._ready: deque[Entry] = deque()
        self._held: set[Entry] = set()
        self._fallbacks: list[Entry] = []
        # Work beside a stream may go on at this time, of `time.monotonic`.
        self._aside_from = 0.0
        self._thread = Thread(target=self._run, name=f"whisper-flash-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread; the model is loaded with the first job."""
        if self.transcriber is not None:
            self._take_model(self.transcriber)
        self._thread.start()

    def warm_up(self) -> None:
        """Load the model and transcribe something, so that the first request finds all prepared.

        Raises what loading raises.
        """
        ends: list[Transcription | BaseException] = []
        done = Condition()

        def end(result: Transcription | BaseException) -> None:
            with done:
                ends.append(result)
                done.notify()

        clips = bundled_recordings()[:WARM_UP_CLIPS]
        for clip in clips:
            arguments = TranscribeArguments(language="en", word_timestamps=True)
            self.submit(Job(clip.path, arguments, end))
        with done:
            done.wait_for(lambda: len(ends) == len(clips))
        for result in ends:
            if isinstance(result, BaseException):
                self.failure = result
                raise result
        self.ready.set()

    def close(self) -> None:
        """Cancel what is in progress, and end the threads."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        for job in self.preparation.close():
            self._finish(job, Cancelled("the server is stopping"))

    def submit(self, job: Job) -> None:
        """Have a job transcribed; `on_end` is called from another thread."""
        self.preparation.add(job)

    def cancel(self, job: Job) -> None:
        """Have a job dropped, at the latest after the window that is being decoded."""
        job.cancelled.set()
        with self._wake:
            self._wake.notify()

    @property
    def in_slots(self) -> int:
        return len(self._held)

    @property
    def waiting(self) -> int:
        return len(self._ready) + self.preparation.waiting

    @property
    def slots(self) -> int:
        """Windows that are decoded side by side; 0 while no model is loaded and none was given."""
        return self._slots or 0

    @property
    def tokenizer(self) -> Detokenizer:
        """Of the model, which is or was loaded."""
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def is_loaded(self) -> bool:
        return self.transcriber is not None

    # The thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                idle = not self._wake.wait_for(self._has_work, self._idle_seconds())
                if self._stopping:
                    break
            if idle:
                self._unload()
                continue
            if self.transcriber is None and not self._load():
                continue
            self._admit()
            if entry := self._next_entry():
                self._take_turn(entry, in_stream=False)
            self._fall_back()

    def _admit(self) -> None:
        assert self.transcriber is not None
        self.preparation.admit(self.transcriber, self.slots)

    def _has_work(self) -> bool:
        return (
            self._stopping
            or bool(self._ready or self._fallbacks)
            or (self.transcriber is None and self.preparation.waiting > 0)
            or self.preparation.has_room(self.slots)
        )

    def _idle_seconds(self) -> float | None:
        is_idle = self.transcriber is not None and not any(self.preparation.begun)
        return self._idle_unload if is_idle and not self._is_kept else None

    def _load(self) -> bool:
        """Load the model; where that fails, all jobs that wait fail with it."""
        try:
            self.transcriber = Transcriber.from_pretrained(**asdict(self.model), quiet=True)
        except Exception as error:  # whatever it is, jobs that wait must have an end
            LOG.exception("model %s cannot be loaded", self.name)
            for job in self.preparation.take_waiting():
                job.end(error)
            return False
        self._take_model(self.transcriber)
        return True

    def _take_model(self, transcriber: Transcriber) -> None:
        """Find out what the model's device takes, and have it make what streams need there."""
        self._tokenizer = transcriber.tokenizer
        engine = transcriber.running_engine()
        if self._slots is None:
            mode = "sequential" if engine is None or not engine.has_kernels else "batched"
            self._slots = automatic_batch_size(engine, mode)
        self._widths = (self._slots,)
        if engine is not None:
            self.preparation.device = engine.weights.device
        if engine is not None and engine.has_kernels:
            self.preparation.start_decoders()
            self._widths = (*(each for each in WIDTHS if each < self._slots), self._slots)
            self._record(engine, transcriber)

    def _record(self, engine: Engine, transcriber: Transcriber) -> None:
        """Have graphs of all sizes recorded, the largest first: the others fit into its buffers."""
        reader = transcriber.reader(DecodeOptions(temperature=0.0, max_new_tokens=2))
        assert isinstance(reader, SequentialReader)
        weights, decoder = engine.weights, reader.decoder
        shape = (weights.encoder.conv1.weight.shape[1], 2 * weights.encoder.positions.shape[0])
        prompt = decoder.prompt(Recording(None), "en", is_first=True)
        for _ in range(RECORDING_ROUNDS):
            for power in reversed(range(MOST_ENCODED.bit_length())):
                states = engine.encode(torch.zeros(1 << power, *shape, device=weights.device))
            for width in reversed(self._widths):
                coming = iter([[decoder.job(states[0], prompt, "warm-up")]])
                for _ in engine.decode_stream(
                    lambda _, coming=coming: next(coming, []),  # type: ignore[misc]
                    width,
                    max_length=decoder.max_length,
                    refill=self._refill(width),
                ):
                    pass

    def _unload(self) -> None:
        if self.transcriber is None or self._is_kept or any(self.preparation.begun):
            return
        LOG.info("model %s is unloaded", self.name)
        self.transcriber = None
        self.preparation.unload()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Turns.

    def _next_entry(self) -> Entry | None:
        """The entry that waits longest, of a job that is wanted."""
        while self._ready:
            with self._wake:
                entry = self._ready.popleft()
            if entry.job.has_ended:
                continue
            if not entry.job.cancelled.is_set():
                return entry
            self._finish(entry.job, Cancelled("the client is gone"))
        return None

    def _take_turn(self, entry: Entry, *, in_stream: bool) -> None:
        """Decode one window or chunk; outside a stream begin one where the entry fits slots."""
        reader = entry.reader
        if not isinstance(reader, SequentialReader):
            self._step(entry)
        elif not in_stream and not entry.is_alone and reader.decoder.fits_slots:
            self._stream(entry)
        else:
            self._decode_first([entry, *self._like(entry)])

    def _step(self, entry: Entry) -> None:
        """Decode the next chunk of a recording by itself."""
        assert self._slots is not None
        if entry.steps is None:
            entry.steps = iter(entry.reader.read([entry.recording], self._slots))
        self._held.add(entry)
        try:
            for recording, segments in entry.steps:
                self._deliver(entry, recording, segments)
                break
            else:
                entry.recording.is_done = True
        except Exception as error:  # of this recording; others go on
            self._finish(entry.job, error)
        self._held.discard(entry)
        self._put_back(entry)

    def _like(self, entry: Entry) -> list[Entry]:
        """Take the entries that are decoded by the same reader, as many as there are slots."""
        if entry.is_alone:
            return []
        room = max(1, self.slots) - 1
        with self._wake:
            like = [each for each in self._ready if each.reader is entry.reader]
            like = [each for each in like if not each.is_alone][:room]
            del like[self._together(1 + len(like)) - 1 :]
            for each in like:
                self._ready.remove(each)
        return like

    def _decode_first(self, entries: list[Entry]) -> None:
        """Decode one window of recordings with the same options, at their first temperature."""
        windows = [(entry, entry.window) for entry in entries if entry.window is not None]
        try:
            entries = [job.tag for job in self._encode(windows)]
            if entries:
                self._decode_again(entries)
        except Exception as error:  # of one of them; the others go on
            self._give_up(entries, error)

    def _decode_again(self, entries: list[Entry]) -> None:
        """Decode windows at the temperature that follows their results, all of one reader."""
        reader = entries[0].reader
        assert isinstance(reader, SequentialReader)
        states = torch.stack([entry.states for entry in entries if entry.states is not None])
        prompts = [entry.prompt for entry in entries]
        reader.decoder.decode_again(states, prompts, [entry.results for entry in entries])
        for entry in entries:
            self._settle(entry)

    def _stream(self, first: Entry) -> None:
        """Decode windows in slots for as long as there are any that fit the stream of the first."""
        assert isinstance(first.reader, SequentialReader)
        decoder = first.reader.decoder
        key, engine = decoder.stream_key, decoder.engine
        with self._wake:
            self._ready.appendleft(first)
        try:
            while True:
                has_any, since = False, 0
                width = self._width = self._width_for(len(self._ready))
                most = max(1, width // SLOTS_PER_FALLBACK)
                for finished in engine.decode_stream(
                    lambda count: self._jobs(count, key),
                    width,
                    max_length=decoder.max_length,
                    refill=self._refill(width),
                    is_waiting=partial(self._are_waiting, key),
                ):
                    has_any = True
                    entry: Entry = finished.job.tag
                    assert isinstance(entry.reader, SequentialReader)
                    entry.results = [entry.reader.decoder.result(finished)]
                    self._settle(entry)
                    since = since + 1 if self._fallbacks else 0
                    # Bounds how long the first of them waits.
                    if (len(self._fallbacks) >= most or since >= width) and self._may_go_aside():
                        self._aside(self._fall_back)
                        since = 0
                    if self._stopping:
                        return
                if not has_any and not self._fallbacks:
                    return
                self._fall_back()
        except Exception as error:  # of one of the slots, or of the device
            self._fallbacks.clear()
            self._give_up(list(self._held), error)

    def _may_go_aside(self) -> bool:
        """Whether the stream has had as much time as what was last done beside it."""
        return time.monotonic() >= self._aside_from

    def _aside(self, work: Callable[[], None]) -> None:
        """Do work while the windows of the stream wait, which then get the same time."""
        began = time.monotonic()
        work()
        ended = time.monotonic()
        self._aside_from = ended + (ended - began)

    def _width_for(self, windows: int) -> int:
        """Slots of a stream for this number of windows."""
        return next((each for each in self._widths if each >= windows), self._widths[-1])

    def _refill(self, width: int) -> int:
        """Free slots from which on windows join a stream."""
        return 1 if len(self._widths) == 1 else max(1, width // SLOTS_PER_REFILL)

    def _fits_better(self, windows: int) -> bool:
        """Whether a stream of another width should follow, for which this one must end."""
        other = self._width_for(windows)
        return other > self._width or (other < self._width and windows <= FEW_IN_USE * self._width)

    def _are_waiting(self, key: tuple[object, ...], free: int) -> bool:
        """Whether windows wait for free slots of a stream on a GPU, and nothing beside it.

        Results of the stream would be handed on after what is decoded beside it.
        """
        with self._wake:
            ready, first = len(self._ready), list(islice(self._ready, free))
        return (
            bool(first)
            and len(self._widths) > 1
            and all(self._fits(entry, key) for entry in first)
            and not self._fits_better(self._width - free + ready)
        )

    def _fits(self, entry: Entry, key: tuple[object, ...]) -> bool:
        """Whether the next window of an entry can be decoded in a stream's slots."""
        reader = entry.reader
        return (
            isinstance(reader, SequentialReader)
            and not entry.is_alone
            and reader.decoder.fits_slots
            and reader.decoder.stream_key == key
        )

    def _jobs(self, count: int, key: tuple[object, ...]) -> list[DecodeJob]:
        """Windows for free slots. Entries that do not fit them take a turn now and then."""
        self._admit()
        if self._fits_better(self._width - count + len(self._ready)):
            return []
        taken: list[tuple[Entry, Tensor]] = []
        others: list[Entry] = []
        for _ in range(len(self._ready)):
            if len(taken) == count or self._stopping or (entry := self._next_entry()) is None:
                break
            if self._fits(entry, key):
                assert entry.window is not None
                taken.append((entry, entry.window))
            elif self._may_go_aside():
                self._aside(partial(self._take_turn, entry, in_stream=True))
            else:
                others.append(entry)
        # The rest waits for the next free slots.
        most = self._together(len(taken))
        others = [*(entry for entry, _ in taken[most:]), *others]
        del taken[most:]
        with self._wake:
            self._ready.extendleft(reversed(others))
        return self._encode(taken) if taken else []

    def _together(self, count: int) -> int:
        """How many of these windows are encoded now: on a GPU one of the numbers with a graph."""
        return count if len(self._widths) == 1 else min(MOST_ENCODED, 1 << count.bit_length() >> 1)

    def _encode(self, taken: Sequence[tuple[Entry, Tensor]]) -> list[DecodeJob]:
        """Jobs of windows, encoded together, with prompts."""
        self._held.update(entry for entry, _ in taken)
        # Those of a reader side by side: a slice of the states is a view, and waits for nothing.
        by_reader: dict[int, list[tuple[Entry, Tensor]]] = {}
        for each in taken:
            by_reader.setdefault(id(each[0].reader), []).append(each)
        features = [window for group in by_reader.values() for _, window in group]
        if self.preparation.device.type == "cuda":
            # Entries hold their windows until there are results: no memory is used again before.
            stream = torch.cuda.current_stream(self.preparation.device)
            stream.wait_stream(preparation_stream(self.preparation.device))
        first = taken[0][0].reader
        assert isinstance(first, SequentialReader)
        states = first.decoder.engine.encode(torch.stack(features))
        jobs = []
        for group in by_reader.values():
            entries = [entry for entry, _ in group]
            mine, states = states[: len(group)], states[len(group) :]
            reader = entries[0].reader
            assert isinstance(reader, SequentialReader)
            try:
                windows = reader.windows([each.recording for each in entries], mine)
            except Exception as error:  # of one of them; the others go on
                self._give_up(entries, error)
                continue
            for entry, found in zip(entries, windows, strict=True):
                entry.states, entry.prompt, entry.results = found.states, found.prompt, []
                jobs.append(reader.decoder.job(found.states, found.prompt, entry))
        return jobs

    def _settle(self, entry: Entry) -> None:
        """Take the result of a window; one that is no good is decoded again."""
        assert isinstance(entry.reader, SequentialReader)
        decoder = entry.reader.decoder
        if decoder.is_settled(entry.results) or entry.job.cancelled.is_set():
            self._accept(entry, decoder.best(entry.results))
        else:
            self._fallbacks.append(entry)

    def _fall_back(self) -> None:
        """Decode windows again whose results were no good: those of a reader, at one temperature.

        Others wait meanwhile, and so those that are no good then wait for another turn.
        """
        if not self._fallbacks:
            return
        first, waiting = self._fallbacks[0], self._fallbacks
        entries = [first]
        if not first.is_alone:
            entries = [
                entry
                for entry in waiting
                if entry.reader is first.reader
                and len(entry.results) == len(first.results)
                and not entry.is_alone
            ]
        self._fallbacks = [entry for entry in waiting if entry not in entries]
        try:
            self._decode_again(entries)
        except Exception as error:  # of one of them; the others go on
            self._give_up(entries, error)

    def _accept(self, entry: Entry, result: DecodingResult) -> None:
        """Take the final result of a window; its recording waits for its next turn."""
        recording, states, reader = entry.recording, entry.states, entry.reader
        assert isinstance(reader, SequentialReader) and states is not None
        entry.states, entry.is_alone = None, False
        self._held.discard(entry)
        try:
            [segments] = reader.finish([recording], states[None], [result])
        except Exception as error:  # of this recording; others go on
            self._finish(entry.job, error)
            return
        recording.add_window(segments, recording.seek)
        self._deliver(entry, recording, segments)
        self._put_back(entry)

    def _give_up(self, entries: Sequence[Entry], error: Exception) -> None:
        """Have each of several windows decoded alone after a failure; a single one failed."""
        self._held.difference_update(entries)
        if len(entries) == 1 and entries[0].is_alone:
            self._finish(entries[0].job, error)
            return
        LOG.warning("%d windows are decoded one by one after: %s", len(entries), error)
        for entry in entries:
            entry.is_alone, entry.states = True, None
        self._wait(entries)

    def _deliver(self, entry: Entry, recording: Recording, segments: Sequence[Segment]) -> None:
        if not entry.job.cancelled.is_set():
            entry.job.on_segments(recording, segments)

    def _put_back(self, entry: Entry) -> None:
        """Have a recording wait for its next turn, or its job end."""
        if entry.job.has_ended:
            return
        if entry.job.cancelled.is_set():
            self._finish(entry.job, Cancelled("the client is gone"))
        elif entry.recording.is_done or (entry.recording.frames and entry.recording.is_at_end):
            entry.recording.is_done = True
            if are_done(entry.job.recordings):
                self._finish(entry.job, None)
        elif isinstance(entry.reader, SequentialReader):
            self.preparation.take_next(entry)
        else:
            self._wait([entry])

    def _wait(self, entries: Sequence[Entry]) -> None:
        """Have recordings wait for their turn; there may have been silence up to the end of one."""
        for entry in entries:
            if entry.recording.is_done:
                self._put_back(entry)
            else:
                with self._wake:
                    self._ready.append(entry)
                    self._wake.notify()

    def _finish(self, job: Job, error: BaseException | None) -> None:
        """End a job that had begun, with its transcription or an error."""
        result = error or merge_channels(job.recordings, self.tokenizer)
        with self._wake:
            if job.has_ended:
                return
            job.has_ended = True
            self.preparation.forget(job)
        job.end(result)
