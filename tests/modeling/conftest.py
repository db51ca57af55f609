"""Pairs of models with the same weights: stock with eager attention, and ours."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration as Stock
from transformers import WhisperProcessor

from tests.remembered import remember_stock
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.weights import load_processor, read_checkpoint


@dataclass
class Pair:
    """The same float32 weights in the stock class (eager) and in ours, with their processor."""

    stock: Stock
    ours: Ours
    processor: WhisperProcessor

    def features(self, *clips: np.ndarray, **options: object) -> dict[str, torch.Tensor]:
        inputs = self.processor(list(clips), sampling_rate=16000, return_tensors="pt", **options)
        return dict(inputs)


@cache
def load_pair(source: str) -> Pair:
    """One pair for all tests of a process, which leave it as it is."""
    checkpoint = read_checkpoint(source)
    assert checkpoint is not None
    stock = Stock.from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=checkpoint.state_dict,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    stock.generation_config = checkpoint.generation_config
    remember_stock(stock.model.encoder)
    return Pair(stock.eval(), Ours.from_pretrained(source).eval(), load_processor(source))


@pytest.fixture(scope="session")
def english(tiny_en: str) -> Pair:
    return load_pair(tiny_en)


@pytest.fixture(scope="session")
def multilingual(base: str) -> Pair:
    return load_pair(base)


@pytest.fixture(scope="session")
def clips(bundled_recordings: tuple[object, ...]) -> list[np.ndarray]:
    """The bundled recordings: float32 `[T]` at 16 kHz."""
    return [read_wave(str(recording.path)) for recording in bundled_recordings]


def read_wave(path: str) -> np.ndarray:
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    return samples.astype(np.float32) / 32768


@pytest.fixture(scope="session")
def long_clip(clips: list[np.ndarray]) -> np.ndarray:
    """33 s with real speech: two clips far apart, of which the second ends in another window."""
    joined = np.zeros(33 * 16000, dtype=np.float32)
    joined[: clips[1].size] = clips[1]
    joined[-clips[4].size :] = clips[4]
    return joined


SameIds = Callable[..., torch.Tensor]


@pytest.fixture
def same_ids() -> SameIds:
    """Generate with both models of a pair and require identical ids; returns them."""

    def check(pair: Pair, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
        expected = pair.stock.generate(**inputs, **options)
        found = pair.ours.generate(**inputs, **options)
        assert torch.equal(found, expected)
        return expected

    return check
