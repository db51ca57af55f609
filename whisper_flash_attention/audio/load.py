"""Decode a recording of any format into mono float32 samples at one rate, through PyAV (FFmpeg)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame, AudioResampler, AudioStream
    from av.container import InputContainer

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Hz; what every Whisper checkpoint was trained on

# Raw streams announce no length: what FFmpeg reports for them is an estimate from the bit rate.
_LENGTH_IS_A_GUESS = frozenset({"aac", "ac3", "dts", "eac3"})
# Encoder delay and padding make an announced length inexact by some frames.
_LENGTH_TOLERANCE = 0.25  # seconds


def load_audio(source: str | Path, sampling_rate: int = SAMPLING_RATE) -> npt.NDArray[np.float32]:
    """Decode `source` into mono float32 samples `[T]` within [-1, 1] at `sampling_rate` Hz.

    Every format of PyAV's FFmpeg is read (wav, flac, mp3, ogg, opus, m4a, mp4, ...), of a file with
    several audio streams the one that FFmpeg calls best. Channels are averaged. Decoding goes frame
    by frame; the peak of memory is twice the result.

    A damaged recording gives what could be decoded, and one warning in the log that says how much
    was damaged or is missing, so that a part is never passed off as the whole. Where more of it is
    damaged than whole, that is an error. A plain PCM file has nothing by which damage inside it
    could be noticed; an Ogg file that was cut off between two pages looks like a shorter one.

    Raises `AudioError`, which names the file, if it is missing, a folder, not readable, not audio,
    has no samples, or is mostly damaged.
    """
    if sampling_rate <= 0:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    import av

    path = Path(source)
    decoding = _Decoding(sampling_rate)
    with _open(path) as container:
        stream = container.streams.best("audio")
        if not isinstance(stream, av.AudioStream):  # None, too, for one of which nothing is known
            raise AudioError(f"{path}: there is no audio stream that can be decoded")
        decoding.run(container, stream)
        announced = _announced_seconds(container, stream)
    decoding.report(path, announced)
    return decoding.samples(path)


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    import av

    try:
        # FFmpeg gets bytes instead of a name, and no protocol: a playlist can open nothing else.
        options = {"protocol_whitelist": "none"}
        with path.open("rb") as file:
            if path.is_file() and path.stat().st_size == 0:
                raise AudioError(f"{path}: the file is empty (0 bytes)")
            with av.open(file, mode="r", options=options, metadata_errors="ignore") as container:
                yield container
    except FileNotFoundError as error:
        raise AudioError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise AudioError(f"{path}: is a folder, not a recording; name the files in it") from error
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise AudioError(f"{path}: is not a recording that can be read ({reason})") from error


def _announced_seconds(container: InputContainer, stream: AudioStream) -> float | None:
    """The length that the file claims to have, or None where it claims none."""
    if container.format.name in _LENGTH_IS_A_GUESS:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration is not None else None


@dataclass(slots=True)
class _Decoding:
    """The state of one file's decoding: samples so far, and what was wrong on the way."""

    sampling_rate: int
    chunks: list[npt.NDArray[np.float32]] = field(default_factory=list)
    packets: int = 0
    damaged: int = 0
    seconds: float = 0.0  # decoded, before resampling
    resampler: AudioResampler | None = None
    frame_kind: tuple[str, str, int] | None = None

    def run(self, container: InputContainer, stream: AudioStream) -> None:
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
                self._take(frame)
        self._flush()

    def _take(self, frame: AudioFrame) -> None:
        import av

        kind = (frame.format.name, frame.layout.name, frame.rate)
        if kind != self.frame_kind:  # the first frame, or a stream that changes on the way
            self._flush()
            self.resampler = av.AudioResampler(format="fltp", rate=self.sampling_rate)
            self.frame_kind = kind
        assert self.resampler is not None
        self.seconds += frame.samples / frame.rate
        frame.pts = None  # damaged time stamps must not move samples
        self._keep(self.resampler.resample(frame))

    def _flush(self) -> None:
        if self.resampler is not None:
            self._keep(self.resampler.resample(None))

    def _keep(self, frames: list[AudioFrame]) -> None:
        # FFmpeg's own mix-down to mono adds channels to more than 1.0; the mean never does.
        for frame in frames:
            planes = frame.to_ndarray()  # [channels, T]
            with np.errstate(invalid="ignore", over="ignore"):  # `samples` looks for these
                self.chunks.append(planes.mean(axis=0, dtype=np.float32))

    def report(self, path: Path, announced: float | None) -> None:
        """Warn about a recording that is not whole; raise `AudioError` if it is mostly damaged."""
        damage = f"{self.damaged} of its {self.packets} packets are damaged"
        if 2 * self.damaged > self.packets:
            raise AudioError(f"{path}: {damage}")
        missing = announced is not None and self.seconds < announced - _LENGTH_TOLERANCE
        if self.damaged or missing:
            length = f" of the {announced:.1f} s that it announces" if missing else ""
            logger.warning(
                "%s: is damaged or cut off: %s; %.1f s%s could be decoded",
                path,
                damage,
                self.seconds,
                length,
            )

    def samples(self, path: Path) -> npt.NDArray[np.float32]:
        """Join the decoded chunks into `[T]`, within [-1, 1]."""
        joined = np.concatenate(self.chunks) if self.chunks else np.empty(0, np.float32)
        if joined.size == 0:
            raise AudioError(f"{path}: holds no sound (0 samples)")
        if not np.isfinite(joined).all():
            raise AudioError(f"{path}: holds samples that are not finite numbers")
        return np.clip(joined, -1.0, 1.0, out=joined)
