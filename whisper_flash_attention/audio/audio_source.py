"""Recordings opened for reading: decoded as a whole or block by block.

`load_audio` and `stream_audio` decode a file of any format through PyAV (FFmpeg) into mono float32
samples at one rate. An `AudioSource` can be read from its beginning as often as needed: a short
recording is decoded once and held; so is a long one, where a `SampleBudget` has room for it. Others
are decoded each time they are read, so that memory does not grow with their length. `opener` opens
many recordings ahead of use.
"""

from __future__ import annotations

import numbers
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.container import (
    AudioTrack,
    Source,
    choose_track,
    name_of,
    open_container,
    readable,
    tracks_of,
)
from whisper_flash_attention.audio.decode import (
    HIGHEST_RATE,
    LOWEST_RATE,
    MOST_SECONDS,
    Decoding,
)
from whisper_flash_attention.audio.samples import (
    SAMPLING_RATE,
    ChannelMixer,
    Samples,
    length_of_silence,
    mix,
    recording_channels,
)
from whisper_flash_attention.errors import AudioError, OptionError
from whisper_flash_attention.option_kinds import checked_track
from whisper_flash_attention.validation import shown

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

# The longest recording that is held in memory as a whole: 5.5 GB at 16 kHz.
MOST_SECONDS_HELD = 24 * 3600


def load_audio(
    source: Source,
    sampling_rate: int = SAMPLING_RATE,
    *,
    channel: int | None = None,
    track: int | str | None = None,
) -> Samples:
    """Decode `source` into mono float32 samples `[T]` within [-1, 1] at `sampling_rate` Hz.

    Every format of PyAV's FFmpeg is read (wav, flac, mp3, ogg, opus, m4a, mp4, ...). Decoding goes
    frame by frame; the peak of memory is twice the result, of which 24 hours are the most.

    Time counts as for a player, from where the whole container begins: where its time stamps say
    that a track begins late or has a gap, silence is put in. A gap of more than an hour, or of more
    than the container's length, is a damaged time stamp.

    Channels are mixed with the standard weights of their places (ITU-R BS.775, low-frequency
    effects left out), those without a place equally. Where they cancel each other, the loudest is
    used instead, and a warning says so.

    An open file is read from its beginning and left open. One that cannot seek, or a named pipe, is
    copied to its end first, from where it is, into a temporary file if it is long.

    A damaged recording gives what could be decoded, and one warning in the log that says how much
    was damaged or is missing, so that a part is never passed off as the whole. A plain PCM file has
    nothing by which damage inside it could be noticed; an Ogg file that was cut off between two
    pages looks like a shorter one.

    Args:
        source: name of a file, bytes, or a file that was opened for reading bytes.
        sampling_rate: of the result, 2,000 to 3,072,000 Hz.
        channel: the only channel to read, from 1; all of them are mixed if left out.
        track: the audio track to read, by its number from 1 or its language ("en", "eng"); if left
            out the one that FFmpeg calls best, which heeds the container's default mark.

    Raises:
        AudioError: it is missing, a folder, not readable, not audio, has no samples, nothing of it
            can be decoded, its sampling rate is below 2,000 or above 3,072,000 Hz, it is too long,
            or has no such channel or track. The message names the file.
        OptionError: the rate, channel or track makes no sense for any recording.
    """
    return join_blocks(
        stream_audio(
            source,
            sampling_rate=sampling_rate,
            channel=channel,
            track=track,
            most_seconds=MOST_SECONDS_HELD,
        )
    )


