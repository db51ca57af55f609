"""What every engine runs: what a run does with each recording, and its two stages.

A stage decodes a recording, the other one transcribes a group of them. What is wrong with one
recording becomes a row with an error; what would be wrong with every one is raised.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeAlias, TypeVar
from zlib import crc32

import numpy as np

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio import SAMPLING_RATE
from whisper_flash_attention.audio.audio_source import AudioSource, ChannelSources
from whisper_flash_attention.audio.decoder_pool import DECODE_TIMEOUT, STREAM_AUDIO, DecodeRequest
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.model import Opener, RunOptions, Speech, shifted, transcriptions
from whisper_flash_attention.batch.rows import Row, failed_row, finished_row
from whisper_flash_attention.batch.storage import is_url, opened, refuse_special_file
from whisper_flash_attention.errors import (
    AudioError,
    DeviceError,
    IncompatibleTransformers,
    MissingPackage,
    OptionError,
    UnsupportedAttention,
    WeightsError,
    is_bug,
)
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.results import Transcription

ENGINES = ("local", "ray")
# Gets a recording, the share of it that is done, and its seconds.
OnProgress: TypeAlias = Callable[[Item, float, float], None]
Each = TypeVar("Each")
# Of a small archive, too, every model gets a share, and none waits long for the last one.
GROUPS_EACH = 4


@dataclass(frozen=True, slots=True)
class Work:
    """The model, the options, and how many recordings it gets at a time.

    Args:
        opener: of the model.
        run_options: for every recording without options of its own.
        group_hours: hours of audio that are transcribed side by side, and held in memory; 1 hour of
            samples is 0.23 GB. A recording that is longer is transcribed alone.
        group_files: the most recordings side by side; None is some times more than are decoded at a
            time.
        workers: engine "local": processes that decode; engine "ray": models. None chooses.
        decode_timeout: seconds without progress after which decoding a recording is given up.
        decode: name of the function that decodes, as for `DecoderPool`.

    Raises:
        OptionError: a number makes no sense.
    """

    opener: Opener
    run_options: RunOptions = field(default_factory=RunOptions)
    group_hours: float = 4.0
    group_files: int | None = None
    workers: int | None = None
    decode_timeout: float = DECODE_TIMEOUT
    decode: str = STREAM_AUDIO

    def __post_init__(self) -> None:
        for name, unit in (("group_hours", "hours"), ("decode_timeout", "seconds")):
            number = check.number(name, getattr(self, name), f"{unit}, more than 0", above=0)
            object.__setattr__(self, name, number)
        for name in ("group_files", "workers"):
            count = check.optional(check.whole_number, name, getattr(self, name), least=1)
            object.__setattr__(self, name, count)

    @property
    def most_files(self) -> int:
        """The most recordings of a group."""
        return self.group_files or 4 * self.run_options.batch_size

    @property
    def most_seconds(self) -> float:
        """Seconds of audio with which a group is complete."""
        return 3_600 * self.group_hours

    def has_room(self, seconds: float, beside: Sequence[float]) -> bool:
        """Whether a recording of this length may be transcribed beside others of these lengths.

        A batch that is prepared, one in work, and one whose text is late have room in any case.
        """
        if self.group_files is not None and len(beside) >= self.group_files:
            return False
        least = 4 * WINDOW_SECONDS * self.run_options.batch_size
        return seconds + sum(beside) <= max(self.most_seconds, least)

    def alone(self) -> Work:
        """The same with each recording as a group of its own."""
        return replace(self, group_files=1)

    @property
    def may_mix(self) -> bool:
        """Whether recordings of several groups may be side by side: not if their number was given.

        What is sampled at temperatures above 0 depends on all that is side by side, and then on
        who is done when.
        """
        return self.group_files is None

    def mixed(self, groups: int) -> Work:
        """The same with groups of which so many are side by side, each of a batch at least."""
        batch = WINDOW_SECONDS * self.run_options.batch_size / 3_600
        return replace(self, group_hours=max(self.group_hours / groups, batch))

    def shared(self, items: Sequence[Item], workers: int, each: int = GROUPS_EACH) -> Work:
        """The same with groups so small that there are `each` for each of several models."""
        groups = each * workers
        hours = sum(item.expected_seconds or 0.0 for item in items) / 3_600 / groups
        return replace(
            self,
            group_hours=min(self.group_hours, hours) if hours else self.group_hours,
            group_files=min(self.most_files, math.ceil(len(items) / groups)),
        )


logger = logging.getLogger(__name__)

WINDOW_SECONDS = 30.0  # of Whisper's windows

# These say something about the installation or the run, and not about the recording at hand.
OF_ALL = (
    DeviceError,
    IncompatibleTransformers,
    MissingPackage,
    UnsupportedAttention,
    WeightsError,
)


class DeviceLost(Exception):
    """The GPU reported an error after which this process cannot use it any more."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A recording's samples, mono float32 `[T]` at 16 kHz, or the row that tells why not.

    Where each channel is transcribed by itself, samples are `[channels, T]`.
    """

    item: Item
    samples: Samples | None = None
    failure: Row | None = None

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return 0.0 if self.samples is None else self.samples.shape[-1] / SAMPLING_RATE


def decode(items: Sequence[Item], opener: AudioOpener) -> Generator[Decoded]:
    """Decode recordings, or the requested parts of them, in their order.

    URLs are opened in the processes that decode, so that a storage package that crashes or hangs
    costs one recording, too. Settings that are made in this process alone do not reach them.

    Raises:
        DecoderError: the processes cannot be started, or the opener was closed.
        Exception: what `is_bug` says no recording is the cause of.
    """
    with closing(opener.open_each(map(_request, items))) as opened:
        for item, each in zip(items, opened, strict=True):
            if each.error is None:
                yield Decoded(item, _samples(each.result()))
            else:
                yield Decoded(item, failure=_failure(item, each.error))


def _samples(audio: AudioSource | ChannelSources) -> Samples:
    """`[T]`, or `[channels, T]`."""
    if isinstance(audio, AudioSource):
        return audio.whole()
    return np.stack([channel.whole() for channel in audio.sources])


def _request(item: Item) -> DecodeRequest:
    is_plain = not is_url(item.path) and not _is_special(item.path)
    channel = None if item.channel in (None, "mix") else item.channel
    return DecodeRequest(
        item.path,
        None if is_plain else f"{opened.__module__}:{opened.__name__}",
        start=item.start,
        end=item.end,
        channel=channel,
        track=item.audio_track,
    )


def _is_special(path: str) -> bool:
    """Whether a path is a pipe or a device, which `opened` refuses."""
    try:
        refuse_special_file(path)
    except AudioError:
        return True
    return False


def _failure(item: Item, error: Exception) -> Row:
    name = printable(item.path)
    message = str(error) or repr(error)
    if name not in message:
        message = f"{name}: {message.removeprefix('<file>: ')}"
    return failed_row(item, type(error).__name__, message)


def planned(items: Iterable[Item], work: Work) -> Iterator[list[Item]]:
    """Cut the order of work into what is decoded together: about a group, by expected lengths.

    Groups are made of this by true lengths, so that nothing rests on the guess but how many
    recordings there are. Those with the same options are together, as on the engine "local": where
    options differ, a stream is empty before it goes on.
    """
    order = alike_together(items, lambda item: item, work.run_options)
    return _groups(order, work, lambda item: item.expected_seconds or 0.0)


def grouped(decoded: Iterable[Decoded], work: Work) -> Iterator[list[Decoded]]:
    """Put together what is transcribed side by side: groups of recordings that come one by one.

    A group that has as much audio as it may is complete; so it has at most one recording more.
    """
    return _groups(decoded, work, lambda each: each.seconds)


def _groups(
    recordings: Iterable[Each], work: Work, seconds_of: Callable[[Each], float]
) -> Iterator[list[Each]]:
    group: list[Each] = []
    length = 0.0
    for each in recordings:
        group.append(each)
        length += seconds_of(each)
        if len(group) >= work.most_files or length >= work.most_seconds:
            yield group
            group, length = [], 0.0
    if group:
        yield group


class TranscribeStage:
    """An open model, and the options of the run.

    Args:
        opener: of the model.
        run_options: for every recording without options of its own.

    Raises:
        WhisperFlashError: the model cannot be opened, or cannot do what is requested.
    """

    def __init__(self, opener: Opener, run_options: RunOptions) -> None:
        self._speech: Speech = opener.open()
        self._asked = run_options
        run_options.options.check_model(self._speech.languages)

    def rows(self, group: Sequence[Decoded]) -> list[Row]:
        """Transcribe a group; one row for each recording, in the group's order.

        Raises:
            as `stream`.
        """
        rows = {row["id"]: row for row in self.stream(self.in_order(group))}
        return [rows[each.item.id] for each in group]

    def in_order(self, group: Sequence[Decoded]) -> list[Decoded]:
        """A group's recordings in the order of `stream`: those with the same options together."""
        return alike_together(group, lambda each: each.item, self._asked)

    def stream(
        self,
        decoded: Iterable[Decoded],
        work: Work | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[Row]:
        """Transcribe recordings side by side, and give the row of each when it is done.

        Those side by side have the same options: a recording with others begins when all before it
        are done. Where one raises, those in progress are transcribed one by one, and the one that
        it is due to gets a row with the error.

        Args:
            decoded: taken when there is room; in batched mode on a GPU by another thread.
            work: bounds what is side by side; None is all.
            on_progress: called while a recording is in work, perhaps by another thread.

        Raises:
            DeviceLost: the GPU failed.
            WhisperFlashError: what would be the same for every recording.
            Exception: what `is_bug` says no recording is the cause of.
        """
        upcoming = _Upcoming(decoded, self._asked)
        while (found := upcoming.peek()) is not None:
            yield from self._side_by_side(*found, upcoming, work, on_progress)
        yield from upcoming.failures()

    def _side_by_side(
        self,
        first: Decoded,
        run_options: RunOptions,
        upcoming: _Upcoming,
        work: Work | None,
        on_progress: OnProgress | None,
    ) -> Generator[Row]:
        """Rows of recordings with the same options, as many as there are one after another."""
        in_progress: dict[int, Decoded] = {}
        started, seconds = time.perf_counter(), 0.0  # of all that was taken

        def taken() -> Iterator[Samples | ChannelSources]:
            nonlocal seconds
            for index in count():
                found = upcoming.peek()
                if found is None or found[1] != run_options:
                    return
                beside = [each.seconds for each in list(in_progress.values())]
                if work is not None and beside and not work.has_room(found[0].seconds, beside):
                    return
                in_progress[index] = upcoming.take()
                seconds += in_progress[index].seconds
                yield _as_recording(np.asarray(in_progress[index].samples))

        def row(each: Decoded, text: Transcription) -> Row:
            rate = (time.perf_counter() - started) / seconds
            text = shifted(text, each.item.start)
            return finished_row(each.item, text.to_dict(), rate * each.seconds)

        def report(index: int, share: float) -> None:
            # Another thread may report what is done and gone by now.
            if on_progress is not None and (each := in_progress.get(index)) is not None:
                on_progress(each.item, share, each.seconds)

        seed = crc32(first.item.id.encode())
        found = transcriptions(self._speech, taken(), run_options, seed, report)
        try:
            with closing(found):
                for index, text in found:
                    done = row(in_progress[index], text)
                    del in_progress[index]
                    yield done
                    yield from upcoming.failures()
            return
        except Exception as error:  # whatever a recording provokes must not cost the others
            self._raise_if_of_all(error, run_options)
            if upcoming.has_ended_early:
                raise
            left = list(in_progress.values())
            if not left:
                if seconds:
                    raise  # all that were taken are done
                left = [upcoming.take()]  # options are refused before the first is taken
            if len(left) == 1:
                yield _failed(left[0], error)
                return
        for each in left:
            alone = _Upcoming([each], self._asked)
            yield from self._side_by_side(each, run_options, alone, None, on_progress)

    def _raise_if_of_all(self, error: Exception, run_options: RunOptions) -> None:
        """Raise what says nothing about a recording."""
        import torch

        if is_bug(error):
            raise error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLost(str(error)) from error
        if isinstance(error, OF_ALL):
            raise error
        if isinstance(error, OptionError) and run_options == self._asked:
            raise error  # no recording has options of its own


def alike_together(
    items: Iterable[Each], item_of: Callable[[Each], Item], run_options: RunOptions
) -> list[Each]:
    """Recordings in their order, but those with the same options after the first of them."""
    alike: dict[RunOptions | None, list[Each]] = {}
    for each in items:
        try:
            options = run_options.of(item_of(each))
        except OptionError:  # which will be its row
            options = None
        alike.setdefault(options, []).append(each)
    return [each for several in alike.values() for each in several]


class _Upcoming:
    """Recordings to be transcribed, the next of which can be seen; rows of the others."""

    def __init__(self, decoded: Iterable[Decoded], run_options: RunOptions) -> None:
        self._decoded = iter(decoded)
        self._asked = run_options
        self._next: tuple[Decoded, RunOptions] | None = None
        self._failures: deque[Row] = deque()
        self.has_ended_early = False

    def peek(self) -> tuple[Decoded, RunOptions] | None:
        """The next one, and its options; None at the end."""
        while self._next is None:
            try:
                each = next(self._decoded, None)
            except BaseException:
                self.has_ended_early = True
                raise
            if each is None:
                return None
            if each.failure is not None:
                self._failures.append(each.failure)
                continue
            try:
                self._next = each, self._asked.of(each.item)
            except OptionError as error:  # of what this recording's row asks for
                failed = failed_row(each.item, type(error).__name__, str(error))
                self._failures.append(failed)
        return self._next

    def take(self) -> Decoded:
        """The one that `peek` showed."""
        assert self._next is not None
        (each, _), self._next = self._next, None
        return each

    def failures(self) -> Iterator[Row]:
        """Rows of those that cannot be transcribed, once."""
        while self._failures:
            yield self._failures.popleft()


def _failed(each: Decoded, error: Exception) -> Row:
    kind, message = type(error).__name__, str(error) or repr(error)
    logger.warning("%s: %s: %s", printable(each.item.id), kind, printable(message))
    return failed_row(each.item, kind, message)


def _as_recording(samples: Samples) -> Samples | ChannelSources:
    """Samples as `Transcriber` takes them."""
    if samples.ndim == 1:
        return samples
    return ChannelSources(tuple(AudioSource(channel) for channel in samples))
