"""A recording that can be read from its beginning as often as needed: held, or left in its file.

What is short is decoded once and held. A long recording is decoded anew each time it is read, so
that memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any

from whisper_flash_attention.audio.container import Source, name_of
from whisper_flash_attention.audio.decode import Samples
from whisper_flash_attention.audio.load import (
    SAMPLING_RATE,
    chosen_track,
    join_blocks,
    stream_audio,
)
from whisper_flash_attention.audio.readable import readable
from whisper_flash_attention.audio.silence import length_of_silence
from whisper_flash_attention.audio.waveforms import mix, recording_channels
from whisper_flash_attention.errors import AudioError

# Up to here a recording is held: 38 MB of samples.
HELD_SECONDS = 600.0
BLOCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Mono float32 samples within [-1, 1] at 16 kHz, or where they come from.

    Args:
        samples: `[T]`, of a recording that is held.
        source: of one that is not, as `load_audio` takes it; it can be read again.
        channel, track: what is read of the source, as `stream_audio` takes them.
    """

    samples: Samples | None = None
    source: Source | None = None
    channel: int | None = None
    track: int | str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "<samples>" if self.source is None else name_of(self.source)

    @property
    def seconds(self) -> float | None:
        """Its length; None of one that is not held, which is known when it was read."""
        return None if self.samples is None else self.samples.size / SAMPLING_RATE

    def blocks(self, seconds: float = BLOCK_SECONDS) -> Iterator[Samples]:
        """All of it from the beginning: blocks `[T]` of this length, the last what is left.

        Raises:
            AudioError: as `stream_audio`.
        """
        if self.samples is None:
            assert self.source is not None
            yield from stream_audio(
                self.source,
                block_seconds=seconds,
                channel=self.channel,
                track=self.track,
            )
            return
        size = round(seconds * SAMPLING_RATE)
        for start in range(0, self.samples.size, size):
            yield self.samples[start : start + size]

    def seconds_of_silence(self) -> float | None:
        """Its length if there is no sound in it, or less than a word; None if there is.

        Raises:
            AudioError: as `stream_audio`.
        """
        size = length_of_silence(self.blocks())
        return None if size is None else size / SAMPLING_RATE


@dataclass(frozen=True, slots=True)
class ChannelSources:
    """The channels of one recording, each by itself, in their order."""

    sources: tuple[AudioSource, ...]

    @property
    def seconds(self) -> float | None:
        """Length of the recording, as of `AudioSource`."""
        lengths = [audio.seconds for audio in self.sources]
        return None if None in lengths else max(length or 0.0 for length in lengths)


def open_source(
    source: Source,
    *,
    held_seconds: float = HELD_SECONDS,
    stop: Event | None = None,
    channel: int | None = None,
    track: int | str | None = None,
) -> AudioSource:
    """Decode a recording of up to `held_seconds`, at least 30; leave a longer one where it is.

    Args:
        source: as for `load_audio`; what cannot be read twice (a pipe) is copied first.
        stop: once it is set, the result does not matter any more.
        channel, track: as for `stream_audio`.

    Raises:
        AudioError: as `load_audio` and `readable`; of a recording that is not held, damage after
            `held_seconds` shows when it is read.
    """
    source = readable(source, stop)
    most = max(held_seconds, BLOCK_SECONDS) * SAMPLING_RATE
    blocks: list[Samples] = []
    held = 0
    for block in stream_audio(source, channel=channel, track=track):
        blocks.append(block)
        held += block.size
        if held > most:
            return AudioSource(None, source, channel, track)
        if stop is not None and stop.is_set():
            break
    return AudioSource(join_blocks(blocks))


def open_audio(
    source: Source,
    *,
    channel: int | str = "mix",
    track: int | str | None = None,
    held_seconds: float = HELD_SECONDS,
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
    if channel == "each":
        count = chosen_track(source, track).channels
        each = (
            open_source(source, held_seconds=held_seconds, stop=stop, channel=number, track=track)
            for number in range(1, count + 1)
        )
        return ChannelSources(tuple(each))
    number = None if channel == "mix" else int(channel)
    return open_source(source, held_seconds=held_seconds, stop=stop, channel=number, track=track)


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
