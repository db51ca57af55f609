"""Lengths in headers: placeholders, wrong ones, estimates; and no false alarms."""

from __future__ import annotations

import io
import logging
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.audio.encoding import Samples, encode, write_wave
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.lengths import length_correction, mp3_frames

W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf62.12.102\0"


@pytest.fixture(scope="module")
def wav(speech: Samples, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("lengths") / "a.wav"
    write_wave(path, speech[None], 16_000)
    return path.read_bytes()


def with_size(wav: bytes, size: int) -> bytes:
    return wav[:40] + struct.pack("<I", size) + wav[44:]


@pytest.mark.parametrize(
    "size", [0, 0x7FFFFFFF, 0x7FFFFFDB, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFDB]
)
def test_a_placeholder_for_the_length_is_no_damage(
    wav: bytes, speech: Samples, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    np.testing.assert_array_equal(load_audio(with_size(wav, size)), speech / np.float32(32_768))
    assert not caplog.records


def half_wav(wav: bytes, path: Path, speech: Samples) -> bytes:
    return with_size(wav, speech.size)


def half_rf64(wav: bytes, path: Path, speech: Samples, name: bytes = b"RF64") -> bytes:
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, len(wav) + 28, speech.size, speech.size // 2, 0)
    return name + b"\xff" * 4 + b"WAVE" + ds64 + wav[12:40] + b"\xff" * 4 + wav[44:]


def half_bw64(wav: bytes, path: Path, speech: Samples) -> bytes:
    return half_rf64(wav, path, speech, b"BW64")


def half_w64(wav: bytes, path: Path, speech: Samples) -> bytes:
    data = encoded(path / "a.w64", speech, "pcm_s16le")
    at = data.index(W64_DATA) + 16
    return data[:at] + struct.pack("<Q", speech.size + 24) + data[at + 8 :]


def half_aiff(wav: bytes, path: Path, speech: Samples) -> bytes:
    data = encoded(path / "a.aiff", speech, "pcm_s16be")
    at = data.index(b"SSND") + 4
    return data[:at] + struct.pack(">I", speech.size + 8) + data[at + 4 :]


def half_caf(wav: bytes, path: Path, speech: Samples) -> bytes:
    data = encoded(path / "a.caf", speech, "pcm_s16le")
    at = data.index(b"data") + 4
    return data[:at] + struct.pack(">Q", speech.size + 4) + data[at + 8 :]


def encoded(path: Path, speech: Samples, codec: str) -> bytes:
    return encode(path, speech, codec=codec, rate=16_000, layout="mono").read_bytes()


@pytest.mark.parametrize("make", [half_wav, half_rf64, half_bw64, half_w64, half_aiff, half_caf])
def test_sound_beyond_the_length_in_the_header_is_read_with_a_warning(
    tmp_path: Path,
    wav: bytes,
    speech: Samples,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[bytes, Path, Samples], bytes],
) -> None:
    samples = load_audio(make(wav, tmp_path, speech))
    np.testing.assert_array_equal(samples, speech / np.float32(32_768))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    sizes = f"{speech.size} of its {2 * speech.size} bytes of sound, all of which were read"
    assert sizes in record.getMessage()


@pytest.mark.parametrize("name", ["a.wav", "a.w64", "a.aiff", "a.caf", "a.au"])
def test_lengths_that_are_right_are_left_alone(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    codec = "pcm_s16be" if name in ("a.aiff", "a.au") else "pcm_s16le"
    data = encoded(tmp_path / name, speech, codec)
    for tail in (b"", b"\0" * 100) if name != "a.au" else (b"",):
        file = io.BytesIO(data + tail)
        assert length_correction(file) is None
        assert file.tell() == 0
        assert load_audio(file).size == speech.size
    assert not caplog.records


@pytest.mark.parametrize(
    "tail",
    [LIST, LIST * 500, b"id3 " + struct.pack("<I", 8_000) + b"\xff" * 8_000, b"TAG" + b"x" * 125],
)
def test_chunks_after_the_samples_are_no_sound(
    wav: bytes, speech: Samples, caplog: pytest.LogCaptureFixture, tail: bytes
) -> None:
    assert load_audio(wav + tail).size == speech.size
    assert not caplog.records


def test_headers_of_garbage_are_no_trouble(wav: bytes) -> None:
    draw = random.Random(0)
    for _ in range(2_000):
        data = bytearray(wav[: draw.randrange(100)])
        for _ in range(draw.randrange(8)):
            if data:
                data[draw.randrange(len(data))] = draw.choice((0, 0xFF, draw.randrange(256)))
        data[:4] = draw.choice((b"RIFF", b"RF64", b"FORM", b"caff", b"riff", b"ID3\4"))
        for look in (length_correction, mp3_frames):
            look(io.BytesIO(data))


def plain_mp3(path: Path, speech: Samples, *, vbr: bool = False) -> bytes:
    """An mp3 without a Xing header, of constant or variable bit rate."""
    import av

    options = {"write_xing": "0", "id3v2_version": "0"}
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream("mp3", rate=44_100, layout="mono")
        if vbr:
            stream.codec_context.qscale = True
            stream.codec_context.global_quality = 4 * 118
        frame = av.AudioFrame.from_ndarray(speech[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        resampler = av.AudioResampler(stream.format.name, "mono", 44_100)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path.read_bytes()


def test_an_estimate_from_the_bit_rate_is_no_announcement(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = np.concatenate([np.zeros(80_000, np.int16), speech])  # begins with small frames
    loud = np.concatenate([speech, np.zeros(80_000, np.int16)])
    for samples in (quiet, loud):
        data = plain_mp3(tmp_path / "a.mp3", samples, vbr=True)
        assert mp3_frames(io.BytesIO(data)) is None
        assert abs(load_audio(data).size - samples.size) < 1_600
    assert not caplog.records


def id3(size: int) -> bytes:
    digits = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + digits + random.Random(size).randbytes(size)


@pytest.mark.parametrize(
    "between",
    [b"", id3(300), id3(200_000), b"TAG" + b"x" * 125, b"TAG" + b"x" * 125 + id3(70_000)],
    ids=["nothing", "tag", "picture", "old tag", "both"],
)
@pytest.mark.parametrize("has_xing", [False, True])
def test_joined_mp3s_are_whole(
    tmp_path: Path,
    mp3: bytes,
    speech: Samples,
    caplog: pytest.LogCaptureFixture,
    between: bytes,
    has_xing: bool,
) -> None:
    one = mp3 if has_xing else plain_mp3(tmp_path / "a.mp3", speech)
    samples = load_audio(one + between + one)
    assert abs(samples.size - 2 * speech.size) < 0.1 * 16_000
    assert not caplog.records


def test_tags_around_an_mp3_are_no_damage(
    mp3: bytes, speech: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 60, 1, 0xA0000000) + bytes(60)
    samples = load_audio(id3(100_000) + mp3 + ape + b"TAG" + b"x" * 125)
    assert abs(samples.size - speech.size) < 1_600
    assert not caplog.records


def test_a_truncated_mp3_is_still_noticed_after_a_large_tag(
    mp3: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    load_audio(id3(100_000) + mp3[: len(mp3) // 2])
    [record] = caplog.records
    assert "of the 7.1 s that it announces could be decoded" in record.getMessage()
