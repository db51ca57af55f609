"""Tables and defaults that this package has of its own are those of Transformers."""

from __future__ import annotations

import warnings
from dataclasses import asdict

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper import tokenization_whisper

from whisper_flash_attention.audio.log_mel import _filters
from whisper_flash_attention.languages import CODES_BY_NAME, LANGUAGES
from whisper_flash_attention.weights.checkpoint import Dimensions
from whisper_flash_attention.weights.model_files import FEATURES
from whisper_flash_attention.weights.transformers_folder import ALIASES, DEFAULT_TOKENS


def test_languages_in_the_order_of_their_tokens() -> None:
    assert list(LANGUAGES.items()) == list(tokenization_whisper.LANGUAGES.items())
    assert CODES_BY_NAME == tokenization_whisper.TO_LANGUAGE_CODE


def test_defaults_of_a_configuration() -> None:
    config = WhisperConfig()
    for name, value in (asdict(Dimensions()) | DEFAULT_TOKENS).items():
        assert getattr(config, name) == value, name
    assert WhisperConfig.attribute_map.items() <= ALIASES.items()


def test_defaults_of_a_feature_extractor() -> None:
    extractor = WhisperFeatureExtractor()
    assert {name: getattr(extractor, name) for name in FEATURES} == dict(FEATURES)


@pytest.mark.parametrize("mel_bins", [80, 128, 79, 200])
def test_mel_filters_to_the_last_bit(mel_bins: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of filters that are all zero
        bank = mel_filter_bank(
            201, mel_bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney"
        )
    assert torch.equal(_filters(mel_bins), torch.from_numpy(bank).float().t())
