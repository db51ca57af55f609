"""Damage, odd formats, and bounds on what a recording may become."""

from __future__ import annotations

import io
import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audio.encoding import Samples, encode, wave_bytes, write_wave
from tests.audio.mutations import attack
from whisper_flash_attention.audio import audio_source, load_audio, stream_audio
from whisper_flash_attention.audio.container import OpenedContainer
from whisper_flash_attention.audio.decode import Decoding
from whisper_flash_attention.errors import AudioError

CASES = Path(__file__).resolve().parents[1] / "data" / "cases"


@pytest.mark.parametrize(
    ("name", "seconds", "sound"),
    [
        ("one_packet_ff.m4a", 10.9, 10.9),
        ("flipped_bits.m4a", 11.0, 9.3),
        ("lost_packets.ts", 11.0, 10.6),
    ],
)
def test_what_a_decoder_cannot_decode_is_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture, name: str, seconds: float, sound: float
) -> None:
    samples = load_audio(CASES / name)
    assert samples.size / 16_000 == pytest.approx(seconds, abs=0.2)
    assert np.count_nonzero(samples) / 16_000 > sound - 1.0
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{name}: is damaged or cut off: " in record.getMessage()


@pytest.mark.parametrize("codec", ["aac", "alac", "mp3", "ac3", "flac", "libopus"])
def test_a_destroyed_packet_of_any_codec_costs_that_packet(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    path = encode(tmp_path / "one.mkv", speech, codec=codec, rate=48_000, layout="mono")
    whole = load_audio(path)
    with av.open(path) as container:
        packets = [bytes(packet) for packet in container.demux() if packet.size]
    data = path.read_bytes()
    for packet in packets[len(packets) // 2 :][:3]:
        at = data.index(packet)
        data = data[:at] + b"\xff" * len(packet) + data[at + len(packet) :]
    assert not caplog.records
    samples = load_audio(data)
    assert samples.size == pytest.approx(whole.size, abs=0.45 * 16_000)
    assert len(caplog.records) <= 1  # decoders conceal some damage
    assert np.abs(samples[16_000:48_000] - whole[16_000:48_000]).max() < 1e-3


def test_an_error_of_the_container_in_the_middle_is_damage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from whisper_flash_attention.audio import decode

    class Container:
        """Fails once in the middle of a recording."""

        def __init__(self, container: av.container.InputContainer) -> None:
            self._container, self._failures = container, 1

        def __getattr__(self, name: str) -> object:
            return getattr(self._container, name)

        def demux(self) -> object:
            for number, packet in enumerate(self._container.demux()):
                if number == 50 and self._failures:
                    self._failures -= 1
                    raise av.InvalidDataError(1, "a broken page")
                yield packet

    run = decode.Decoding.run

    def failing(self: object, recording: object, stream: object) -> object:
        import dataclasses

        broken = Container(recording.container)  # type: ignore[attr-defined]
        return run(self, dataclasses.replace(recording, container=broken), stream)  # type: ignore

    whole = load_audio(CASES / "gap.webm")
    monkeypatch.setattr(decode.Decoding, "run", failing)
    assert load_audio(CASES / "gap.webm").size == whole.size
    [record] = caplog.records
    assert "1 of its 550 packets are damaged" in record.getMessage()


# Each ran PyAV beyond the planes of a frame, which ends the process.
MANY_CHANNELS = (
    ("pcm.wav", "pcm_s16le", "7.1"),
    ("flac.flac", "flac", "7.1"),
    ("alac.m4a", "alac", "7.1(wide)"),
    ("aac.m4a", "aac", "7.1"),
    ("alac.caf", "alac", "7.1(wide)"),
    ("pcm.caf", "pcm_s16le", "7.1"),
    ("floats.mka", "pcm_f32le", "hexadecagonal"),
    ("opus.opus", "libopus", "7.1"),
)


def test_many_channels_do_not_end_the_process(tmp_path: Path, speech: Samples) -> None:
    short = speech[: 2 * 16_000]
    paths = [
        encode(tmp_path / name, short, codec=codec, rate=48_000, layout=layout)
        for name, codec, layout in MANY_CHANNELS
    ]
    expected = pytest.approx(short.size, abs=800)
    assert sizes_in_a_process(paths) == [expected] * len(paths)


def test_more_channels_than_any_layout_has_do_not_end_the_process(tmp_path: Path) -> None:
    paths = []
    for channels in (8, 9, 16, 32, 63, 64, 65, 255, 1000):
        data = b"\1\2" * (1600 * channels)
        paths.append(tmp_path / f"{channels}.wav")
        paths[-1].write_bytes(wave_bytes(data, channels=channels, rate=16_000))
    assert sizes_in_a_process(paths) == [1600] * 6 + [None] * 3
    with pytest.raises(AudioError, match="has 65 channels; 1 to 64 can be read"):
        load_audio(tmp_path / "65.wav")


def sizes_in_a_process(paths: list[Path]) -> list[int | None]:
    """Samples of each recording, None for an error, as read in another process.

    A process that ends early has printed one line for every recording before.
    """
    code = (
        "import sys\n"
        "from whisper_flash_attention.audio import load_audio\n"
        "from whisper_flash_attention.errors import AudioError\n"
        "def size(path):\n"
        "    try:\n"
        "        return load_audio(path).size\n"
        "    except AudioError:\n"
        "        return None\n"
        "for path in sys.argv[1:]:\n"
        "    print(size(path), flush=True)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True
    )
    assert run.returncode == 0, run
    return [None if line == "None" else int(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(("bits", "kind"), [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_samples_of_every_width_are_read(bits: int, kind: int, channels: int) -> None:
    data = b"\0" * (bits // 8 * channels * 480)
    samples = load_audio(wave_bytes(data, channels=channels, rate=16_000, bits=bits, kind=kind))
    assert samples.size == 480


@pytest.mark.parametrize("rate", [1, 100, 1_999, 3_072_001, 10**7, 2**31 - 1])
def test_a_sampling_rate_that_no_sound_has_is_an_error(rate: int) -> None:
    data = wave_bytes(b"\1\2" * 16_000, channels=1, rate=rate)
    with pytest.raises(AudioError, match=f"has a sampling rate of {rate} Hz; 2000 to 3072000"):
        load_audio(data)


@pytest.mark.parametrize("rate", [2_000, 8_000, 384_000])
def test_rates_of_telephones_and_studios_are_read(rate: int) -> None:
    samples = load_audio(wave_bytes(b"\1\2" * rate, channels=1, rate=rate))
    assert samples.size == pytest.approx(16_000, abs=2)


def test_a_recording_that_goes_on_for_too_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wave(tmp_path / "long.wav", np.zeros((1, 80_000), np.int16), 16_000)
    blocks = stream_audio(tmp_path / "long.wav", block_seconds=1.0, most_seconds=3.6)
    assert len(next(blocks)) == 16_000
    with pytest.raises(AudioError, match=r"long\.wav: is longer than 0\.001 hours; split it"):
        list(blocks)
    monkeypatch.setattr(audio_source, "MOST_SECONDS_HELD", 3.6)
    with pytest.raises(AudioError, match=r"is longer than 0\.001 hours"):
        load_audio(tmp_path / "long.wav")


def test_silence_in_few_bytes_are_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "night.flac"
    encode(path, np.zeros(16_000 * 120, np.int16), codec="flac", rate=16_000, layout="mono")
    assert path.stat().st_size < 100_000  # a fortieth
    assert sum(block.size for block in stream_audio(path)) == 16_000 * 120


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(
        [
            ("a.wav", "pcm_s16le", "stereo"),
            ("a.wav", "pcm_u8", "5.1"),
            ("a.flac", "flac", "mono"),
            ("a.mp3", "mp3", "stereo"),
            ("a.m4a", "aac", "5.1"),
            ("a.mka", "libopus", "mono"),
            ("a.ts", "mp2", "stereo"),
        ]
    ),
    rate=st.sampled_from([16_000, 44_100, 48_000]),
    target=st.sampled_from([8_000, 16_000, 22_050]),
    start=st.floats(0, 2),
    block=st.floats(0.01, 3),
    channel=st.sampled_from([None, 1]),
)
def test_blocks_are_the_whole_in_every_format(
    tmp_path_factory: pytest.TempPathFactory,
    speech: Samples,
    kind: tuple[str, str, str],
    rate: int,
    target: int,
    start: float,
    block: float,
    channel: int | None,
) -> None:
    name, codec, layout = kind
    rate = 48_000 if codec == "libopus" else rate
    folder = tmp_path_factory.getbasetemp() / f"{codec}-{rate}-{layout}"
    if not folder.exists():
        folder.mkdir()
        encode(folder / name, speech[:48_000], codec=codec, rate=rate, layout=layout)
    whole = load_audio(folder / name, target, channel=channel)
    options = {"sampling_rate": target, "start": start, "block_seconds": block, "channel": channel}
    blocks = list(stream_audio(folder / name, **options))  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.concatenate(blocks), whole[round(start * target) :])


def test_noise_that_a_decoder_takes_for_sound_is_refused() -> None:
    draw = random.Random(0)
    with pytest.raises(AudioError):
        load_audio(io.BytesIO(b"\xff\xfb\x90\x64" + draw.randbytes(30_000)))


def test_mutated_recordings_give_samples_or_an_error() -> None:
    outcomes, faults = attack(200, seed=3)
    assert not faults
    assert min(outcomes["samples"], outcomes["AudioError"]) > 25


@pytest.mark.slow
def test_many_mutated_recordings_give_samples_or_an_error() -> None:
    _, faults = attack(5_000, seed=4)
    assert not faults


def test_a_stream_that_appears_on_the_way_ends_nothing_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyAV then raises an IndexError after the last packet."""

    class Demuxed:
        def __init__(self, container: Any) -> None:
            self._container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

        def demux(self) -> Iterator[Any]:
            yield from self._container.demux()
            raise IndexError("list index out of range")

    run = Decoding.run

    def run_on(decoding: Decoding, recording: OpenedContainer, stream: Any) -> Iterator[Samples]:
        demuxed: Any = Demuxed(recording.container)
        return run(decoding, replace(recording, container=demuxed), stream)

    monkeypatch.setattr(Decoding, "run", run_on)
    write_wave(tmp_path / "a.wav", np.ones((1, 8_000), np.int16), 16_000)
    assert load_audio(tmp_path / "a.wav").size == 8_000
