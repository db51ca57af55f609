"""Parts of a recording: the samples that decoding from the beginning gives, or none."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audio.encoding import Samples, wave_bytes, write_channels, write_wave
from whisper_flash_attention.audio import load_audio, parts
from whisper_flash_attention.audio import opener as opener_module
from whisper_flash_attention.audio.audio_source import AudioInput, AudioSource
from whisper_flash_attention.audio.decoder_pool import DecoderPool
from whisper_flash_attention.audio.decoder_process import DecoderProcess
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.audio.parts import (
    LEAST_PARTS,
    MOST_PARTS,
    OVERLAP,
    UNIT,
    InexactPart,
    join_parts,
    part_bounds,
    stream_part,
)
from whisper_flash_attention.errors import AudioError, DecoderError, OptionError

SECONDS = 40
ARGUMENTS: dict[str, Any] = {"block_seconds": 30.0, "sampling_rate": 16_000, "most_seconds": 1e6}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_SHORTEST", 5.0)


@pytest.fixture(scope="module")
def long_speech(speech: Samples) -> Samples:
    """Speech over noise, which never repeats: `[T]` at 16 kHz."""
    noise = np.random.default_rng(0).normal(0, 300, SECONDS * 16_000)
    return (np.resize(speech, SECONDS * 16_000) * 0.5 + noise).astype(np.int16)


def encode(
    path: Path, samples: Samples, codec: str, rate: int, layout: str, **options: str
) -> Path:
    """Encode mono 16 kHz samples `[T]` in frames of the codec's size, as recorders do."""
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate = 16_000
    bit_rate = options.pop("bit_rate", None)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options=options)
        assert isinstance(stream, av.AudioStream)
        if bit_rate:
            stream.bit_rate = int(bit_rate)
        stream.codec_context.open(strict=False)
        size = stream.codec_context.frame_size or 1_024
        resampler = av.AudioResampler(stream.format.name, layout, rate, size)
        at = 0
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            part.pts, part.time_base = at, Fraction(1, rate)
            at += part.samples
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def decoded(
    path: Path, most: int = MOST_PARTS, channel: int | None = None
) -> list[list[np.typing.NDArray[np.float32]]]:
    """Blocks of all parts."""
    *starts, _ = part_bounds(path, None, most)
    ends = [start / 16_000 for start in starts[1:]]
    return [
        list(
            stream_part(
                path, start=start / 16_000, end=end, channel=channel, track=None, **ARGUMENTS
            )
        )
        for start, end in zip(starts, [*ends, None], strict=True)
    ]


def joined(path: Path, channel: int | None = None) -> np.typing.NDArray[np.float32]:
    return np.concatenate(join_parts(decoded(path, channel=channel)))


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout", "options"),
    [
        ("a.wav", "pcm_s16le", 16_000, "mono", {}),
        ("a.wav", "pcm_mulaw", 8_000, "mono", {}),
        ("a.wav", "pcm_f32le", 48_000, "stereo", {}),
        ("a.aiff", "pcm_s24be", 44_100, "stereo", {}),
        ("a.w64", "pcm_s16le", 11_025, "mono", {}),
        ("a.flac", "flac", 16_000, "mono", {}),
        ("a.flac", "flac", 44_100, "stereo", {}),
        ("a.flac", "flac", 96_000, "5.1", {}),
        ("a.mp3", "mp3", 44_100, "stereo", {"bit_rate": "128000"}),
        ("a.mp3", "mp3", 22_050, "mono", {"bit_rate": "32000"}),
        ("a.mp3", "mp3", 48_000, "stereo", {"q": "4"}),
        ("a.m4a", "aac", 44_100, "stereo", {"aac_pns": "0", "bit_rate": "96000"}),
        ("a.mp4", "aac", 48_000, "mono", {"aac_pns": "0"}),
        ("a.m4a", "aac", 44_100, "5.1", {"aac_pns": "0"}),
        ("a.m4a", "alac", 32_000, "stereo", {}),
    ],
)
def test_parts_are_the_whole_bit_by_bit(
    tmp_path: Path,
    long_speech: Samples,
    name: str,
    codec: str,
    rate: int,
    layout: str,
    options: dict[str, str],
) -> None:
    path = encode(tmp_path / name, long_speech, codec, rate, layout, **options)
    np.testing.assert_array_equal(joined(path), load_audio(path))


