"""The cache that is computed when someone looks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import EncoderDecoderCache

from tests.hf.conftest import Twins, assert_same_cache
from whisper_flash_attention.hf import compat
from whisper_flash_attention.hf.kv_cache import RecomputedCache, recomputed_cache


@pytest.fixture
def parts(twins: Twins) -> tuple[torch.Tensor, torch.Tensor, EncoderDecoderCache]:
    """States of two clips, three rows of tokens for each, and the model's cache of them."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, 40, 128, generator=generator)
    tokens = torch.randint(0, 400, (6, 7), generator=generator)
    with torch.no_grad():
        expected = twins.stock.model.decoder(
            input_ids=tokens[:, :-1],
            encoder_hidden_states=states.repeat_interleave(3, dim=0),
            use_cache=True,
        )[compat.CACHE]
    return states, tokens, expected


def test_it_is_the_model_s_cache(twins: Twins, parts) -> None:
    states, tokens, expected = parts
    cache = recomputed_cache(twins.ours, states, tokens)
    assert set(vars(cache)) == {"_compute"}
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.get_seq_length() == 6
    assert_same_cache(cache, expected)
    assert cache.is_updated == expected.is_updated


def test_it_is_computed_once() -> None:
    calls = []

    def compute() -> EncoderDecoderCache:
        calls.append(1)
        return EncoderDecoderCache([tuple(torch.ones(1, 2, 3, 4) for _ in range(4))])

    cache = RecomputedCache(compute)
    assert (len(cache), len(cache), cache.get_seq_length()) == (1, 1, 3)
    assert calls == [1]


def test_rows_copies_and_pickles_hold_the_content(twins: Twins, parts) -> None:
    states, tokens, expected = parts
    cache = recomputed_cache(twins.ours, states, tokens)
    row = cache.row(4)
    for name in ("self_attention_cache", "cross_attention_cache"):
        for one, all_rows in zip(
            getattr(row, name).layers, getattr(expected, name).layers, strict=True
        ):
            torch.testing.assert_close(one.keys, all_rows.keys[4:5], atol=1e-4, rtol=1e-4)
    assert_same_cache(copy.deepcopy(cache), expected)
    assert_same_cache(
        pickle.loads(pickle.dumps(recomputed_cache(twins.ours, states, tokens))), expected
    )


def test_unknown_attributes_are_unknown(twins: Twins, parts) -> None:
    cache = recomputed_cache(twins.ours, parts[0], parts[1])
    with pytest.raises(AttributeError, match="nothing"):
        _ = cache.nothing
    assert "self_attention_cache" not in vars(cache)
