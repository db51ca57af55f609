"""Small models, made once, and the checkpoints that are written from them."""

from __future__ import annotations

import pytest
from transformers import WhisperForConditionalGeneration

from tests.weights.writers import Variables, small_whisper, to_ctranslate2


@pytest.fixture(scope="session")
def model() -> WhisperForConditionalGeneration:
    return small_whisper()


@pytest.fixture(scope="session")
def smallest() -> WhisperForConditionalGeneration:
    """A model whose file is mostly header, to break byte by byte."""
    return small_whisper(
        vocab_size=51864,
        d_model=4,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=3,
        decoder_ffn_dim=5,
        max_source_positions=4,
        max_target_positions=6,
    )


@pytest.fixture
def variables(smallest: WhisperForConditionalGeneration) -> Variables:
    """The variables of the smallest model, for a test to change before it writes them."""
    return to_ctranslate2(smallest)
