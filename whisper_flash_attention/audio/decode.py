"""Decode one track of an open recording: packets to frames to mono samples, around any damage.

Samples are placed by the presentation time stamps of their frames (`Timeline`), and the gaps that
these show are filled with silence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from whisper_flash_attention.audio.container import (
    AudioTrack,
    OpenedContainer,
    keep_layout,
    listing,
    tracks_of,
)
from whisper_flash_attention.audio.lengths import id3_size
from whisper_flash_attention.audio.samples import ChannelMixer, Samples
from whisper_flash_attention.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFifo, AudioFrame, AudioResampler, AudioStream, Packet
    from av.container import InputContainer

Frame = TypeVar("Frame")

# Seconds by which time stamps may run ahead of the samples before silence is put in: containers
# round them, network recorders stamp packets as they arrive, and some decoders give nothing for the
# first packet (128 ms, at 8 kHz).
TOLERANCE = 0.15
# Seconds that time stamps may lie back (overlapping packets) before a new clock is assumed.
BACKWARD = 1.0
# Seconds of frames without a time stamp to wait for one that confirms a jump.
_LOOK_AHEAD = 10.0
# Limits of silence, in seconds: one gap, all gaps, and all gaps beyond the announced length.
LONGEST_GAP = 3600.0
MOST_SILENCE = 3 * 3600.0
MOST_UNANNOUNCED_SILENCE = 600.0


@dataclass(slots=True)
class Timeline(Generic[Frame]):
    """Place frames by their time stamps.

    A jump of time stamps counts once the next one confirms it: a single wrong one moves nothing.
    Forward it is a gap, if it is not too long to be true; backward it is another clock, as where
    recordings were joined, and what follows is placed right after what came before.

    Args:
        origin: time stamp, in seconds, at which the whole container begins; None for the first
            frame's.
        announced: length of the whole container in seconds, if it is known.

    Attributes:
        position: seconds of sound and silence placed so far.
        lead: seconds of silence before the first frame.
        silence: seconds of silence in all gaps.
        wrong: number of time stamps that make no sense.
    """

    origin: float | None = None
    announced: float | None = None
    position: float = 0.0
    lead: float = 0.0
    silence: float = 0.0
    wrong: int = 0
    _pending: list[tuple[Frame, float]] = field(default_factory=list)
    _pending_time: float = 0.0

    def place(
        self, frames: Iterable[tuple[Frame, float | None, float]]
    ) -> Iterator[tuple[Frame, float]]:
        """Yield every frame with the seconds of silence that belong before it.

        Args:
            frames: frames in order, each with its time stamp in seconds, if it has one, and its
                length in seconds.
        """
        for frame, time, length in frames:
            if self.origin is None and time is not None:
                self.origin = time - self.position
            if self._pending:
                waited = sum(length for _, length in self._pending)
                if time is None and waited < _LOOK_AHEAD:
                    self._pending.append((frame, length))
                    continue
                confirmed = (
                    time is not None and abs(time - self._pending_time - waited) <= TOLERANCE
                )
                yield from self._settle(confirmed)
            late = 0.0 if time is None else self._lateness(time)
            if -BACKWARD <= late <= TOLERANCE:
                self.position += length
                yield frame, 0.0
            else:
                assert time is not None
                self._pending, self._pending_time = [(frame, length)], time
        if self._pending:
            yield from self._settle(confirmed=True)

    def _lateness(self, time: float) -> float:
        assert self.origin is not None
        return time - self.origin - self.position

    def _settle(self, confirmed: bool) -> Iterator[tuple[Frame, float]]:
        assert self.origin is not None
        late, gap = self._lateness(self._pending_time), 0.0
        if not confirmed:
            self.wrong += abs(late) > BACKWARD  # less than that is jitter
        elif late < 0:
            self.origin += late
        elif self._is_plausible(late):
            gap = late
            self.lead = gap if self.position == 0 else self.lead
            self.silence += gap
        else:
            self.wrong += 1
            self.origin += late
        pending, self._pending = self._pending, []
        for frame, length in pending:
            self.position += gap + length
            yield frame, gap
            gap = 0.0

    def _is_plausible(self, gap: float) -> bool:
        if gap > LONGEST_GAP or self.silence + gap > MOST_SILENCE:
            return False
        end = self.position + gap
        is_announced = self.announced is not None and end <= self.announced + BACKWARD
        return is_announced or self.silence + gap <= MOST_UNANNOUNCED_SILENCE


logger = logging.getLogger(__name__)


# Sampling rates that are read and made, in Hz: beyond telephones' and sonar's, a wrong rate would
# make thousands of samples of one.
LOWEST_RATE, HIGHEST_RATE = 2_000, 3_072_000
_MOST_CHANNELS = 64  # of FFmpeg's resampler
# The longest recording, in seconds: a week.
MOST_SECONDS = 7 * 24 * 3600

# Encoder delay and padding make an announced length inexact by some frames. Pictures and subtitles
# last longer than a frame of sound, and containers may not say how long.
_LENGTH_TOLERANCE, _MIXED_LENGTH_TOLERANCE = 0.25, 2.0  # seconds
# Where most is damaged, less than this is what decoders make of noise.
_LEAST_USEFUL = 0.1  # seconds
# Failed reads in a row after which the rest of a file is given up.
_MOST_FAILED_READS = 20
# What begins the tags that mp3 files have at their ends, besides ID3v2.
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")
# A codec's own frames are some hundreds of samples. FFmpeg joins them, so that resampling and what
# Python does with the samples take few calls: samples of a channel before and after resampling.
_SAMPLES_PER_CALL, _SAMPLES_PER_FRAME = 65_536, 16_384
# Beyond these, and in unusual orders of channels, PyAV's handling of layouts is not relied on.
_MOST_JOINED_CHANNELS = 8


@dataclass(slots=True)
class Decoding:
    """The state of one recording's decoding, and what was wrong with it.

    Args:
        sampling_rate: of the result, in Hz.
        first, last: samples of the result to give, counted from the recording's beginning.
        mixer: makes one channel of many.
        most_seconds: longest recording that is read.
    """

    sampling_rate: int
    first: int
    last: int | None
    mixer: ChannelMixer
    most_seconds: float = MOST_SECONDS
    made: int = 0  # samples, those before `first` too
    seconds: float = 0.0  # of sound that was decoded, without silence
    packets: int = 0
    damaged: int = 0
    reason: str = ""  # of the first damage
    _ends: dict[int, int] = field(default_factory=dict)  # last time stamps of all tracks
    _timeline: Timeline[AudioFrame] = field(default_factory=Timeline)
    _tag_end: int = 0  # byte of the file
    _resampler: AudioResampler | None = None
    _fifo: AudioFifo | None = None  # of frames that the resampler has not got yet
    _kind: tuple[str, str, int, int] | None = None
    _names: tuple[str, ...] = ()

    def run(self, recording: OpenedContainer, stream: AudioStream) -> Iterator[Samples]:
        """Yield mono samples, in blocks of any length, until `last` or the recording's end.

        Raises:
            AudioError: it cannot be decoded, has no such channel, has a sampling rate that no sound
                has, or is longer than `most_seconds`.
        """
        container = recording.container
        _open_decoder(recording.name, stream)
        if container.start_time is not None:
            self._timeline.origin = container.start_time / 1e6
        if recording.announces_length and container.duration is not None:
            self._timeline.announced = container.duration / 1e6
        for block in self._blocks(recording, stream):
            before = self.made
            self.made += len(block)
            if self.made > self.first:
                stop = None if self.last is None else self.last - before
                yield block[max(0, self.first - before) : stop]
            if self._reached_last():
                return

    def _reached_last(self) -> bool:
        return self.last is not None and self.made >= self.last

    def _blocks(self, recording: OpenedContainer, stream: AudioStream) -> Iterator[Samples]:
        frames = self._checked(self._frames(recording, stream), recording.name, stream)
        for frame, gap in self._timeline.place(frames):
            if gap > 0:
                yield from self._resampled(None)
                begin = self._timeline.position - frame.samples / frame.rate
                yield from self._silence(round(begin * self.sampling_rate) - self.made)
            if self._timeline.position > self.most_seconds:
                yield from self._resampled(None)
                hours = self.most_seconds / 3600
                raise AudioError(f"{recording.name}: is longer than {hours:g} hours; split it")
            self._require_channel(recording, frame)
            yield from self._resampled(frame)
        yield from self._resampled(None)

    def _silence(self, size: int) -> Iterator[Samples]:
        for start in range(0, size, _SAMPLES_PER_FRAME):
            yield np.zeros(min(_SAMPLES_PER_FRAME, size - start), np.float32)

    def _require_channel(self, recording: OpenedContainer, frame: AudioFrame) -> None:
        """Refuse a channel that the first frame doesn't have: containers may not know how many."""
        channel = self.mixer.channel
        if self.seconds == 0 and channel is not None and channel > frame.layout.nb_channels:
            tracks = listing(tracks_of(recording.container))
            raise AudioError(f"{recording.name}: there is no channel {channel}; {tracks}")

    def _packets(
        self, recording: OpenedContainer, stream: AudioStream
    ) -> Iterator[Packet[Any] | None]:
        """Packets of the track, and at its end None. Failed reads are damage, not the end."""
        import av

        failed, track, ends = 0, stream.index, self._ends
        while failed < _MOST_FAILED_READS:
            try:
                for packet in recording.container.demux():
                    if packet.size == 0:  # of these each stream has one at its end
                        continue
                    failed = 0
                    index, start = packet.stream_index, packet.pts
                    if start is not None:
                        ends[index] = max(ends.get(index, 0), start + (packet.duration or 0))
                    if index == track:
                        yield packet
            # IndexError is PyAV's, after the last packet, where a stream appeared on the way.
            except (av.EOFError, IndexError):
                break
            except av.FFmpegError as error:
                failed += 1
                self._damage(error)
            else:
                break
        yield None

    def _frames(self, recording: OpenedContainer, stream: AudioStream) -> Iterator[AudioFrame]:
        import av

        is_mp3 = recording.container.format.name == "mp3"
        decode = stream.codec_context.decode
        for packet in self._packets(recording, stream):
            self.packets += packet is not None
            try:
                frames = decode(packet)
            except av.EOFError:
                continue
            except av.FFmpegError as error:  # any: decoders have many names for damage
                if packet is not None and not (is_mp3 and self._is_tag(packet)):
                    self._damage(error)
                continue
            if packet is not None:
                self.damaged += packet.is_corrupt
                if is_mp3:
                    self._note_tag(packet)
            for frame in frames:
                keep_layout(frame.layout)
                yield frame

    def _note_tag(self, packet: Packet[Any]) -> bool:
        """Remember where an ID3 tag ends that begins in this packet, as where files were joined."""
        data = bytes(packet)
        at = data.find(b"ID3")
        size = id3_size(data[at : at + 10]) if at >= 0 else None
        if size is not None and packet.pos is not None:
            self._tag_end = packet.pos + at + size
        return size is not None

    def _is_tag(self, packet: Packet[Any]) -> bool:
        """Whether a packet is (a part of) a tag, which holds no sound and takes no time."""
        is_inside = packet.pos is not None and packet.pos < self._tag_end
        if not (is_inside or self._note_tag(packet) or bytes(packet).startswith(_TAGS)):
            return False
        if self._timeline.origin is not None and packet.duration and packet.time_base is not None:
            self._timeline.origin += float(packet.duration * packet.time_base)
        return True

    def _damage(self, error: Exception) -> None:
        self.damaged += 1
        self.reason = self.reason or getattr(error, "strerror", None) or str(error)

    def _checked(
        self, frames: Iterator[AudioFrame], name: str, stream: AudioStream
    ) -> Iterator[tuple[AudioFrame, float | None, float]]:
        """Frames of sound with their time stamps and lengths in seconds."""
        unit = None if stream.time_base is None else float(stream.time_base)
        for frame in frames:
            samples, rate = frame.samples, frame.rate
            if samples == 0:
                continue
            if reason := _reason_against(rate, frame.layout.nb_channels):
                if self.seconds == 0:
                    raise AudioError(f"{name}: {reason}")
                self._damage(AudioError(reason))
                continue
            time = None if frame.pts is None or unit is None else frame.pts * unit
            yield frame, time, samples / rate

    def _resampled(self, frame: AudioFrame | None) -> Iterator[Samples]:
        """Mono samples of a frame, as far as the resampler gives them; None gives its rest."""
        import av

        if frame is None:
            if self._fifo is not None and self._fifo.samples:
                yield from self._converted(self._fifo.read())
            yield from self._converted(None)
            return
        layout = frame.layout
        kind = (frame.format.name, layout.name, layout.nb_channels, frame.rate)
        frame.pts = None  # the timeline has placed it; here time stamps must not move samples
        if kind != self._kind:  # the first frame, or a stream that changes on the way
            yield from self._resampled(None)
            # Packed, since PyAV reads beyond the planes of planar frames of 8 channels or more.
            self._resampler = av.AudioResampler(
                format="flt", rate=self.sampling_rate, frame_size=_SAMPLES_PER_FRAME
            )
            self._kind = kind
            self._names = tuple(each.name for each in layout.channels)
            # By itself, so that a format that FFmpeg cannot convert shows with its first frame.
            yield from self._converted(frame)
            is_usual = layout.nb_channels <= _MOST_JOINED_CHANNELS and " channels (" not in kind[1]
            self._fifo = av.AudioFifo() if is_usual and self._resampler is not None else None
        elif self._fifo is None:
            yield from self._converted(frame)
        else:
            self._fifo.write(frame)
            if self._fifo.samples >= _SAMPLES_PER_CALL:
                yield from self._converted(self._fifo.read())

    def _converted(self, frame: AudioFrame | None) -> Iterator[Samples]:
        """Mono samples that the resampler gives for a frame; None ends its work."""
        import av

        if self._resampler is None:
            return
        if frame is not None:
            frame.pts = None
        try:
            resampled = self._resampler.resample(frame)
        except av.FFmpegError as error:
            self._resampler = self._fifo = self._kind = None
            self._damage(error)
            return
        if frame is None:
            self._resampler = self._fifo = self._kind = None
        else:
            self.seconds += frame.samples / frame.rate
        for each in resampled:
            keep_layout(each.layout)
            samples = np.asarray(each.to_ndarray(), np.float32).reshape(each.samples, -1)
            yield self.mixer.mix(samples, self._names)  # of [T, channels]

    def report(self, recording: OpenedContainer, track: AudioTrack) -> None:
        """Warn about what was lost and about channels.

        Raises:
            AudioError: nothing useful is left, or nothing from `first` on.
        """
        name = recording.name
        damage = f"{self.damaged} of its {self.packets} packets are damaged"
        mostly_damaged = 2 * self.damaged > self.packets and self.seconds < _LEAST_USEFUL
        if self.damaged and (self.seconds == 0 or mostly_damaged):
            raise AudioError(f"{name}: {damage} ({self.reason})")
        if self.made == 0:
            raise AudioError(f"{name}: holds no sound (0 samples)")
        announced = self._announced_but_missing(recording, track)
        losses = [damage] * (self.damaged > 0 or announced is not None)
        if wrong := self._timeline.wrong:
            losses += [f"{wrong} of its time stamps make no sense"]
        correction = recording.correction
        if correction is not None and correction.announced is not None:
            bytes_of = f"{correction.announced} of its {correction.found} bytes of sound"
            losses += [f"its header knows of {bytes_of}, all of which were read"]
        if losses:
            of = "" if announced is None else f" of the {announced:.1f} s that it announces"
            self._warn(
                "%s: is damaged or cut off: %s; %.1f s%s could be decoded",
                name,
                "; ".join(losses),
                self.seconds,
                of,
            )
        self._report_channels(name)
        if self.made <= self.first:
            start = self.first / self.sampling_rate
            end = self.made / self.sampling_rate
            raise AudioError(f"{name}: ends after {end:.2f} s, before {start:.2f} s")

    def _warn(self, message: str, *values: object) -> None:
        logger.warning(message, *values)

    def _announced_but_missing(self, recording: OpenedContainer, track: AudioTrack) -> float | None:
        """The length in seconds that the file announces, if it holds less."""
        if self._reached_last():
            return None
        if recording.mp3_frames is not None and track.rate > 0:
            seconds = recording.mp3_frames * (1152 if track.rate >= 32_000 else 576) / track.rate
            return seconds if self._timeline.position < seconds - _LENGTH_TOLERANCE else None
        if not recording.announces_length:
            return None
        container, time = recording.container, self._timeline
        whole = None if container.duration is None else container.duration / 1e6
        tolerance = _LENGTH_TOLERANCE
        if track.seconds is None:
            # Nothing is known of the track alone: some track must last as long as the container.
            announced = whole
            found = max(time.position, self._container_end(container) - (time.origin or 0.0))
            if len(container.streams) > 1:
                tolerance = _MIXED_LENGTH_TOLERANCE
        elif "matroska" in container.format.name:  # a tag, which has the track's end
            announced = track.seconds if whole is None else min(track.seconds, whole)
            found = time.position
        else:
            announced, found = track.seconds, time.position - time.lead
        return announced if announced is not None and found < announced - tolerance else None

    def _container_end(self, container: InputContainer) -> float:
        """The last time stamp of all tracks, in seconds."""
        units = {each.index: each.time_base for each in container.streams}
        ends = (float(end * unit) for index, end in self._ends.items() if (unit := units[index]))
        return max(ends, default=0.0)

    def _report_channels(self, name: str) -> None:
        mixer = self.mixer
        if mixer.replaced:
            self._warn(
                "%s: its channels cancel each other for %.1f s (opposite phases); one of them "
                "is used there instead of their mix",
                name,
                mixer.replaced / self.sampling_rate,
            )
        if mixer.missing:
            self._warn(
                "%s: has no channel %d for %.1f s, which are silent",
                name,
                mixer.channel,
                mixer.missing / self.sampling_rate,
            )


def _open_decoder(name: str, stream: AudioStream) -> None:
    """Open the decoder now: after PyAV failed to, its context must not be touched again."""
    import av

    try:
        stream.codec_context.open(strict=False)
    except av.FFmpegError as error:
        reason = error.strerror or error
        raise AudioError(
            f"{name}: its decoder refuses what the container says of it ({reason})"
        ) from error


def _reason_against(rate: int, channels: int) -> str | None:
    """Why a frame's format is refused, if it is."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        return f"has a sampling rate of {rate} Hz; {LOWEST_RATE} to {HIGHEST_RATE} can be read"
    if not 1 <= channels <= _MOST_CHANNELS:
        return f"has {channels} channels; 1 to {_MOST_CHANNELS} can be read"
    return None
