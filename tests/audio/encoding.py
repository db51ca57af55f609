"""Write samples into files of other formats, so that the tests need no fixtures on disk."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.int16]


def read_wave(path: Path) -> Samples:
    """The samples `[T]` of a mono 16-bit WAV file, without the code under test."""
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def write_wave(path: Path, channels: npt.NDArray[np.int16], rate: int) -> None:
    """Write `[channels, T]` as a 16-bit WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((channels.shape[0], 2, rate, 0, "NONE", ""))
        file.writeframes(np.ascontiguousarray(channels.T, dtype="<i2").tobytes())


def wave_bytes(
    data: bytes, *, channels: int, rate: int, bits: int = 16, kind: int = 1, mask: int | None = None
) -> bytes:
    """Return a WAV file, with any number in its header.

    Args:
        data: the samples' bytes.
        kind: 1 for integers, 3 for floating point.
        mask: of the channels' places; without it they have none.
    """
    frame = channels * bits // 8
    head = struct.pack("<HIIHH", channels, rate, rate * frame & 0xFFFFFFFF, frame, bits)
    if mask is None:
        head = struct.pack("<H", kind) + head
    else:
        guid = struct.pack("<H", kind) + bytes.fromhex("000000001000800000aa00389b71")
        head = struct.pack("<H", 0xFFFE) + head + struct.pack("<HHI", 22, bits, mask) + guid
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def write_channels(
    path: Path, channels: npt.NDArray[np.int16], rate: int, *, mask: int | None = None
) -> None:
    """Write `[channels, T]` as a 16-bit WAV file that knows the channels' places."""
    data = np.ascontiguousarray(channels.T, dtype="<i2").tobytes()
    path.write_bytes(wave_bytes(data, channels=len(channels), rate=rate, mask=mask))


def encode(path: Path, samples: Samples, *, codec: str, rate: int, layout: str) -> Path:
    """Encode mono 16 kHz samples `[T]` at another rate and in another layout."""
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = 16_000, 0  # from which AAC knows its delay
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if codec.startswith("wma"):  # has no bit rate of its own
            stream.bit_rate = 64_000
        resampler = av.AudioResampler(stream.format.name, layout, rate)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def mux_tracks(path: Path, tracks: list[tuple[Samples, float, str]]) -> Path:
    """Write mono 16 kHz tracks side by side: samples `[T]`, seconds before them, language."""
    import av

    packets = []
    with av.open(path, "w") as container:
        streams = []
        for _, _, language in tracks:
            stream = container.add_stream("aac", rate=16_000, layout="mono")
            stream.metadata["language"] = language
            streams.append(stream)
        for stream, (samples, begin, _) in zip(streams, tracks, strict=True):
            stream.codec_context.open(strict=False)
            resampler = av.AudioResampler("fltp", "mono", 16_000, 1024)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            for part in (*resampler.resample(frame), *resampler.resample(None), None):
                for packet in stream.encode(part):
                    shift = round(begin / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packets.append(packet)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            container.mux(packet)
    return path


def mux_late(path: Path, samples: Samples, begin: float) -> Path:
    """Write a first track that begins at once, and a second that begins `begin` seconds later."""
    return mux_tracks(path, [(samples, 0.0, "eng"), (samples, begin, "fra")])


def write_silence(path: Path, seconds: int) -> Path:
    """A WAV file of 8-bit silence at 8 kHz, which takes no room on most file systems."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, 8_000, seconds * 8_000, "NONE", ""))
        file.writeframesraw(b"")
    with path.open("r+b") as raw:
        header = bytearray(raw.read(44))
        header[4:8] = (36 + seconds * 8_000).to_bytes(4, "little")
        header[40:44] = (seconds * 8_000).to_bytes(4, "little")
        raw.seek(0)
        raw.write(header)
        raw.truncate(44 + seconds * 8_000)
    return path
