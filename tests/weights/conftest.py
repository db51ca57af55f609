"""Small models, made once, and the checkpoints that are written from them."""

from __future__ import annotations

import pytest
from transformers import WhisperForConditionalGeneration

from tests.weights.writers import Variables, small_whisper, smallest_whisper, to_ctranslate2


@pytest.fixture(scope="session")
def model() -> WhisperForConditionalGeneration:
    return small_whisper()


@pytest.fixture(scope="session")
def smallest() -> WhisperForConditionalGeneration:
    """A model whose file is mostly header, to break byte by byte."""
    return smallest_whisper()


@pytest.fixture
def variables(smallest: WhisperForConditionalGeneration) -> Variables:
    """The variables of the smallest model, for a test to change before it writes them."""
    return to_ctranslate2(smallest)
