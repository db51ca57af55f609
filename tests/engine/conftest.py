"""Small random Whispers for the engine's tests."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.interpreter import quick_interpreter as quick_interpreter
from tests.random_whisper import perturbed, small_whisper_config


@pytest.fixture(scope="session")
def small_model() -> WhisperForConditionalGeneration:
    """Stock Whisper, 2 + 2 layers of width 128, eager attention, weights that matter."""
    torch.manual_seed(0)
    config = small_whisper_config(
        vocab_size=300,
        pad_token_id=299,
        eos_token_id=299,
        bos_token_id=299,
        decoder_start_token_id=298,
    )
    config._attn_implementation = "eager"
    model = perturbed(WhisperForConditionalGeneration(config))
    assert isinstance(model, WhisperForConditionalGeneration)
    return model
