"""How channels become one."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audio.encoding import Samples, write_channels, write_wave
from whisper_flash_attention.audio import load_audio, stream_audio
from whisper_flash_attention.audio.samples import ChannelMixer, mix_weights
from whisper_flash_attention.errors import AudioError, OptionError

SIDE_5_1 = ("FL", "FR", "FC", "LFE", "SL", "SR")


def noise(*shape: int, seed: int = 0, scale: float = 0.2) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("FL", "FR"), [1 / 2, 1 / 2]),
        (("NONE",) * 6, [1 / 6] * 6),
        (("FL", "FR", "LFE"), [1 / 2, 1 / 2, 0]),
        (("LFE",), [1]),
        (("FL", "FR", "something new"), [1 / 3, 1 / 3, 1 / 3]),
        (("AMBI0", "AMBI1", "AMBI2", "AMBI3"), [1, 0, 0, 0]),
        (SIDE_5_1, np.array([0.7071, 0.7071, 1, 0, 0.5, 0.5]) / (2.4142 + 1)),
    ],
)
def test_weights_are_those_of_the_channels_places(
    names: tuple[str, ...], weights: list[float]
) -> None:
    np.testing.assert_allclose(mix_weights(names), weights, atol=1e-4)


@given(st.integers(2, 8), st.integers(0, 99))
def test_a_mix_cannot_clip(channels: int, seed: int) -> None:
    samples = np.sign(noise(500, channels, seed=seed))
    names = ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR")[:channels]
    assert np.abs(ChannelMixer().mix(samples, names)).max() <= 1 + 1e-6


def test_dialogue_in_the_centre_is_louder_than_in_a_mean(tmp_path: Path, speech: Samples) -> None:
    music = np.stack([noise(speech.size, seed=each, scale=3000) for each in range(6)])
    channels = music.astype(np.int16)
    channels[2], channels[3] = speech, 30_000  # low-frequency effects that would drown all
    write_channels(tmp_path / "film.wav", channels, 16_000, mask=0x3F)
    samples = load_audio(tmp_path / "film.wav")
    assert abs(samples.mean()) < 0.01
    share = np.dot(samples, speech) / np.dot(speech.astype(float), speech) * 32_768
    assert share == pytest.approx(1 / 3.414, rel=0.05)


@pytest.mark.parametrize("mirrored", [-1.0, -0.95])
def test_where_channels_cancel_each_other_one_is_used(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture, mirrored: float
) -> None:
    path = tmp_path / "opposite.wav"
    write_wave(path, np.stack([speech, (mirrored * speech).astype(np.int16)]), 16_000)
    np.testing.assert_array_equal(load_audio(path), speech / np.float32(32_768))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "opposite.wav: its channels cancel each other for 7.1 s" in record.getMessage()


def test_only_where_they_cancel_each_other(
    tmp_path: Path, speech: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "partly.wav"
    other = noise(3, speech.size, seed=3, scale=2000).astype(np.int16)
    left = np.concatenate([other[0], speech, other[1]])
    right = np.concatenate([other[0], -speech, other[2]])
    write_wave(path, np.stack([left, right]), 16_000)
    samples = load_audio(path) * 32_768
    size = speech.size
    np.testing.assert_array_equal(samples[: size - 16_384], other[0][: size - 16_384])
    np.testing.assert_array_equal(
        samples[size + 16_384 : 2 * size - 16_384], speech[16_384:-16_384]
    )
    end = (other[1].astype(float) + other[2]) / 2
    np.testing.assert_array_equal(samples[2 * size + 16_384 :], end[16_384:])
    assert len(caplog.records) == 1


def test_the_choice_is_the_same_in_every_pass(tmp_path: Path, speech: Samples) -> None:
    path = tmp_path / "partly.wav"
    left = np.concatenate([speech] * 3)
    right = np.concatenate([speech, -speech, speech[::-1]])
    write_wave(path, np.stack([left, right]), 16_000)
    whole = load_audio(path)
    for start, block in ((0.0, 0.3), (7.5, 5.0), (9.9, 30.0), (15.0, 1.0)):
        part = np.concatenate(list(stream_audio(path, start=start, block_seconds=block)))
        np.testing.assert_array_equal(part, whole[round(start * 16_000) :])


@pytest.mark.parametrize("quiet", [0.0, 1e-5])
def test_sides_that_differ_are_mixed(quiet: float) -> None:
    left, right = noise(5_000), noise(5_000, seed=1)
    for pair in ((left, right), (left, quiet * right), (left * quiet, -left * quiet)):
        mixer = ChannelMixer()
        samples = np.stack(pair, axis=1)
        np.testing.assert_array_equal(mixer.mix(samples, ("FL", "FR")), samples.sum(axis=1) / 2)
        assert mixer.replaced == 0


def test_one_channel_is_read_alone(tmp_path: Path, speech: Samples) -> None:
    path = tmp_path / "call.wav"
    write_wave(path, np.stack([speech, speech[::-1]]), 16_000)
    np.testing.assert_array_equal(load_audio(path, channel=1), speech / np.float32(32_768))
    np.testing.assert_array_equal(load_audio(path, channel=2), speech[::-1] / np.float32(32_768))
    blocks = stream_audio(path, channel=2, start=1.0, block_seconds=1.0)
    expected = speech[::-1][16_000:] / np.float32(32_768)
    np.testing.assert_array_equal(np.concatenate(list(blocks)), expected)


def test_a_channel_that_is_not_there_is_an_error_that_lists_what_is(
    tmp_path: Path, speech: Samples
) -> None:
    path = tmp_path / "call.wav"
    write_wave(path, np.stack([speech, speech]), 8_000)
    with pytest.raises(AudioError) as caught:
        load_audio(path, channel=3)
    head, found = str(caught.value).split("; its audio tracks are ")
    assert head == f"{path}: there is no channel 3"
    assert found.startswith("1: pcm_s16le, no language, 2 channels")
    assert "8000 Hz" in found
    for wrong in (0, -1, True, 1.5, "1"):
        with pytest.raises(OptionError, match=r"channel is .*: give a whole number"):
            load_audio(path, channel=wrong)  # type: ignore[arg-type]


def test_a_channel_that_ends_is_silent_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    mixer = ChannelMixer(2)
    two, one = noise(100, 2), noise(50, 1)
    np.testing.assert_array_equal(mixer.mix(two, ("FL", "FR")), two[:, 1])
    np.testing.assert_array_equal(mixer.mix(one, ("FC",)), np.zeros(50))
    assert mixer.missing == 50
