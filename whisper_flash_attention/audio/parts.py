"""Decode one long recording in parts, side by side, into the samples that one decoder gives.

A part is decoded from a second ahead of where it begins, and repeats the last samples of the part
before. Parts count only if these are equal, bit by bit, and nothing was met on the way that depends
on what came before: damage, gaps, another format, channels that cancel each other. Otherwise the
recording is decoded once more, from its beginning to its end. Codecs and containers are those whose
decoders forget what is further back (so not Opus), and whose time stamps are exact to the sample.
AAC may have noise that decoders make up, which a second decoder finds (`Twin`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import decoded_blocks
from whisper_flash_attention.audio.container import (
    AudioTrack,
    OpenedContainer,
    Source,
    choose_track,
    open_container,
)
from whisper_flash_attention.audio.decode import Decoding
from whisper_flash_attention.audio.samples import SAMPLING_RATE, ChannelMixer, Samples
from whisper_flash_attention.option_kinds import checked_track

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, Packet

# Parts begin at multiples of this many samples at 16 kHz, 5.12 s. There the resampler is in the
# same phase as at the beginning, for every sampling rate that is a multiple of 25 Hz, and a block
# of samples of the mixer begins.
UNIT = 81_920
# Samples that a part repeats of the one before, 4 s. The first of its unit are left out: there the
# resampler has no earlier samples.
OVERLAP = UNIT - 16_384
# Seconds that are decoded ahead and dropped: decoders of lossy codecs need some frames.
_AHEAD = 1.0
# Shortest part, in seconds: about what is decoded while a process starts.
_SHORTEST = 150.0
# With fewer it takes long to find out that parts do not fit together; with more, processes take
# memory for little time.
LEAST_PARTS, MOST_PARTS = 4, 8

_CODECS = frozenset(("aac", "alac", "flac", "mp3", "mp3float"))
# Of a frame of AAC; twice as many of HE-AAC.
_LC_SAMPLES = 1_024
# PyAV counts planes beyond those of eight channels.
_MOST_CHANNELS = 7
# mp3 files have no index, and FFmpeg would guess: packets before a part are read and not decoded.
_WITHOUT_INDEX = "mp3"
_CONTAINERS = frozenset((_WITHOUT_INDEX, "aiff", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "w64", "wav"))


class InexactPart(Exception):
    """A part may not have the samples that it has when the whole is decoded."""


def part_bounds(source: Source, track: int | str | None, most: int) -> list[int]:
    """Choose where parts of about the same length begin.

    Args:
        source, track: as for `load_audio`.
        most: number of free processes.

    Returns:
        First samples of the parts at 16 kHz, multiples of `UNIT`, and the length that the container
        states; empty if the recording is too short, or is none that can be decoded in parts.

    Raises:
        AudioError, OptionError: as `load_audio`.
    """
    track = checked_track(track, "track")
    with open_container(source) as recording:
        chosen, _ = choose_track(recording.container, track, recording.name)
        duration = recording.container.duration  # in microseconds
        if duration is None or not _is_suitable(recording, chosen):
            return []
        samples = round(duration / 1e6 * SAMPLING_RATE)
        count = min(most, MOST_PARTS, int(samples / SAMPLING_RATE / _SHORTEST))
        size = math.ceil(samples / max(1, count) / UNIT) * UNIT
        starts = list(range(0, samples - UNIT, size))
        return [*starts, samples] if len(starts) >= LEAST_PARTS else []


def join_parts(parts: Sequence[Sequence[Samples]]) -> list[Samples]:
    """Join parts, dropping the samples that each repeats.

    Args:
        parts: blocks `[T]` of each, of which at most the last has less than `OVERLAP` samples; of
            all parts but the first, the first `OVERLAP` samples are repeated.

    Returns:
        Blocks of the whole.

    Raises:
        InexactPart: repeated samples differ, or are so silent that nothing could differ.
    """
    joined = list(parts[0])
    for part in parts[1:]:
        again = part[0][:OVERLAP]
        if not np.array_equal(np.concatenate(joined[-2:])[-OVERLAP:], again):
            raise InexactPart("parts differ where they meet")
        if np.ptp(again) == 0:
            raise InexactPart("there is no sound where parts meet")
        joined += [part[0][OVERLAP:], *part[1:]]
    return joined


def _is_suitable(recording: OpenedContainer, track: AudioTrack) -> bool:
    return (
        recording.container.format.name in _CONTAINERS
        and recording.correction is None
        and (track.codec in _CODECS or track.codec.startswith("pcm_"))
        and track.rate > 0
        and UNIT * track.rate % SAMPLING_RATE == 0
    )


class Twin:
    """A second decoder of AAC, whose random numbers are others.

    Where an encoder leaves out noise ("perceptual noise substitution"), decoders make it up from
    random numbers that go on from frame to frame. A part has such noise if this decoder, which got
    some of it before, gives other samples.

    Raises:
        InexactPart: there is no noise that changes the decoder of this stream.
    """

    def __init__(self, stream: AudioStream) -> None:
        import av

        context = stream.codec_context
        if context.layout.nb_channels > _MOST_CHANNELS:
            raise InexactPart("it has too many channels")
        decoder = av.CodecContext.create("aac", "r")
        assert isinstance(decoder, av.AudioCodecContext)
        self._decoder = decoder
        self._decoder.extradata = context.extradata
        self._frames: deque[AudioFrame] = deque()
        try:
            packets = _noise(context.sample_rate, context.layout.name)
            once, again = (
                [frame.to_ndarray() for packet in packets for frame in self._decoder.decode(packet)]
                for _ in range(2)
            )
        except (av.FFmpegError, ValueError) as error:
            raise InexactPart(f"no noise can be made for its decoder ({error})") from error
        if not once or np.array_equal(once[-1], again[-1]):
            raise InexactPart("no noise changes its decoder")
        if context.profile != "LC":
            raise InexactPart(f"its profile of AAC is {context.profile}")
        self._decoder.flush_buffers()

    def decode(self, packet: Packet[Any] | None) -> None:
        """Decode a packet, or at the end what is left."""
        import av

        with suppress(av.FFmpegError):  # as the first decoder, whose damage counts
            self._frames += self._decoder.decode(packet)

    def compare(self, frame: AudioFrame, *, is_alike: bool) -> None:
        """Take the next frame, which must be as this one if `is_alike`.

        Raises:
            InexactPart: it is not, or has more samples than AAC without band replication.
        """
        if frame.samples > _LC_SAMPLES:
            raise InexactPart("its decoder makes up high frequencies")
        found = self._frames.popleft() if self._frames else None
        if is_alike and (found is None or not _are_equal(found, frame)):
            raise InexactPart("its decoder makes up noise")


def _are_equal(one: AudioFrame, other: AudioFrame) -> bool:
    """Whether frames of AAC, float32 in planes, have the same samples."""
    size = 4 * one.samples  # a plane may be longer
    return one.samples == other.samples and all(
        bytes(memoryview(a)[:size]) == bytes(memoryview(b)[:size])
        for a, b in zip(one.planes, other.planes, strict=True)
    )


def _noise(rate: int, layout: str) -> list[Packet[Any]]:
    """Encode noise that a decoder of AAC must make up."""
    import av

    encoder = av.CodecContext.create("aac", "w")
    assert isinstance(encoder, av.AudioCodecContext)
    encoder.sample_rate, encoder.layout, encoder.format = rate, layout, "fltp"
    encoder.time_base, encoder.bit_rate = Fraction(1, rate), 32_000 * encoder.layout.nb_channels
    encoder.options = {"aac_pns": "1"}
    encoder.open()
    channels = encoder.layout.nb_channels
    noise = np.random.default_rng(0).normal(0, 0.1, (8, channels, encoder.frame_size))
    packets = []
    for number, samples in enumerate(noise.astype(np.float32)):
        frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
        frame.sample_rate, frame.pts = rate, number * encoder.frame_size
        packets += encoder.encode(frame)
    return packets


@dataclass(slots=True)
class PartDecoding(Decoding):
    """Decode a part of a recording; raise `InexactPart` where `Decoding` would warn.

    Args:
        begin: first sample to make, a multiple of `UNIT`.

    Attributes:
        packet_range: byte offsets of the first and the last packet that were decoded; None until
            there is one.
    """

    begin: int = 0
    packet_range: tuple[int, int] | None = None
    _from: float = -math.inf  # time stamp from which on packets are decoded
    _surplus: int = 0  # samples of the first frame that are before the beginning
    _is_ahead: bool = False
    _origin: float | None = None
    _twin: Twin | None = None

    def __post_init__(self) -> None:
        self.made = self.begin

    def _frames(self, recording: OpenedContainer, stream: AudioStream) -> Iterator[AudioFrame]:
        frames = Decoding._frames(self, recording, stream)
        first, unit = next(frames, None), stream.time_base
        if first is None or first.pts is None or unit is None:
            raise InexactPart("its beginning has no time stamp")
        if self._timeline.origin is None:
            self._timeline.origin = float(first.pts * unit)
        self._origin = self._timeline.origin
        if self.begin == 0:
            yield first
            yield from frames
            return
        origin, rate = first.pts, first.rate
        start = self.begin * rate // self.sampling_rate
        if start * self.sampling_rate != self.begin * rate:
            raise InexactPart(f"it has {rate} Hz")
        self._from = origin + (start / rate - _AHEAD) / float(unit)
        self.packet_range, self._is_ahead = None, True
        if recording.container.format.name != _WITHOUT_INDEX:
            recording.container.seek(int(self._from), stream=stream)
        stream.codec_context.flush_buffers()
        if stream.codec_context.name == "aac":
            self._twin = Twin(stream)
        expected = start
        for frame in Decoding._frames(self, recording, stream):
            if self._twin is not None:
                self._twin.compare(frame, is_alike=not self._is_ahead)
            if frame.pts is None or frame.rate != rate:
                raise InexactPart("a frame has no time stamp, or another rate")
            index = round((frame.pts - origin) * unit * rate)
            if self._is_ahead:
                if index + frame.samples <= start:
                    continue
                if index > start:
                    raise InexactPart("the frame that it begins in is not found")
                self._is_ahead, self._surplus = False, start - index
                self._timeline.position, expected = index / rate, index
            if abs(index - expected) > 1:
                raise InexactPart("its time stamps do not fit its samples")
            expected += frame.samples
            yield frame

    def _packets(
        self, recording: OpenedContainer, stream: AudioStream
    ) -> Iterator[Packet[Any] | None]:
        for packet in Decoding._packets(self, recording, stream):
            if packet is not None:
                if packet.pts is not None and packet.pts < self._from:
                    continue
                self._from = -math.inf
                if packet.pos is None:
                    raise InexactPart("a packet has no position")
                first = packet.pos if self.packet_range is None else self.packet_range[0]
                self.packet_range = first, packet.pos
            if self._twin is not None:
                self._twin.decode(packet)
            yield packet

    def _silence(self, size: int) -> Iterator[Samples]:
        raise InexactPart("it has a gap")

    def _damage(self, error: Exception) -> None:
        if not self._is_ahead:
            raise InexactPart(str(error))

    def _warn(self, message: str, *values: object) -> None:
        raise InexactPart(message % values)

    def _resampled(self, frame: AudioFrame | None) -> Iterator[Samples]:
        import av

        if frame is not None:
            kind = (frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.rate)
            if self._kind not in (None, kind):
                raise InexactPart("its format changes")
            if self._surplus:
                fifo = av.AudioFifo()
                frame.pts = None
                fifo.write(frame)
                fifo.read(self._surplus)
                frame, self._surplus = fifo.read(), 0
        yield from Decoding._resampled(self, frame)

    def report(self, recording: OpenedContainer, track: AudioTrack) -> None:
        """Check that nothing was met that decoding from the beginning would treat otherwise.

        Raises:
            InexactPart: something was.
        """
        Decoding.report(self, recording, track)
        if self._timeline.origin != self._origin:
            raise InexactPart("its time stamps begin anew")

    def first_position(self, recording: OpenedContainer, stream: AudioStream) -> int:
        """Return the byte offset of the first packet that is decoded for this part."""
        next(self.run(recording, stream), None)
        if self.packet_range is None:
            raise InexactPart("it has no packet")
        return self.packet_range[0]


def stream_part(
    source: Source,
    *,
    start: float,
    end: float | None,
    block_seconds: float,
    sampling_rate: int,
    channel: int | None,
    track: int | str | None,
    most_seconds: float,
) -> Iterator[Samples]:
    """Decode a part of a recording as `stream_audio` does, from `start`, a part's first sample.

    Except in the first part, `OVERLAP` samples before `start` come first.

    Raises:
        InexactPart: the samples may differ from those of `stream_audio`.
        AudioError, OptionError: as `stream_audio`.
    """
    channel = check.optional(check.whole_number, "channel", channel, least=1)
    track = checked_track(track, "track")
    part = partial(PartDecoding, sampling_rate, mixer=ChannelMixer(channel))
    first, last = round(start * sampling_rate), None if end is None else round(end * sampling_rate)
    decoding = part(max(0, first - OVERLAP), last, begin=max(0, first - UNIT))
    decoding.most_seconds = most_seconds
    yield from decoded_blocks(source, round(block_seconds * sampling_rate), track, decoding)
    if last is None:
        return
    # Time stamps may come twice in a file, and the next part may be that of later ones.
    with open_container(source) as recording:
        _, stream = choose_track(recording.container, track, recording.name)
        position = part(0, None, begin=last - UNIT).first_position(recording, stream)
    if decoding.packet_range is None or position > decoding.packet_range[1]:
        raise InexactPart("something lies between it and the next part")
