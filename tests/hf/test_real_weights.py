"""Real weights and real speech: the short way and the long one give stock's ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hf.conftest import Counts, assert_same
from tests.modeling.conftest import Pair, load_pair, read_wave
from whisper_flash_attention.hf import fast_path


@pytest.fixture(scope="module")
def english(tiny_en: str) -> Pair:
    pair = load_pair(tiny_en)
    fast_path.forget(pair.ours)
    return pair


@pytest.fixture(scope="module")
def features(english: Pair, bundled_recordings) -> torch.Tensor:
    clips = [read_wave(str(recording.path)) for recording in bundled_recordings[:2]]
    return english.features(*clips)["input_features"]


@pytest.mark.parametrize(
    ("options", "short"),
    [
        ({"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}, 1),
        ({"return_timestamps": True, "force_unique_generate_call": True}, 1),
        (
            {
                "return_timestamps": True,
                "return_segments": True,
                "temperature": (0.0, 0.4),
                "logprob_threshold": -0.3,
                "no_speech_threshold": 0.6,
                "compression_ratio_threshold": 1.35,
            },
            0,
        ),
    ],
    ids=["scores", "timestamps", "fallback"],
)
def test_tiny_en_is_stock(
    english: Pair, features, counts: Counts, options: dict[str, Any], short: int
) -> None:
    inputs = features[:1]
    torch.manual_seed(1)
    expected = english.stock.generate(inputs, **options)
    for _ in range(2):
        torch.manual_seed(1)
        assert_same(english.ours.generate(inputs, **options), expected)
    assert counts.short == short
    assert counts.decodes >= 2
