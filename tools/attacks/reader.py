"""Recordings in many containers: damaged, cut, spliced, with impossible headers and times."""

from __future__ import annotations

import contextlib
import io
import os
import random
import threading
from fractions import Fraction
from functools import partial
from pathlib import Path

from attacks.values import ODD_NUMBERS, Case, mutate_bytes

FORMATS = {
    "wav": ("wav", "pcm_s16le", 1),
    "wav8": ("wav", "pcm_u8", 2),
    "wavf": ("wav", "pcm_f32le", 6),
    "law": ("wav", "pcm_mulaw", 1),
    "w64": ("w64", "pcm_s24le", 2),
    "flac": ("flac", "flac", 2),
    "mp3": ("mp3", "mp3", 1),
    "ogg": ("ogg", "libopus", 2),
    "oggf": ("ogg", "flac", 1),
    "m4a": ("ipod", "aac", 1),
    "alac": ("ipod", "alac", 2),
    "webm": ("webm", "libopus", 1),
    "mkv": ("matroska", "aac", 2),
    "mkvp": ("matroska", "pcm_s16le", 8),
    "ts": ("mpegts", "aac", 1),
    "ts2": ("mpegts", "mp2", 2),
    "avi": ("avi", "mp3", 1),
    "avip": ("avi", "pcm_s16le", 2),
    "aiff": ("aiff", "pcm_s16be", 1),
    "au": ("au", "pcm_s16be", 1),
    "adts": ("adts", "aac", 1),
}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
# Where formats keep channels, rates, lengths, codecs and times.
FIELDS = (
    *b"RIFF fmt data fact fLaC OpusHead OpusTags mvhd mdhd tkhd stts stsc stsz stco elst".split(),
    *b"esds mp4a alac stsd avih strh strf movi idx1 COMM SSND .snd OggS Xing Info ID3 auds".split(),
    *(b"LIST", b"riff", b"Segment", b"\xb5", b"\x9f", b"*\xd7\xb1", b"D\x89", b"\xe7", b"\xa3"),
    *(b"\x86", b"\xff\xfb", b"G@"),
)


def encoded(name: str, times: random.Random | None = None, seconds: float = 0.4) -> bytes:
    """A short tone in a format; with `times`, packets whose time stamps make no sense."""
    import av
    import numpy as np

    container_name, codec, channels = FORMATS[name]
    same = {"fflags": "+bitexact"}  # without random ids
    rate, target = 48_000 if codec == "libopus" else 16_000, io.BytesIO()
    with av.open(target, "w", format=container_name, options=same) as container:
        stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[channels])
        tone = np.sin(np.arange(int(seconds * rate)) * 0.1)[None] * 8000
        tone = np.repeat(tone, channels, 0).T.reshape(1, -1).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout=LAYOUTS[channels])
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        packets = [*stream.encode(frame), *stream.encode(None)]
        shift = 0
        for packet in packets:
            if times is not None and packet.pts is not None and times.random() < 0.4:
                jump = times.choice((-1, 1, 1, 60, 3500, 3700, 10**5, 10**9)) * times.random()
                shift += int(jump / packet.time_base)
            if packet.pts is not None and times is not None:
                packet.pts = packet.dts = (
                    max(0, packet.pts + shift) if times.random() < 0.9 else None
                )
            with contextlib.suppress(av.FFmpegError, ValueError):
                container.mux(packet)
    return target.getvalue()


def reader(folder: Path) -> dict[str, Case]:
    import numpy as np

    from whisper_flash_attention.audio import load_audio
    from whisper_flash_attention.audio.audio_source import audio_tracks, open_audio, stream_audio

    good = {name: encoded(name) for name in FORMATS}

    def damaged(rng: random.Random, name: str) -> bytes:
        data = good[name]
        if rng.random() < 0.2 and name not in ("wav", "w64", "aiff", "au"):
            with contextlib.suppress(Exception):  # of the muxer, which refuses some
                data = encoded(name, rng)
        kind = rng.randrange(6)
        if kind == 0:
            return data if data is not good[name] else mutate_bytes(rng, data, 200)
        if kind == 1:
            return mutate_bytes(rng, data)
        if kind == 2:
            other = good[rng.choice(list(FORMATS))]
            return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
        if kind == 3:
            return data[: rng.randrange(len(data))]
        found = bytearray(data)
        for _ in range(rng.choice((1, 2, 3))):
            places = [found.find(field) for field in FIELDS if field in found]
            if places:
                at, width = rng.choice(places) + rng.randrange(48), rng.choice((1, 2, 4, 8))
                number = rng.choice((*ODD_NUMBERS, rng.getrandbits(64))) % (1 << 8 * width)
                found[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        return bytes(found)

    def case_of(name: str) -> Case:
        def case(rng: random.Random) -> tuple[int, int]:
            data = damaged(rng, name)
            path, way = folder / f"x.{name}", rng.randrange(8)
            options = {"channel": rng.choice((None, None, 1, 2, 9)), "track": rng.choice((None, 1))}
            if way <= 1:
                path.write_bytes(data)
                samples = [load_audio(path, **options)]
            elif way == 2:
                samples = [load_audio(data, rng.choice((2000, 16_000, 44_100)), **options)]
            elif way == 3:
                samples = [load_audio(io.BytesIO(data), **options)]
            elif way == 4:
                audio_tracks(data)
                opened = open_audio(data, channel=rng.choice(("mix", "each", 1)), held_seconds=30)
                samples = [each.whole() for each in getattr(opened, "sources", (opened,))]
            elif way == 5:
                begin = rng.choice((0, 0.1, 5.0))
                found = stream_audio(data, block_seconds=rng.choice((0.01, 1, 30)), start=begin)
                samples = list(found)
            else:
                samples = [through_pipe(folder, data, named=way == 6)]
            for each in samples:
                assert each.dtype == np.float32 and each.ndim == 1 and each.size, each.shape
                assert np.isfinite(each).all() and np.abs(each).max() <= 1
            total = sum(each.nbytes for each in samples)
            assert total < 4 * 48_000 * 3 * 3601 + 1000 * len(data), f"{total} bytes of samples"
            return len(data), total

        return case

    def through_pipe(folder: Path, data: bytes, named: bool):
        if named:
            path = folder / f"fifo{os.getpid()}"
            os.mkfifo(path) if not path.exists() else None
            open_end = partial(path.open, "wb", buffering=0)
        else:
            reading, writing = os.pipe()
            open_end = partial(os.fdopen, writing, "wb", buffering=0)

        def write() -> None:
            with contextlib.suppress(OSError), open_end() as end:
                end.write(data)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            if named:
                return load_audio(path)
            with os.fdopen(reading, "rb") as file:
                return load_audio(file)
        finally:
            thread.join(5)
            assert not thread.is_alive()

    return {name: case_of(name) for name in FORMATS}
