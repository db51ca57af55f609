"""Decode a recording of any format into mono float32 samples at one rate, through PyAV (FFmpeg).

Whole (`load_audio`) or block by block (`stream_audio`), which is the same work.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.errors import AudioError, OptionError

if TYPE_CHECKING:
    from av import AudioFrame, AudioResampler, AudioStream
    from av.container import InputContainer

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Hz; what every Whisper checkpoint was trained on

# Raw streams announce no length: what FFmpeg reports for them is an estimate from the bit rate.
_LENGTH_IS_A_GUESS = frozenset({"aac", "ac3", "dts", "eac3"})
# Encoder delay and padding make an announced length inexact by some frames.
_LENGTH_TOLERANCE = 0.25  # seconds
# A codec's own frames are some hundreds of samples, each of which would be a turn in Python.
_SAMPLES_PER_FRAME = 16_384

# A file's name, or what it holds: bytes, or a file that was opened for reading bytes.
Source = str | Path | bytes | BinaryIO
Samples = npt.NDArray[np.float32]


def load_audio(source: Source, sampling_rate: int = SAMPLING_RATE) -> Samples:
    """Decode `source` into mono float32 samples `[T]` within [-1, 1] at `sampling_rate` Hz.

    Every format of PyAV's FFmpeg is read (wav, flac, mp3, ogg, opus, m4a, mp4, ...), of a file with
    several audio streams the one that FFmpeg calls best. Channels are averaged. Decoding goes frame
    by frame; the peak of memory is twice the result.

    An open file is read from its beginning and left open. One that cannot seek is read from where
    it is; some formats do not allow that (mp4 with its index at the end), and mp3 keeps what its
    encoder added at the end.

    A damaged recording gives what could be decoded, and one warning in the log that says how much
    was damaged or is missing, so that a part is never passed off as the whole. Where more of it is
    damaged than whole, that is an error. A plain PCM file has nothing by which damage inside it
    could be noticed; an Ogg file that was cut off between two pages looks like a shorter one.

    Raises `AudioError`, which names the file, if it is missing, a folder, not readable, not audio,
    has no samples, or is mostly damaged; `OptionError` if the rate is not positive.
    """
    return join_blocks(stream_audio(source, sampling_rate=sampling_rate))


def stream_audio(
    source: Source,
    *,
    sampling_rate: int = SAMPLING_RATE,
    block_seconds: float = 30.0,
    start: float = 0.0,
    end: float | None = None,
) -> Iterator[Samples]:
    """Decode `source` block by block, in memory that does not grow with its length.

    Joined, the blocks are what `load_audio` gives, from `start` to `end`. What is before `start` is
    decoded and dropped, since a codec's samples depend on what came before; what is behind `end` is
    not read.

    Args:
        source: as for `load_audio`.
        sampling_rate: of the result, in Hz.
        block_seconds: length of a block; only the last may be shorter.
        start, end: seconds of the recording to give, all of it if left out.

    Returns:
        Blocks of mono float32 samples `[T]` within [-1, 1], of which the caller owns the memory.

    Raises:
        OptionError: at once, if the rate or a length is not positive, or `end` not after `start`.
        AudioError: with the first block, as `load_audio`, or where nothing is left from `start` on.
            That a recording is mostly damaged or not finite shows only when it was read so far,
            behind blocks that were given already. The warning about damage comes last, too.
    """
    if sampling_rate <= 0:
        raise OptionError(f"sampling_rate must be positive, got {sampling_rate}")
    size = _samples_of("block_seconds", block_seconds, sampling_rate)
    first = _samples_of("start", start, sampling_rate)
    last = None if end is None else _samples_of("end", end, sampling_rate)
    if size == 0:
        raise OptionError(f"block_seconds is {block_seconds}, less than one sample")
    if last is not None and last <= first:
        raise OptionError(f"end must be after start, but is {end} s, and start {start} s")
    return _blocks(source, size, _Decoding(sampling_rate, first, last))


def join_blocks(blocks: Iterable[Samples]) -> Samples:
    """Join blocks `[T]` of `stream_audio`, at least one, into one array."""
    found = list(blocks)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _samples_of(name: str, seconds: float, sampling_rate: int) -> int:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise OptionError(f"{name} must be seconds, not negative, got {seconds}")
    return round(seconds * sampling_rate)


def _blocks(source: Source, size: int, decoding: _Decoding) -> Iterator[Samples]:
    import av

    name = name_of(source)
    with _open(source, name) as container:
        stream = container.streams.best("audio")
        if not isinstance(stream, av.AudioStream):  # None, too, for one of which nothing is known
            raise AudioError(f"{name}: there is no audio stream that can be decoded")
        for block in _regrouped(decoding.run(container, stream), size):
            if not np.isfinite(block).all():
                raise AudioError(f"{name}: holds samples that are not finite numbers")
            yield np.clip(block, -1.0, 1.0, out=block)
        announced = _announced_seconds(container, stream)
    decoding.report(name, announced)


def _regrouped(pieces: Iterable[Samples], size: int) -> Iterator[Samples]:
    """New arrays of `size` samples each, the last with what is left."""
    kept: list[Samples] = []
    missing = size
    for piece in pieces:
        while len(piece) >= missing:
            yield np.concatenate([*kept, piece[:missing]])
            kept, piece, missing = [], piece[missing:], size
        kept.append(piece)
        missing -= len(piece)
    if missing < size:
        yield np.concatenate(kept)


def name_of(source: Source) -> str:
    """What messages call it."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return "<bytes>"
    name = getattr(source, "name", None)  # a number, for one opened by its descriptor
    return name if isinstance(name, str) else "<file>"


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """A file to read bytes from, which is closed behind it if it was opened here."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            yield file
    elif isinstance(source, bytes):
        yield io.BytesIO(source)
    else:
        yield source


def _is_empty(file: BinaryIO) -> bool:
    if not file.seekable():
        return False  # FFmpeg will see
    file.seek(0)
    empty = not file.read(1)
    file.seek(0)
    return empty


def _metadata_errors() -> dict[str, Any]:
    """The option that keeps odd bytes in tags from refusing a file; PyAV 19 has no other way."""
    import av

    return {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextmanager
def _open(source: Source, name: str) -> Iterator[InputContainer]:
    import av

    if isinstance(source, io.TextIOBase):
        raise AudioError(f'{name}: is open as text; open it with mode "rb", or take its `.buffer`')
    try:
        # FFmpeg gets bytes instead of a name, and no protocol: a playlist can open nothing else.
        options = {"protocol_whitelist": "none"}
        with _opened(source) as file:
            if _is_empty(file):
                raise AudioError(f"{name}: the file is empty (0 bytes)")
            with av.open(file, mode="r", options=options, **_metadata_errors()) as container:
                yield container
    except FileNotFoundError as error:
        raise AudioError(f"{name}: there is no such file") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name}: is a folder, not a recording; name the files in it") from error
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise AudioError(f"{name}: is not a recording that can be read ({reason})") from error


def _announced_seconds(container: InputContainer, stream: AudioStream) -> float | None:
    """The length that the file claims to have, or None where it claims none."""
    if container.format.name in _LENGTH_IS_A_GUESS:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration is not None else None


@dataclass(slots=True)
class _Decoding:
    """The state of one file's decoding, from sample `first` to `last`, and what was wrong."""

    sampling_rate: int
    first: int = 0
    last: int | None = None
    given: int = 0  # samples decoded, those before `first` too
    packets: int = 0
    damaged: int = 0
    seconds: float = 0.0  # decoded, before resampling
    resampler: AudioResampler | None = None
    frame_kind: tuple[str, str, int] | None = None

    def run(self, container: InputContainer, stream: AudioStream) -> Iterator[Samples]:
        """Mono samples, in pieces of any length, until `last` or the recording's end."""
        for frame in self._resampled(container, stream):
            before, piece = self.given, _mono(frame)
            self.given += len(piece)
            if self.given > self.first:
                stop = None if self.last is None else self.last - before
                yield piece[max(0, self.first - before) : stop]
            if self._reached_last():
                return

    def _reached_last(self) -> bool:
        return self.last is not None and self.given >= self.last

    def _resampled(self, container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
        import av

        for packet in container.demux(stream):
            self.packets += packet.size > 0  # the last, empty one flushes the decoder
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.damaged += 1
                continue
            self.damaged += packet.is_corrupt
            for frame in frames:
                yield from self._take(frame)
        yield from self._flush()

    def _take(self, frame: AudioFrame) -> Iterator[AudioFrame]:
        import av

        kind = (frame.format.name, frame.layout.name, frame.rate)
        if kind != self.frame_kind:  # the first frame, or a stream that changes on the way
            yield from self._flush()
            self.resampler = av.AudioResampler(
                format="fltp", rate=self.sampling_rate, frame_size=_SAMPLES_PER_FRAME
            )
            self.frame_kind = kind
        assert self.resampler is not None
        self.seconds += frame.samples / frame.rate
        frame.pts = None  # damaged time stamps must not move samples
        yield from self.resampler.resample(frame)

    def _flush(self) -> Iterator[AudioFrame]:
        if self.resampler is not None:
            yield from self.resampler.resample(None)

    def report(self, name: str, announced: float | None) -> None:
        """Warn about a recording that is not whole; raise `AudioError` if there is too little."""
        damage = f"{self.damaged} of its {self.packets} packets are damaged"
        if 2 * self.damaged > self.packets:
            raise AudioError(f"{name}: {damage}")
        missing = announced is not None and self.seconds < announced - _LENGTH_TOLERANCE
        missing = missing and not self._reached_last()
        if self.damaged or missing:
            length = f" of the {announced:.1f} s that it announces" if missing else ""
            logger.warning(
                "%s: is damaged or cut off: %s; %.1f s%s could be decoded",
                name,
                damage,
                self.seconds,
                length,
            )
        if self.given == 0:
            raise AudioError(f"{name}: holds no sound (0 samples)")
        if self.given <= self.first:
            start = self.first / self.sampling_rate
            raise AudioError(f"{name}: ends after {self.seconds:.2f} s, before {start:.2f} s")


def _mono(frame: AudioFrame) -> Samples:
    """The mean of a frame's channels, [T]: FFmpeg's own mix adds them up to more than 1.0."""
    planes = frame.to_ndarray().astype(np.float32, copy=False)  # [channels, T]
    if len(planes) == 1:
        only: Samples = planes[0]
        return only
    with np.errstate(invalid="ignore", over="ignore"):  # `_blocks` looks for these
        mean: Samples = planes.mean(axis=0, dtype=np.float32)
    return mean