def test_parts_of_one_channel(tmp_path: Path, long_speech: Samples) -> None:
    channels = np.stack([long_speech, long_speech[::-1]])
    write_wave(tmp_path / "two.wav", channels, 16_000)
    for channel in (None, 1, 2):
        found = joined(tmp_path / "two.wav", channel)
        np.testing.assert_array_equal(found, load_audio(tmp_path / "two.wav", channel=channel))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([8_000, 16_000, 22_050, 44_100, 48_000, 96_000, 25 * 457]), st.data())
def test_parts_of_any_rate_and_length(
    tmp_path_factory: pytest.TempPathFactory, rate: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(42 * rate, 60 * rate))
    path = tmp_path_factory.mktemp("rate") / "noise.wav"
    noise = np.random.default_rng(count).integers(-3_000, 3_000, count).astype(np.int16)
    write_wave(path, noise[None], rate)
    np.testing.assert_array_equal(joined(path), load_audio(path))


@pytest.mark.parametrize("free", [0, 1, 3])
def test_few_processes_decode_no_parts(tmp_path: Path, long_speech: Samples, free: int) -> None:
    write_wave(tmp_path / "a.wav", long_speech[None], 16_000)
    assert part_bounds(tmp_path / "a.wav", None, free) == []


def test_parts_are_about_as_long(tmp_path: Path, long_speech: Samples) -> None:
    write_wave(tmp_path / "a.wav", long_speech[None], 16_000)
    for free in (4, 5, 16):
        *starts, size = part_bounds(tmp_path / "a.wav", None, free)
        assert size == long_speech.size
        assert LEAST_PARTS <= len(starts) <= min(free, MOST_PARTS)
        assert starts == list(range(0, starts[-1] + 1, starts[1]))
        assert starts[1] % UNIT == 0 and 0 < long_speech.size - starts[-1] <= starts[1] + UNIT


def test_short_ones_and_other_formats_are_decoded_whole(
    tmp_path: Path, speech: Samples, long_speech: Samples
) -> None:
    write_wave(tmp_path / "short.wav", speech[None], 16_000)
    write_wave(tmp_path / "odd.wav", long_speech[None], 16_001)
    opus = encode(tmp_path / "a.opus", long_speech, "libopus", 48_000, "mono")
    matroska = encode(tmp_path / "a.mkv", long_speech, "flac", 48_000, "mono")
    for path in (tmp_path / "short.wav", tmp_path / "odd.wav", opus, matroska):
        assert part_bounds(path, None, 8) == []
    with pytest.raises(AudioError, match="there is no such file"):
        part_bounds(tmp_path / "missing.wav", None, 8)


def test_noise_that_a_decoder_makes_up_is_noticed(tmp_path: Path, long_speech: Samples) -> None:
    """AAC's noise substitution: random numbers that go on from the beginning."""
    path = encode(tmp_path / "a.m4a", long_speech, "aac", 44_100, "stereo", bit_rate="64000")
    with pytest.raises(InexactPart, match="makes up noise"):
        joined(path)


def test_noise_away_from_where_parts_meet_is_noticed(tmp_path: Path) -> None:
    """A tone, of which no encoder makes noise, and noise in the middle of each part."""
    rate, time = 16_000, np.arange(60 * 16_000) / 16_000
    samples = 6_000 * np.sin(2 * np.pi * 440 * time)
    noise = np.random.default_rng(3).normal(0, 3_000, samples.size)
    second = (time % (2 * UNIT / rate) > 1.0) & (time % (2 * UNIT / rate) < 4.0)
    samples[second] = noise[second]
    path = encode(tmp_path / "a.m4a", samples.astype(np.int16), "aac", 44_100, "mono")
    with pytest.raises(InexactPart, match="makes up noise"):
        joined(path)


