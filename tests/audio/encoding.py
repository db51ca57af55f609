"""Write samples into files of other formats, so that the tests need no fixtures on disk."""

from __future__ import annotations

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


def encode(path: Path, samples: Samples, *, codec: str, rate: int, layout: str) -> Path:
    """Encode mono 16 kHz samples `[T]` at another rate and in another layout."""
    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = 16_000, 0  # from which AAC knows its delay
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(stream.format.name, layout, rate)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path
