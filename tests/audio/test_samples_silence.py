"""What is no sound: too short for a word, a constant, the noise of rounding to 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from whisper_flash_attention.audio.samples import SHORTEST, is_silence, length_of_silence

STEP = 1 / 32768


def noise(size: int, steps: float) -> np.ndarray:
    """Noise within some steps of 16 bits either way."""
    return np.random.default_rng(0).uniform(-steps, steps, size).astype(np.float32) * np.float32(
        STEP
    )


@pytest.mark.parametrize(
    ("samples", "silent"),
    [
        (np.zeros(0, np.float32), True),
        (noise(16, 9_000), True),
        (noise(SHORTEST - 1, 9_000), True),
        (noise(SHORTEST, 9_000), False),
        (np.zeros(32_000, np.float32), True),
        (np.full(32_000, 0.3, np.float32), True),
        (np.float32(0.3) + noise(32_000, 1), True),
        (np.round(noise(32_000, 1) / STEP).astype(np.float32) * np.float32(STEP), True),
        (noise(32_000, 2), True),
        (noise(32_000, 3), False),
        (np.full(32_000, np.nan, np.float32), False),
    ],
    ids=[
        *("empty", "1 ms", "99 ms", "100 ms", "zeros", "a constant", "a constant and a step"),
        *("a step of 16 bits", "dither", "above dither", "NaN"),
    ],
)
def test_silence_is_what_holds_no_word(samples: np.ndarray, silent: bool) -> None:
    assert is_silence(samples) is silent


def test_a_click_that_a_first_look_at_a_few_samples_misses_is_sound() -> None:
    samples = np.zeros(160_000, np.float32)
    samples[100_001] = 0.1
    assert not is_silence(samples)


def test_no_more_blocks_are_taken_than_tell() -> None:
    taken = []

    def blocks():
        for number in range(9):
            taken.append(number)
            yield noise(SHORTEST, 0 if number < 2 else 9_000)

    assert length_of_silence(blocks()) is None
    assert taken == [0, 1, 2]
    # Levels of different blocks are different sound.
    parts = [np.full(SHORTEST, level, np.float32) for level in (0.0, 0.1)]
    assert length_of_silence(parts) is None
    assert length_of_silence(parts[:1] * 3) == 3 * SHORTEST
