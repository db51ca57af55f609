"""Levels of a recording, and what stands out from its noise."""

from __future__ import annotations

import numpy as np
import pytest

from whisper_flash_attention.audio.vad import levels_of, quietest, runs, standing_out

SECOND = 16_000


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    size = round(seconds * SECOND)
    return level * np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_levels_are_decibels_of_full_scale_however_blocks_are_cut() -> None:
    samples = np.concatenate([np.full(1024, 0.1, np.float32), np.zeros(700, np.float32)])
    whole = levels_of(samples)
    assert whole[:2] == pytest.approx([-20, -20], abs=1e-3)
    assert whole.size == 4 and (whole[2:] < -100).all()
    parts = [levels_of(block) for block in (samples[:512], samples[512:1536], samples[1536:])]
    np.testing.assert_allclose(np.concatenate(parts), whole)
    assert levels_of(samples[:0]).size == 0


def test_steady_sound_does_not_stand_out() -> None:
    hum = np.sin(2 * np.pi * 50 * np.arange(5 * SECOND) / SECOND).astype(np.float32)
    for samples in (noise(5, 0.1), noise(5, 1e-4), hum, np.zeros(SECOND, np.float32)):
        assert not any(standing_out(levels_of(samples)))


def test_what_is_louder_than_the_noise_stands_out() -> None:
    samples = np.concatenate([noise(4, 0.002), noise(2, 0.1), noise(4, 0.002)])
    found = runs(standing_out(levels_of(samples)), pause=2)
    assert len(found) == 1
    assert tuple(found[0]) == (pytest.approx(125, abs=1), pytest.approx(188, abs=1))


def test_beside_speech_sound_must_be_about_as_loud() -> None:
    samples = np.concatenate([noise(4, 1e-4), noise(1, 0.005), noise(4, 1e-4), noise(2, 0.1)])
    levels = levels_of(samples)
    speech = np.arange(levels.size) >= 282
    assert not any(standing_out(levels, speech)[:250])
    samples[4 * SECOND : 5 * SECOND] *= 8
    louder = standing_out(levels_of(samples), speech)
    assert sum(louder[:250]) == pytest.approx(31, abs=2)


def test_runs_are_joined_across_short_pauses() -> None:
    flags = np.array([True, False, True, False, False, True])
    assert runs(flags, pause=1).tolist() == [[0, 1], [2, 3], [5, 6]]
    assert runs(flags, pause=2).tolist() == [[0, 3], [5, 6]]
    assert runs(flags, pause=3).tolist() == [[0, 6]]
    assert runs(flags[:0], pause=2).tolist() == runs(~flags[:1], pause=1).tolist() == []


def test_the_quietest_place_is_the_middle_of_a_pause() -> None:
    samples = np.concatenate([noise(3, 0.1), noise(0.5, 0.001), noise(3, 0.1)])
    frame = 30 + quietest(levels_of(samples)[30:200])
    assert 3 < frame * 512 / SECOND < 3.5
    silent = levels_of(np.zeros(10 * SECOND, np.float32))
    assert 290 < quietest(silent[:300]) < 300
    assert quietest(silent[:4]) == 2