def stream_audio(
    source: Source,
    *,
    sampling_rate: int = SAMPLING_RATE,
    block_seconds: float = 30.0,
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    track: int | str | None = None,
    most_seconds: float = MOST_SECONDS,
) -> Iterator[Samples]:
    """Decode `source` block by block, in memory that does not grow with its length.

    Joined, the blocks are what `load_audio` gives, from `start` to `end`. What is before `start` is
    decoded and dropped, since a codec's samples depend on what came before; what is after `end` is
    not read.

    Args:
        source: as for `load_audio`.
        sampling_rate: of the result, 2,000 to 3,072,000 Hz.
        block_seconds: length of a block; only the last may be shorter.
        start, end: seconds of the recording to give, all of it if left out.
        channel, track: as for `load_audio`.
        most_seconds: refuse a recording that is longer; a week if left out. A caller that keeps
            the blocks passes `MOST_SECONDS_HELD`, since hours of silence fit into a small file.

    Returns:
        Blocks of mono float32 samples `[T]` within [-1, 1], of which the caller owns the memory.

    Raises:
        OptionError: at once, if the rate or a length is out of range, `end` is not after `start`,
            or `channel` or `track` makes no sense.
        AudioError: with the first block, as `load_audio`, or where nothing is left from `start` on.
            That a recording is too long or not finite shows only when it was read so far, after
            blocks that were given already. Warnings come last, too.
    """
    sampling_rate = check.whole_number(
        "sampling_rate",
        sampling_rate,
        least=LOWEST_RATE,
        most=HIGHEST_RATE,
        expected=f"{LOWEST_RATE} to {HIGHEST_RATE} Hz",
    )
    most_seconds = check.number("most_seconds", most_seconds, "seconds, more than 0", above=0)
    size = _samples_of("block_seconds", block_seconds, sampling_rate)
    first = _samples_of("start", start, sampling_rate)
    last = None if end is None else _samples_of("end", end, sampling_rate)
    if size == 0:
        raise OptionError(f"block_seconds is {block_seconds}, less than one sample")
    if last is not None and last <= first:
        raise OptionError(f"end must be after start, but is {end} s, and start {start} s")
    channel = check.optional(check.whole_number, "channel", channel, least=1)
    track = checked_track(track, "track")
    decoding = Decoding(sampling_rate, first, last, ChannelMixer(channel), most_seconds)
    return decoded_blocks(source, size, track, decoding)


def audio_tracks(source: Source) -> list[AudioTrack]:
    """List the audio tracks of a recording, in the order in which `track` counts them.

    Raises:
        AudioError: as `load_audio`, if it is not a recording.
    """
    with open_container(source) as recording:
        return tracks_of(recording.container)


def chosen_track(source: Source, track: int | str | None = None) -> AudioTrack:
    """Return the audio track that `load_audio` reads.

    Raises:
        AudioError: as `load_audio`, if it is not a recording or has no such track.
    """
    track = checked_track(track, "track")
    with open_container(source) as recording:
        return choose_track(recording.container, track, recording.name)[0]


def join_blocks(blocks: Iterable[Samples]) -> Samples:
    """Join blocks `[T]` of `stream_audio`, at least one, into one array."""
    found = list(blocks)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _samples_of(name: str, seconds: float, sampling_rate: int) -> int:
    seconds = check.number(name, seconds, "seconds, 0 to 1e9", least=0, most=1e9)
    return round(seconds * sampling_rate)


def decoded_blocks(
    source: Source, size: int, track: int | str | None, decoding: Decoding
) -> Iterator[Samples]:
    """Decode a track and yield blocks of `size` samples; the last may be shorter.

    Raises:
        AudioError: as `stream_audio`.
    """
    with open_container(source) as recording:
        chosen, stream = choose_track(recording.container, track, recording.name)
        for block in _regrouped(decoding.run(recording, stream), size):
            if not np.isfinite(block).all():
                raise AudioError(f"{recording.name}: holds samples that are not finite numbers")
            yield np.clip(block, -1.0, 1.0, out=block)
        decoding.report(recording, chosen)


def _regrouped(parts: Iterable[Samples], size: int) -> Iterator[Samples]:
    """New arrays of `size` samples each, the last with what is left."""
    kept: list[Samples] = []
    missing = size
    for part in parts:
        while len(part) >= missing:
            yield np.concatenate([*kept, part[:missing]])
            kept, part, missing = [], part[missing:], size
        kept.append(part)
        missing -= len(part)
    if missing < size:
        yield np.concatenate(kept)