@pytest.mark.parametrize(
    ("rate", "layout", "bit_rate"),
    [(16_000, "mono", "24000"), (48_000, "stereo", "64000")],
)
def test_a_second_decoder_gives_other_noise_and_the_same_sound(
    tmp_path: Path, long_speech: Samples, rate: int, layout: str, bit_rate: str
) -> None:
    options = {"bit_rate": bit_rate, "aac_pns": "0"}
    path = encode(tmp_path / "a.m4a", long_speech, "aac", rate, layout, **options)
    np.testing.assert_array_equal(joined(path), load_audio(path))
    options["aac_pns"] = "1"
    path = encode(tmp_path / "a.m4a", long_speech, "aac", rate, layout, **options)
    with pytest.raises(InexactPart, match="makes up noise"):
        joined(path)


@pytest.mark.parametrize(
    "arguments", [{"track": 0}, {"track": 1.5}, {"channel": 0}, {"channel": -1}]
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path, long_speech: Samples, arguments: dict[str, Any]
) -> None:
    path = _written(tmp_path / "a.wav", long_speech)
    chosen = {"channel": None, "track": None} | arguments
    with pytest.raises(OptionError):
        list(stream_part(path, start=10.24, end=20.48, **chosen, **ARGUMENTS))
    if "track" in arguments:
        with pytest.raises(OptionError):
            part_bounds(path, arguments["track"], 8)


@pytest.mark.parametrize("change", ["lost", "twice"])
def test_a_frame_that_is_lost_in_a_steady_tone_is_noticed(tmp_path: Path, change: str) -> None:
    """Parts would be equal where they meet, whatever is between."""
    rate = 44_100
    tone = (8_000 * np.sin(2 * np.pi * np.arange(SECONDS * rate) / 64)).astype(np.int16)
    with av.open(tmp_path / "a.flac", "w") as container:
        stream = container.add_stream("flac", rate=rate, layout="mono")
        stream.codec_context.open(strict=False)
        for number, start in enumerate(range(0, tone.size, 4_096)):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 4_096], "s16", "mono")
            frame.sample_rate, frame.pts = rate, start
            packets = stream.encode(frame)
            if number != 100 or change == "twice":
                container.mux(packets)
            if number == 100 and change == "twice":
                container.mux(packets)
        container.mux(stream.encode(None))
    try:
        found = joined(tmp_path / "a.flac")
    except (InexactPart, AudioError):
        return
    np.testing.assert_array_equal(found, load_audio(tmp_path / "a.flac"))


def test_aac_of_eight_channels_is_decoded_whole(tmp_path: Path, long_speech: Samples) -> None:
    path = encode(tmp_path / "a.m4a", long_speech, "aac", 16_000, "7.1", aac_pns="0")
    with pytest.raises(InexactPart, match="too many channels"):
        joined(path)


def test_silence_where_parts_meet_proves_nothing(tmp_path: Path, long_speech: Samples) -> None:
    samples = long_speech.copy()
    second = part_bounds(_written(tmp_path / "a.wav", samples), None, 8)[1]
    samples[second - OVERLAP : second] = 0
    with pytest.raises(InexactPart, match="no sound"):
        joined(_written(tmp_path / "a.wav", samples))
    samples[second - 1] = 1
    np.testing.assert_array_equal(
        joined(_written(tmp_path / "a.wav", samples)), load_audio(tmp_path / "a.wav")
    )


def _written(path: Path, samples: Samples) -> Path:
    write_wave(path, samples[None], 16_000)
    return path


