"""`benchmarks/generate.py cpu`: ratios of times, and the samples it runs on."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scripts.loading import load_script

generate: Any = load_script("generate")


def test_ratios_of_medians_and_of_pairs() -> None:
    ratios = generate.ratios([1.0, 2.0, 10.0], [0.9, 1.2, 1.0])
    assert ratios["ratio_of_medians"] == pytest.approx(1.0 / 2.0)
    assert ratios["median_of_ratios"] == pytest.approx(1.2 / 2.0)


def test_samples_are_cut_and_padded(tmp_path: Path) -> None:
    path = tmp_path / "one.wav"
    ramp = np.arange(16000, dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(ramp.tobytes())
    longer = generate.read_samples(path, 2.0)
    assert longer.size == 32000 and longer.dtype == np.float32
    assert np.array_equal(longer[:16000], ramp / np.float32(32768))
    assert not longer[16000:].any()
    assert np.array_equal(generate.read_samples(path, 0.5), longer[:8000])
    assert generate.read_samples(None, 10.0)[-1600:].any()
