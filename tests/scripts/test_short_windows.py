"""`benchmarks/short_windows.py`: what the encoder gets, and how windows are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration

from tests.random_whisper import perturbed, small_whisper_config
from tests.scripts.loading import load_script
from whisper_flash_attention.benchmark.spoken import Spoken
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.weights import collect_weights

script: Any = load_script("short_windows")


def test_a_window_ends_some_seconds_after_the_sound() -> None:
    config = small_whisper_config(vocab_size=300, pad_token_id=299)
    weights = collect_weights(perturbed(WhisperForConditionalGeneration(config)))  # of 2 s
    features = torch.randn(1, 80, 200, generator=torch.Generator().manual_seed(1))
    features[:, :, 40:] = -0.6
    whole = Engine(weights).encode(features)
    torch.testing.assert_close(script.ShortWindows(weights, 1).encode(features), whole)
    short = script.ShortWindows(weights, 0).encode(features)
    assert short.shape == (1, 50, 128)
    assert not torch.allclose(short, whole[:, :50], atol=1e-3)


def test_changes_are_counted_against_the_full_window() -> None:
    spoken = Spoken(Path("talk.wav"), "en", "One two three four.")

    def clip(full: str, short: str) -> dict[str, Any]:
        facts = {"loops": False, "tokens": 1, "seconds": 0.5}
        windows = {"full": {"text": full, **facts}, "short": {"text": short, **facts}}
        return {"spoken": spoken, "language": "en", "windows": windows}

    clips = [clip("One two.", "one, two"), clip("Three four.", "Three, for four.")]
    full, short = (script.summarise(name, clips) for name in ("full", "short"))
    assert (full["clips_changed"], full["words_changed"], full["wer"]) == (0, 0, 0)
    assert (short["clips_changed"], short["words_changed"], short["wer"]) == (1, 1, 0.25)
    assert (short["clips"], short["words"], short["seconds"]) == (2, 4, 1.0)