def test_channels_that_cancel_each_other_are_noticed(tmp_path: Path, long_speech: Samples) -> None:
    inverted = np.stack([long_speech, long_speech])
    inverted[1, 200_000:260_000] *= -1
    write_channels(tmp_path / "a.wav", inverted, 16_000)
    with pytest.raises(InexactPart, match="cancel each other"):
        joined(tmp_path / "a.wav")


@pytest.mark.parametrize(("codec", "name"), [("flac", "a.flac"), ("aac", "a.m4a")])
def test_damage_is_noticed(tmp_path: Path, long_speech: Samples, codec: str, name: str) -> None:
    options = {"aac_pns": "0"} if codec == "aac" else {}
    path = encode(tmp_path / name, long_speech, codec, 44_100, "mono", **options)
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    data[at : at + 4_000] = bytes(4_000)
    path.write_bytes(data)
    with pytest.raises(InexactPart):
        joined(path)
    path.write_bytes(data[: 2 * len(data) // 3])  # cut off, as well
    with pytest.raises((InexactPart, AudioError)):
        joined(path)


def test_a_stretch_that_comes_twice_is_noticed(tmp_path: Path, long_speech: Samples) -> None:
    """Its time stamps lead to the second copy, and what lies between would be left out."""
    path = encode(tmp_path / "a.flac", long_speech, "flac", 16_000, "mono")
    data = path.read_bytes()
    for at in range(len(data) // 5, len(data), len(data) // 5):
        path.write_bytes(data[:at] + data[at // 2 : at] + data[at:])
        try:
            found = joined(path)
        except InexactPart:
            continue
        np.testing.assert_array_equal(found, load_audio(path))


KINDS = [
    ("a.wav", "pcm_s16le", 16_000, {}),
    ("a.aiff", "pcm_s16be", 22_050, {}),
    ("a.flac", "flac", 16_000, {}),
    ("a.mp3", "mp3", 16_000, {"bit_rate": "24000"}),
    ("a.m4a", "aac", 44_100, {"aac_pns": "0"}),
    ("a.m4a", "aac", 16_000, {}),
    ("a.m4a", "alac", 16_000, {}),
]


def mutate(data: bytes, numbers: random.Random) -> bytes:
    """Change, leave out, add or repeat bytes at up to three places, often in the header."""
    changed = bytearray(data)
    for _ in range(numbers.randint(0, 3)):
        at = numbers.randrange(len(changed) if numbers.random() < 0.6 else 4_000)
        size = numbers.choice((1, 1, 4, 200, 5_000))
        kind = numbers.randrange(4)
        if kind == 0:
            changed[at : at + size] = numbers.randbytes(len(changed[at : at + size]))
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = numbers.randbytes(size)
        else:
            changed[at:at] = changed[max(0, at - 50 * size) : at]
    return bytes(changed)


@pytest.mark.parametrize("count", [5, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "codec", "rate", "options"), KINDS)
def test_any_damage_gives_the_samples_of_the_whole_or_none(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    long_speech: Samples,
    name: str,
    codec: str,
    rate: int,
    options: dict[str, str],
    count: int,
) -> None:
    path = encode(tmp_path / name, long_speech, codec, rate, "mono", **options)
    data, numbers = path.read_bytes(), random.Random(count)
    for _ in range(count):
        path.write_bytes(mutate(data, numbers))
        try:
            found = joined(path) if part_bounds(path, None, MOST_PARTS) else None
        except (InexactPart, AudioError):
            continue
        if found is not None:
            caplog.clear()
            np.testing.assert_array_equal(found, load_audio(path))
            assert not caplog.records


# In processes.

LONG, LONGER = 605, 700  # seconds


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(LEAST_PARTS) as pool:
        yield pool


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of requests that processes get."""
    found: list[str] = []
    stream = DecoderPool.stream

    def noted(self: DecoderPool, request: Any, **options: Any) -> Any:
        found.append("part" if request.is_part else "bounds" if request.most_parts else "all")
        return stream(self, request, **options)

    monkeypatch.setattr(DecoderPool, "stream", noted)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that is just long enough."""
    noise = np.random.default_rng(1).integers(-9_000, 9_000, 8_000 * LONG).astype(np.int16)
    write_wave(found := tmp_path_factory.mktemp("long") / "a.wav", noise[None], 8_000)
    return found


@pytest.fixture(scope="module")
def long_flac(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    noise = np.random.default_rng(2).integers(-99, 99, 16_000 * LONGER).astype(np.int16)
    path = tmp_path_factory.mktemp("long") / "a.flac"
    return encode(path, noise, "flac", 16_000, "mono").read_bytes()


@pytest.mark.parametrize("held", [700.0, 30.0])
def test_processes_decode_one_recording_side_by_side(
    path: Path, pool: DecoderPool, requests: list[str], held: float
) -> None:
    with AudioOpener(pool, held_seconds=held, long_seconds=700.0, least_bytes=0) as opener:
        [found] = opener.open_each([AudioInput(path)])
        source = found.result()
        assert isinstance(source, AudioSource)
        assert (source.samples is None) == (held < LONG)
        np.testing.assert_array_equal(source.whole(), load_audio(path))
    assert requests == ["bounds", *["part"] * LEAST_PARTS]


def test_what_cannot_be_held_is_not_decoded_in_parts(
    path: Path, pool: DecoderPool, requests: list[str]
) -> None:
    with AudioOpener(pool, held_seconds=30.0, long_seconds=600.0, least_bytes=0) as opener:
        [found] = opener.open_each([AudioInput(path)])
        source = found.result()
        assert isinstance(source, AudioSource) and source.samples is None
        np.testing.assert_array_equal(source.whole(), load_audio(path))
    assert requests == ["bounds", "all", "all"]


def test_several_share_an_opener(
    tmp_path: Path, path: Path, long_flac: bytes, pool: DecoderPool
) -> None:
    """Of recordings that cannot be decoded in parts, too: none waits for a process for ever."""
    cut = tmp_path / "cut.flac"
    cut.write_bytes(long_flac[: 3 * len(long_flac) // 4])
    inputs = [AudioInput(each) for each in (cut, path, cut)]
    with AudioOpener(pool, least_bytes=0) as opener, ThreadPoolExecutor(3) as threads:

        def count(_: int) -> int:
            return sum(found.error is None for found in opener.open_each(inputs, ahead_seconds=0.0))

        assert list(threads.map(count, range(3), timeout=60.0)) == [3, 3, 3]


def test_each_of_several_is_there_in_its_order(
    path: Path, pool: DecoderPool, requests: list[str]
) -> None:
    """The first may take all processes; those after it take turns, however many wait."""
    whole = load_audio(path)
    with AudioOpener(pool, least_bytes=0) as opener:
        for found in opener.open_each([AudioInput(path)] * 4, ahead_seconds=0.0):
            np.testing.assert_array_equal(found.result().whole(), whole)  # type: ignore[union-attr]
    assert requests.count("part") % LEAST_PARTS == 0


def test_one_process_decodes_what_parts_cannot(
    tmp_path: Path,
    long_flac: bytes,
    caplog: pytest.LogCaptureFixture,
    pool: DecoderPool,
    requests: list[str],
) -> None:
    """A recording that was cut off: the samples and the warning of `load_audio`."""
    path = tmp_path / "cut.flac"
    path.write_bytes(long_flac[: 3 * len(long_flac) // 4])
    with AudioOpener(pool, least_bytes=0) as opener:
        [found] = opener.open_each([AudioInput(path)])
        source = found.result()
    assert requests == ["bounds", *["part"] * LEAST_PARTS, "all"]
    [warning] = (record.getMessage() for record in caplog.records)
    caplog.clear()
    np.testing.assert_array_equal(source.whole(), load_audio(path))  # type: ignore[union-attr]
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_an_opener_without_parts(path: Path, pool: DecoderPool, requests: list[str]) -> None:
    with AudioOpener(pool, in_parts=False, least_bytes=0) as opener:
        [found] = opener.open_each([AudioInput(path)])
        assert found.result().whole().size == LONG * 16_000  # type: ignore[union-attr]
    assert requests == ["all"]


def test_closing_ends_parts(path: Path, pool: DecoderPool, requests: list[str]) -> None:
    """Whoever waits for them gets an error, not samples of half a recording."""
    opener = AudioOpener(pool, least_bytes=0)
    opening = opener.open_each([AudioInput(path)])
    closer = threading.Timer(0.05, opener.close)
    closer.start()
    try:
        source = next(opening).result()
    except DecoderError:
        pass
    else:  # it was faster
        np.testing.assert_array_equal(source.whole(), load_audio(path))  # type: ignore[union-attr]
    finally:
        closer.join()
        opening.close()


def test_a_recording_that_is_longer_than_it_states_is_not_held_in_parts(
    tmp_path: Path, long_flac: bytes, pool: DecoderPool, requests: list[str]
) -> None:
    path, data = tmp_path / "a.flac", bytearray(long_flac)
    at = data.index(b"fLaC") + 8 + 13  # the length in samples, in 36 bits
    data[at] &= 0xF0
    data[at + 1 : at + 5] = (16_000 * 601).to_bytes(4, "big")
    path.write_bytes(data)
    with AudioOpener(pool, held_seconds=650.0, long_seconds=0.0, least_bytes=0) as opener:
        [found] = opener.open_each([AudioInput(path)])
        source = found.result()
        assert isinstance(source, AudioSource) and source.samples is None
        assert sum(map(len, source.blocks())) == 16_000 * LONGER
    assert requests == ["bounds", *["part"] * LEAST_PARTS, "all", "all"]


def test_any_error_of_parts_leads_to_one_process(
    path: Path, monkeypatch: pytest.MonkeyPatch, pool: DecoderPool, requests: list[str]
) -> None:
    def fail(parts: object) -> None:
        raise IndexError("index 8 is out of bounds")

    monkeypatch.setattr(opener_module, "join_parts", fail)
    with AudioOpener(pool, least_bytes=0) as opener:
        [found] = opener.open_each([AudioInput(path)])
        np.testing.assert_array_equal(found.result().whole(), load_audio(path))  # type: ignore[union-attr]
        wrong = opener.open_each([AudioInput(path, track=-1), AudioInput(path, channel=0)])
        assert [type(each.error) for each in wrong] == [OptionError] * 2
    assert requests[: LEAST_PARTS + 2] == ["bounds", *["part"] * LEAST_PARTS, "all"]


@pytest.mark.parametrize("in_parts", [True, False])
def test_a_recording_that_fails_gives_its_room_back(
    tmp_path: Path, pool: DecoderPool, in_parts: bool
) -> None:
    """While its error is kept."""
    bad = np.zeros(8_000 * LONG, "<f4")
    bad[::7], bad[-1] = 0.25, np.nan
    data = wave_bytes(bad.tobytes(), channels=1, rate=8_000, bits=32, kind=3)
    (tmp_path / "bad.wav").write_bytes(data)
    with AudioOpener(
        pool, in_parts=in_parts, held_seconds=30.0, long_seconds=700.0, least_bytes=0
    ) as opener:
        [found] = opener.open_each([AudioInput(tmp_path / "bad.wav")])
        assert "not finite" in str(found.error)
        assert opener._budget.take(16_000 * 660)


def test_a_decoder_that_dies_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, pool: DecoderPool
) -> None:
    """And not a reason to let it die once more."""
    take = DecoderProcess.take

    def killed(self: DecoderProcess, *block: int) -> Any:
        self.kill()
        return take(self, *block)

    with AudioOpener(pool, least_bytes=0) as opener:
        monkeypatch.setattr(DecoderProcess, "take", killed)
        [found] = opener.open_each([AudioInput(path)])
        with pytest.raises(AudioError, match="was killed"):
            found.result()
