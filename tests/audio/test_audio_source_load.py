from __future__ import annotations

import io
import json
import logging
import os
import random
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.audio.encoding import Samples, encode, write_wave
from whisper_flash_attention.audio import bundled_recordings, load_audio, stream_audio
from whisper_flash_attention.errors import AudioError


def compare(found: npt.NDArray[np.float32], wanted: Samples) -> tuple[float, int]:
    """The best cosine of two signals over all shifts, and that shift in samples."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    length = 2 ** (a.size + b.size).bit_length()
    products = np.fft.irfft(np.fft.rfft(a, length) * np.conj(np.fft.rfft(b, length)), length)
    best = int(np.argmax(products))
    cosine = products[best] / (np.linalg.norm(a) * np.linalg.norm(b))
    return float(cosine), best if best < length // 2 else best - length


def test_16_khz_wav_is_read_exactly(speech: Samples) -> None:
    samples = load_audio(bundled_recordings()[0].path)
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, speech / np.float32(32768))


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout", "least"),
    [
        ("phone.wav", "pcm_s16le", 8_000, "mono", 0.97),
        ("phone_law.wav", "pcm_mulaw", 8_000, "mono", 0.97),
        ("studio.wav", "pcm_f32le", 48_000, "stereo", 0.999),
        ("disc.flac", "flac", 44_100, "stereo", 0.999),
        ("low.flac", "flac", 8_000, "mono", 0.97),
        ("speech.mp3", "mp3", 44_100, "stereo", 0.99),
        ("small.mp3", "mp3", 16_000, "mono", 0.99),
        ("speech.opus", "libopus", 48_000, "mono", 0.98),
        ("speech.ogg", "libopus", 48_000, "stereo", 0.98),
        ("speech.m4a", "aac", 44_100, "stereo", 0.99),
        ("speech.mp4", "aac", 48_000, "mono", 0.99),
        ("surround.m4a", "aac", 48_000, "5.1", 0.98),
    ],
)
def test_other_formats_give_the_same_speech_at_16_khz(
    tmp_path: Path,
    speech: Samples,
    caplog: pytest.LogCaptureFixture,
    name: str,
    codec: str,
    rate: int,
    layout: str,
    least: float,
) -> None:
    path = encode(tmp_path / name, speech, codec=codec, rate=rate, layout=layout)
    samples = load_audio(str(path))
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(samples.size - speech.size) < 0.05 * 16_000
    cosine, shift = compare(samples, speech)
    assert cosine > least
    assert abs(shift) <= 16  # 1 ms: the delay of encoders is taken off
    assert not caplog.records


def test_channels_are_averaged(tmp_path: Path, speech: Samples) -> None:
    write_wave(tmp_path / "left.wav", np.stack([speech, np.zeros_like(speech)]), 16_000)
    write_wave(tmp_path / "both.wav", np.stack([speech, speech]), 16_000)
    expected = speech / np.float32(32768)
    np.testing.assert_array_equal(load_audio(tmp_path / "left.wav"), expected / 2)
    np.testing.assert_array_equal(load_audio(tmp_path / "both.wav"), expected)


def test_loud_channels_do_not_clip_when_they_are_mixed(tmp_path: Path) -> None:
    wave_form = (32_767 * np.sin(np.arange(16_000) / 20)).astype(np.int16)
    write_wave(tmp_path / "loud.wav", np.stack([wave_form, wave_form]), 16_000)
    np.testing.assert_array_equal(load_audio(tmp_path / "loud.wav"), wave_form / np.float32(32768))


@pytest.mark.parametrize("source_rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("sampling_rate", [8_000, 16_000])
def test_resampling_keeps_pitch_length_and_level(
    tmp_path: Path, source_rate: int, sampling_rate: int
) -> None:
    seconds = np.arange(2 * source_rate) / source_rate
    tone = (16_384 * np.sin(2 * np.pi * 1_000 * seconds)).astype(np.int16)
    write_wave(tmp_path / "tone.wav", tone[None], source_rate)
    samples = load_audio(tmp_path / "tone.wav", sampling_rate=sampling_rate)
    assert abs(samples.size - 2 * sampling_rate) <= 2
    middle = samples[sampling_rate // 2 : -sampling_rate // 2]
    peak = np.argmax(np.abs(np.fft.rfft(middle))) * sampling_rate / middle.size
    assert abs(peak - 1_000) <= 2
    assert abs(np.sqrt(2 * np.mean(middle**2)) - 0.5) < 0.005


def test_samples_beyond_full_scale_are_clipped(tmp_path: Path) -> None:
    write_float_wave(tmp_path / "hot.wav", np.array([0.5, 3.0, -7.0, 1.0], np.float32))
    np.testing.assert_array_equal(load_audio(tmp_path / "hot.wav"), [0.5, 1.0, -1.0, 1.0])


def test_a_stream_that_changes_its_rate_is_read_to_its_end(
    tmp_path: Path, speech: Samples, mp3: bytes
) -> None:
    low = encode(tmp_path / "low.mp3", speech, codec="mp3", rate=16_000, layout="mono")
    (tmp_path / "joined.mp3").write_bytes(mp3 + low.read_bytes())
    samples = load_audio(tmp_path / "joined.mp3")
    assert abs(samples.size - 2 * speech.size) < 0.2 * 16_000
    cosine, shift = compare(samples[speech.size :], speech)
    assert cosine > 0.9
    assert abs(shift) < 0.1 * 16_000


def test_a_file_name_is_never_read_as_a_protocol_or_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: Samples
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-i.wav", "concat:a.wav", "talk: one, two.wav", "ünïcödé 日本.wav"):
        write_wave(tmp_path / name, speech[None], 16_000)
        assert load_audio(name).size == speech.size


def test_memory_stays_at_twice_the_result(tmp_path: Path, speech: Samples) -> None:
    write_wave(tmp_path / "long.wav", np.tile(speech, 20)[None], 16_000)
    load_audio(tmp_path / "long.wav")  # imports, too, take memory
    tracemalloc.start()
    result = load_audio(tmp_path / "long.wav")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.3 * result.nbytes


def write_float_wave(path: Path, samples: npt.NDArray[np.float32]) -> None:
    data = samples.astype("<f4").tobytes()
    head = struct.pack("<IHHIIHH", 16, 3, 1, 16_000, 64_000, 4, 32)
    body = b"WAVEfmt " + head + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def write_png(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 72)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def write_garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(50_000))


UNREADABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing.wav": ("there is no such file", lambda path: None),
    "folder": ("is a folder", Path.mkdir),
    "empty.wav": ("the file is empty", Path.touch),
    "text.txt": ("no audio stream", lambda path: path.write_text("Not a sound.\n" * 50)),
    "text.wav": ("is not a recording", lambda path: path.write_text("Not a sound.\n" * 50)),
    "subtitles.srt": (
        "no audio stream",
        lambda path: path.write_text("1\n00:00:00,000 --> 00:00:01,000\nhi\n"),
    ),
    "image.png": ("no audio stream", write_png),
    "no_samples.wav": (
        "",  # older and newer FFmpeg word it differently
        lambda path: write_wave(path, np.zeros((1, 0), np.int16), 16_000),
    ),
    "not_numbers.wav": (
        "not finite",
        lambda path: write_float_wave(path, np.array([0.0, np.nan, np.inf], np.float32)),
    ),
    "garbage.wav": ("is not a recording", write_garbage),
    "garbage.mp3": ("is not a recording", write_garbage),
    "garbage.flac": ("no audio stream", write_garbage),
    "garbage.ogg": ("is not a recording", write_garbage),
    "garbage": ("is not a recording", write_garbage),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_recording_is_an_error_of_one_line_that_names_the_file(
    tmp_path: Path, name: str
) -> None:
    reason, make = UNREADABLE[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


def test_a_playlist_cannot_make_it_read_another_file(tmp_path: Path, mp3: bytes) -> None:
    (tmp_path / "secret.mp3").write_bytes(mp3)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n"
        f"{tmp_path / 'secret.mp3'}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(AudioError):
        load_audio(playlist)


def test_a_cut_off_recording_gives_its_beginning_and_a_warning(
    tmp_path: Path, speech: Samples, mp3: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cut.mp3"
    path.write_bytes(mp3[: len(mp3) * 6 // 10])
    samples = load_audio(path)
    assert 0.55 < samples.size / speech.size < 0.65
    assert compare(samples, speech[: samples.size])[0] > 0.99
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert "of the 7.1 s that it announces could be decoded" in record.getMessage()


def test_a_broken_tail_gives_what_is_before_it_and_a_warning(
    tmp_path: Path, speech: Samples, mp3: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tail.mp3"
    keep = len(mp3) * 6 // 10
    path.write_bytes(mp3[:keep] + random.Random(2).randbytes(len(mp3) - keep))
    samples = load_audio(path)
    assert 0.55 < samples.size / speech.size < 0.65
    assert "is damaged or cut off" in caplog.text


def test_damage_in_the_middle_leaves_the_rest_and_a_warning(
    tmp_path: Path, speech: Samples, m4a: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scratched.m4a"
    start, stop = len(m4a) // 2, len(m4a) * 6 // 10
    path.write_bytes(m4a[:start] + random.Random(3).randbytes(stop - start) + m4a[stop:])
    samples = load_audio(path)
    assert abs(samples.size - speech.size) < 0.1 * 16_000  # time goes on where packets are damaged
    assert compare(samples, speech)[0] > 0.85
    [record] = caplog.records
    assert "packets are damaged" in record.getMessage()


def test_a_recording_of_which_nothing_is_left_is_an_error(tmp_path: Path, m4a: bytes) -> None:
    path = tmp_path / "ruined.m4a"
    start, stop = m4a.index(b"mdat") + 4, m4a.index(b"moov") - 4
    path.write_bytes(m4a[:start] + b"\xff" * (stop - start) + m4a[stop:])
    with pytest.raises(AudioError, match=r"ruined\.m4a: \d+ of its \d+ packets are damaged"):
        load_audio(path)


def test_a_cut_off_wav_gives_its_beginning_and_a_warning(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    write_wave(tmp_path / "whole.wav", speech[None], 16_000)
    whole = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2 + 1])
    samples = load_audio(tmp_path / "cut.wav")
    np.testing.assert_array_equal(samples, speech[: samples.size] / np.float32(32768))
    assert samples.size < 0.51 * speech.size
    assert "is damaged or cut off" in caplog.text


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_stream_has_the_errors_of_the_whole(tmp_path: Path, name: str) -> None:
    UNREADABLE[name][1](tmp_path / name)
    with pytest.raises(AudioError) as whole:
        load_audio(tmp_path / name)
    with pytest.raises(AudioError) as streamed:
        next(stream_audio(tmp_path / name))
    assert str(streamed.value) == str(whole.value)


@pytest.mark.parametrize("format_name", ["wav", "mp3", "m4a"])
def test_bytes_and_open_files_are_read_as_the_file(
    tmp_path: Path, speech: Samples, mp3: bytes, m4a: bytes, format_name: str
) -> None:
    path = tmp_path / f"speech.{format_name}"
    write_wave(path, speech[None], 16_000)
    path.write_bytes({"wav": path.read_bytes(), "mp3": mp3, "m4a": m4a}[format_name])
    wanted = load_audio(path)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), wanted)
    with path.open("rb") as file:
        file.seek(100)
        np.testing.assert_array_equal(load_audio(file), wanted)
        np.testing.assert_array_equal(load_audio(file), wanted)


def test_a_pipe_is_read_to_its_end(tmp_path: Path, speech: Samples, mp3: bytes) -> None:
    write_wave(tmp_path / "speech.wav", speech[None], 16_000)
    whole = load_audio(tmp_path / "speech.wav")
    np.testing.assert_array_equal(through_a_pipe((tmp_path / "speech.wav").read_bytes()), whole)
    found, whole = through_a_pipe(mp3), load_audio(mp3)
    assert 0 <= len(found) - len(whole) < 1_000  # with what the encoder added at the end
    np.testing.assert_array_equal(found[: len(whole) - 100], whole[:-100])


def through_a_pipe(data: bytes) -> npt.NDArray[np.float32]:
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(reading, "rb") as file:
        samples = load_audio(file)
    writer.join()
    return samples


def test_errors_of_what_has_no_name_say_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"^<bytes>: the file is empty"):
        load_audio(b"")
    with pytest.raises(AudioError, match=r"^<file>: is not a recording"):
        load_audio(io.BytesIO(random.Random(5).randbytes(5_000)))
    (tmp_path / "some.txt").write_text("no sound")
    reason = r"some\.txt: is open as text; open it with mode"
    with (tmp_path / "some.txt").open() as file, pytest.raises(AudioError, match=reason):
        load_audio(file)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0, -16_000, 1, 1_999, 10**9])
def test_a_sampling_rate_that_no_sound_has_is_refused(rate: int) -> None:
    with pytest.raises(ValueError, match="give 2000 to"):
        load_audio(bundled_recordings()[0].path, sampling_rate=rate)


def test_recordings_of_many_makers_have_their_known_length(
    shared_audio: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for row in json.loads((shared_audio / "index.json").read_text(encoding="utf-8")):
        samples = load_audio(shared_audio / row["file"])
        assert abs(samples.size / 16_000 - row["seconds"]) < 0.1, row["file"]
    assert not caplog.records