# Up to here a recording is held: 38 MB of samples.
HELD_SECONDS = 600.0
BLOCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Mono float32 samples within [-1, 1] at 16 kHz, or where they come from.

    Args:
        samples: `[T]`, of a short recording.
        source: of another, as `load_audio` takes it; it can be read again.
        channel, track: what is read of the source, as `stream_audio` takes them.
        reader: gives all samples of the source, in blocks; `stream_audio` if left out.
    """

    samples: Samples | None = None
    source: Source | None = None
    channel: int | None = None
    track: int | str | None = None
    reader: Callable[[], Iterator[Samples]] | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "<samples>" if self.source is None else name_of(self.source)

    @property
    def seconds(self) -> float | None:
        """Its length; None of a long one, which is known when it was read."""
        return None if self.samples is None else self.samples.size / SAMPLING_RATE

    def blocks(self, seconds: float = BLOCK_SECONDS) -> Iterator[Samples]:
        """All of it from the beginning: blocks `[T]` of this length, the last what is left.

        Raises:
            AudioError: as `stream_audio`.
        """
        size = round(seconds * SAMPLING_RATE)
        if self.reader is not None:
            yield from _regrouped(self.reader(), size)
            return
        if self.samples is None:
            assert self.source is not None
            yield from stream_audio(
                self.source,
                block_seconds=seconds,
                channel=self.channel,
                track=self.track,
            )
            return
        for start in range(0, self.samples.size, size):
            yield self.samples[start : start + size]

    def whole(self) -> Samples:
        """All of it in memory: `[T]`.

        Raises:
            AudioError: as `stream_audio`.
        """
        return join_blocks(self.blocks()) if self.samples is None else self.samples

    def seconds_of_silence(self) -> float | None:
        """Its length if there is no sound in it, or less than a word; None if there is.

        Raises:
            AudioError: as `stream_audio`.
        """
        size = length_of_silence(self.blocks())
        return None if size is None else size / SAMPLING_RATE


@dataclass(frozen=True, slots=True)
class ChannelSources:
    """The channels of one recording as separate sources, in their order."""

    sources: tuple[AudioSource, ...]

    @property
    def seconds(self) -> float | None:
        """Length of the recording, as of `AudioSource`."""
        lengths = [audio.seconds for audio in self.sources]
        return None if None in lengths else max(length or 0.0 for length in lengths)


def stated_size(source: Source) -> int | None:
    """Return a recording's length in samples at 16 kHz, as its container states it.

    Raises:
        AudioError: as `load_audio`.
    """
    with open_container(source) as recording:
        duration = recording.container.duration  # in microseconds
    return None if duration is None or duration < 0 else round(duration / 1e6 * SAMPLING_RATE)


class SampleBudget:
    """Samples that recordings of more than `HELD_SECONDS` have in memory together.

    Args:
        seconds: of audio, at most.
    """

    def __init__(self, seconds: float) -> None:
        self._left = round(seconds * SAMPLING_RATE)
        self._lock = Lock()

    def take(self, size: int | None) -> int:
        """Take room for this number of samples, and for 30 s; return it, or 0 if there is none."""
        if size is None:
            return 0
        size += round(BLOCK_SECONDS * SAMPLING_RATE)
        with self._lock:
            if size > self._left:
                return 0
            self._left -= size
        return size

    def give_back(self, size: int) -> None:
        """Have room again."""
        with self._lock:
            self._left += size


class HeldBlocks:
    """Blocks of a recording as they are decoded, as far as they may stay in memory.

    Called, it is the reader of an `AudioSource`. What it takes of a budget it gives back when
    nothing refers to it any more.

    Args:
        source: the recording.
        seconds: length up to which it is held in any case, at least 30.
        budget: for longer ones; None has no room.

    Attributes:
        size: samples that are held.
    """

    def __init__(self, source: Source, seconds: float, budget: SampleBudget | None) -> None:
        self._source, self._budget = source, budget
        self._most = max(seconds, BLOCK_SECONDS) * SAMPLING_RATE
        self._blocks: list[Samples] = []
        self._is_long = False
        self._give_back: Callable[[], object] = lambda: None
        self.size = 0

    def __call__(self) -> Iterator[Samples]:
        return iter(self._blocks)

    def take_room(self, size: int | None) -> bool:
        """Return whether a recording of this many samples may be held; use the budget if need be.

        Args:
            size: as its container states; None is unknown.
        """
        return (size is not None and size <= self._most) or self._use_budget(size)

    def _use_budget(self, size: int | None) -> bool:
        """Hold up to this many samples, if the budget has room for them."""
        if self._is_long or self._budget is None or not (room := self._budget.take(size)):
            return False
        self._is_long, self._most = True, room
        self._give_back = weakref.finalize(self, self._budget.give_back, room)
        return True

    def add(self, block: Samples) -> bool:
        """Keep a block; False, and none is kept, if the recording is too long."""
        self._blocks.append(block)
        self.size += block.size
        if self.size > self._most and not self._is_long and self._budget is not None:
            self._use_budget(stated_size(self._source))
        if self.size <= self._most:
            return True
        self._blocks.clear()
        self.size = 0
        return False

    def drop(self) -> None:
        """Hold nothing any more, and give back what was taken of the budget."""
        self._blocks.clear()
        self.size = 0
        self._give_back()

    def as_source(self, channel: int | None = None, track: int | str | None = None) -> AudioSource:
        """The recording in memory, of which this channel and track were decoded."""
        if self._is_long:  # joined, it would be in memory twice for a while
            return AudioSource(None, self._source, channel, track, self)
        return AudioSource(join_blocks(self._blocks))


def open_source(
    source: Source,
    *,
    held_seconds: float = HELD_SECONDS,
    budget: SampleBudget | None = None,
    stop: Event | None = None,
    channel: int | None = None,
    track: int | str | None = None,
) -> AudioSource:
    """Decode a recording of up to `held_seconds`, at least 30; leave a longer one where it is.

    Args:
        source: as for `load_audio`; what cannot be read twice (a pipe) is copied first.
        budget: where it has room, a longer recording is decoded, too.
        stop: once it is set, the result does not matter any more.
        channel, track: as for `stream_audio`.

    Raises:
        AudioError: as `load_audio` and `readable`; of a recording that is not held, damage after
            `held_seconds` shows when it is read.
    """
    source = readable(source, stop)
    held = HeldBlocks(source, held_seconds, budget)
    for block in stream_audio(source, channel=channel, track=track):
        if not held.add(block):
            return AudioSource(None, source, channel, track)
        if stop is not None and stop.is_set():
            break
    return held.as_source(channel, track)


def open_audio(
    source: Source,
    *,
    channel: int | str = "mix",
    track: int | str | None = None,
    held_seconds: float = HELD_SECONDS,
    budget: SampleBudget | None = None,
    stop: Event | None = None,
) -> AudioSource | ChannelSources:
    """Open a recording as `open_source` does, all channels mixed, one of them, or each.

    Args:
        channel: "mix", the number of one channel, from 1, or "each".
        track: number or language of the audio track; None is the file's default.

    Raises:
        AudioError: as `open_source`; or there is no such channel or track.
    """
    source = readable(source, stop)
    opened = partial(
        open_source, source, held_seconds=held_seconds, budget=budget, stop=stop, track=track
    )
    if channel == "each":
        count = chosen_track(source, track).channels
        return ChannelSources(tuple(opened(channel=number) for number in range(1, count + 1)))
    return opened(channel=None if channel == "mix" else int(channel))


def source_of_samples(
    samples: Any,
    sampling_rate: Any = SAMPLING_RATE,
    *,
    channel: int | str = "mix",
    track: int | str | None = None,
) -> AudioSource | ChannelSources:
    """Take samples as a recording, all channels mixed, one of them, or each.

    Args:
        samples, sampling_rate: as `recording_channels` takes them.
        channel: as for `open_audio`.
        track: None or 1: samples are a single track.

    Raises:
        AudioError: as `recording_channels`; or there is no such channel or track.
    """
    if track not in (None, 1):
        raise AudioError(f"audio track {track!r}: samples are a single track; leave it out")
    channels = recording_channels(samples, sampling_rate)
    if channel == "mix":
        return AudioSource(mix(channels))
    if channel == "each":
        return ChannelSources(tuple(AudioSource(each) for each in channels))
    if int(channel) > len(channels):
        count = f"{len(channels)} {'channel' if len(channels) == 1 else 'channels'}"
        raise AudioError(f"channel {channel}: the samples have {count}")
    return AudioSource(channels[int(channel) - 1])


# A recording as users name it: a path, the bytes of a file, or a file that is open for reading
# bytes; samples as `recording_channels` takes them, at 16 kHz or with their rate; or an open one.
Audio: TypeAlias = (
    "Source | npt.NDArray[Any] | Tensor | tuple[npt.NDArray[Any] | Tensor, float]"
    " | AudioSource | ChannelSources"
)


@dataclass(frozen=True, slots=True)
class AudioInput:
    """A recording as a user names it, and what is read of it.

    Args:
        audio: see `Audio`.
        channel, track: as for `open_audio`.
    """

    audio: Audio
    channel: int | str = "mix"
    track: int | str | None = None

    @property
    def is_file(self) -> bool:
        """Whether opening it means decoding."""
        named = isinstance(self.audio, str | os.PathLike | bytes | bytearray | memoryview)
        return named or hasattr(self.audio, "read")

    def open(
        self,
        stop: Event | None = None,
        held_seconds: float = HELD_SECONDS,
        budget: SampleBudget | None = None,
    ) -> AudioSource | ChannelSources:
        """Open the recording.

        Args:
            stop: once it is set, the result does not matter any more.
            held_seconds, budget: as for `open_audio`.

        Raises:
            AudioError: the file cannot be read, or samples are not such.
        """
        audio = self.audio
        if isinstance(audio, AudioSource | ChannelSources):
            return audio
        if self.is_file:
            source = cast("Source", audio)
            return open_audio(
                source,
                channel=self.channel,
                track=self.track,
                held_seconds=held_seconds,
                budget=budget,
                stop=stop,
            )
        if isinstance(audio, tuple):
            samples, rate = _samples_and_rate(audio)
            return source_of_samples(samples, rate, channel=self.channel, track=self.track)
        if not hasattr(audio, "dtype") and not hasattr(audio, "__array__"):
            raise AudioError(
                f"a recording is a path, bytes, a file that is open for reading bytes, samples, or "
                f"(samples, sampling rate) as a tuple, but got {shown(audio)}"
            )
        return source_of_samples(audio, channel=self.channel, track=self.track)


def is_pair(audio: object) -> bool:
    """Return whether a tuple is one recording, samples and their rate, and not two recordings."""
    return (
        isinstance(audio, tuple)
        and len(audio) == 2
        and any(isinstance(each, numbers.Number) for each in audio)
    )


def _samples_and_rate(audio: tuple[Any, ...]) -> tuple[Any, Any]:
    if not is_pair(audio) or isinstance(audio[0], numbers.Number):
        raise AudioError(
            f"samples and their rate are a tuple (samples, sampling rate), but got {shown(audio)}"
        )
    if AudioInput(audio[0]).is_file:
        raise AudioError(f"{shown(audio[0])}: a file has a sampling rate of its own; leave it out")
    return audio[0], audio[1]
