"""Windows of features: the same of a file as of its samples, and those of the whole."""

from __future__ import annotations

import io
import wave

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.audio.log_mel import MelWindows, log_mel, log_mel_whole
from whisper_flash_attention.errors import AudioError

CPU = torch.device("cpu")
HOP, SECOND = 160, 16_000
SHORTEST = 30 * SECOND + 1


def wave_bytes(size: int, seed: int = 0) -> bytes:
    """Noise whose level rises and falls, at 16 kHz."""
    generator = np.random.default_rng(seed)
    level = np.abs(np.sin(np.arange(size) / 50_000.0)) * 9000
    samples = (generator.standard_normal(size) * level).clip(-32768, 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, SECOND, 0, "NONE", ""))
        writer.writeframes(samples.tobytes())
    return file.getvalue()


def windows(
    audio: AudioSource, mel_bins: int = 80, dtype: torch.dtype = torch.float32
) -> MelWindows:
    return MelWindows(audio, mel_bins=mel_bins, device=CPU, dtype=dtype)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(SHORTEST, 75 * SECOND),
    st.lists(st.integers(0, 3500), max_size=4),
    st.sampled_from([3000, 200]),
)
# The last frame of a block is reflected, and a block of one frame is left.
@example(60 * SECOND + 39, [2999, 1], 3000)
@example(60 * SECOND + 40, [3000, 2999], 3000)
@example(60 * SECOND + 160, [5000], 3000)
def test_a_file_gives_what_its_samples_give(size: int, steps: list[int], length: int) -> None:
    content = wave_bytes(size)
    held, streamed = windows(AudioSource(load_audio(content))), windows(AudioSource(source=content))
    assert held.frames == streamed.frames == size // HOP
    assert held.seconds == streamed.seconds == size / SECOND
    start = 0
    for step in [0, *steps]:
        start = min(start + step, held.frames - 1)
        assert torch.equal(held.window(start, length), streamed.window(start, length))


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("size", [SHORTEST, 60 * SECOND + 39, 60 * SECOND + 41, 70 * SECOND + 77])
def test_features_are_those_of_the_whole_and_zeros_follow(size: int, mel_bins: int) -> None:
    samples = load_audio(wave_bytes(size))
    found = windows(AudioSource(samples), mel_bins)
    whole = log_mel_whole(samples, mel_bins=mel_bins)[0]
    assert found.frames == whole.shape[1]
    torch.testing.assert_close(found.window(0, found.frames), whole, rtol=0, atol=2e-5)
    beyond = found.window(found.frames - 10, 40)
    assert beyond.shape == (mel_bins, 40) and not beyond[:, 10:].any() and beyond[:, :10].any()


@pytest.mark.parametrize("size", [1, 150, 16_001, 480_000])
def test_a_short_recording_is_followed_by_silence(size: int) -> None:
    samples = load_audio(wave_bytes(481_000))[1000 : 1000 + size]
    found = windows(AudioSource(samples))
    assert found.frames == max(1, size // HOP)
    assert torch.equal(found.window(0, 3000), log_mel([samples])[0])


def test_half_precision_is_rounded_once() -> None:
    content = wave_bytes(SHORTEST)
    exact = windows(AudioSource(source=content)).window(500, 3000)
    for audio in (AudioSource(source=content), AudioSource(load_audio(content))):
        half = windows(audio, dtype=torch.float16).window(500, 3000)
        assert torch.equal(half, exact.half())


def test_what_was_passed_is_gone() -> None:
    streamed = windows(AudioSource(source=wave_bytes(100 * SECOND)))
    streamed.window(6100, 3000)
    with pytest.raises(ValueError, match="frame 100 was passed"):
        streamed.window(100, 3000)


def test_samples_that_are_no_sound_are_refused() -> None:
    samples: npt.NDArray[np.float32] = np.zeros(SHORTEST, np.float32)
    samples[-30_000] = np.inf
    with pytest.raises(AudioError, match="not finite"):
        windows(AudioSource(samples))


def test_a_file_that_becomes_shorter_is_an_error(tmp_path) -> None:
    path = tmp_path / "shrinks.wav"
    path.write_bytes(wave_bytes(100 * SECOND))
    streamed = windows(AudioSource(source=path))
    path.write_bytes(wave_bytes(70 * SECOND))
    streamed.window(0, 3000)
    with pytest.raises(AudioError, match=r"shrinks\.wav: became shorter while it was read"):
        streamed.window(6500, 3000)
