"""The caches behave as the stock ones do, without moving the past at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from whisper_flash_attention.hf.kv_cache import (
    BUCKET,
    BucketedLayer,
    StoredOnceLayer,
    bucket_of,
    new_cache,
)


def states(length: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, length, 4)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@given(st.integers(1, 2000))
def test_a_bucket_holds_its_length_and_wastes_less_than_a_bucket(length: int) -> None:
    assert length <= bucket_of(length) < length + BUCKET


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_appending_equals_concatenation(lengths: list[int]) -> None:
    ours, stock = BucketedLayer(), DynamicCache()
    for step, length in enumerate(lengths):
        key, value = states(length, seed=step)
        found = ours.update(key, value)
        expected = stock.update(key, value, 0)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert ours.get_seq_length() == stock.get_seq_length() == sum(lengths[: step + 1])


def test_a_step_within_a_bucket_does_not_move_the_past() -> None:
    layer = BucketedLayer()
    layer.update(*states(4))
    addresses = {(layer.keys.data_ptr(), layer.values.data_ptr())}
    for step in range(BUCKET - 4):
        layer.update(*states(1, seed=step))
        addresses.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert layer.get_seq_length() == BUCKET
    assert len(addresses) == 1


def test_448_steps_allocate_one_buffer_per_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the cache was grown by concatenation")

    monkeypatch.setattr(torch, "cat", refuse)
    layer = BucketedLayer()
    addresses = []
    for step in range(448):
        layer.update(*states(1, seed=step))
        if not addresses or addresses[-1] != layer.keys.data_ptr():
            addresses.append(layer.keys.data_ptr())
    assert len(addresses) == 448 // BUCKET


@pytest.mark.parametrize("change", ["reorder", "crop", "select", "repeat", "offload"])
def test_rows_and_lengths_change_as_in_the_stock_cache(change: str) -> None:
    ours, stock = BucketedLayer(), DynamicCache()
    first, second = states(5), states(1, seed=9)
    ours.update(*first)
    stock.update(*first, 0)
    rows = torch.tensor([1, 1])
    for layer in (ours, stock.layers[0]):
        if change == "reorder":
            layer.reorder_cache(rows)
        elif change == "crop":
            layer.crop(-2)
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1, 0]))
        elif change == "repeat":
            layer.batch_repeat_interleave(1)
        else:
            layer.offload()
    found, expected = ours.update(*second), stock.update(*second, 0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_reordering_keeps_room_for_the_next_step() -> None:
    layer = BucketedLayer()
    layer.update(*states(5))
    layer.reorder_cache(torch.tensor([1, 0]))
    address = layer.keys.data_ptr()
    layer.update(*states(1))
    assert layer.keys.data_ptr() == address


def test_gradients_flow_through_the_cache() -> None:
    layer = BucketedLayer()
    key, value = (state.requires_grad_() for state in states(3))
    layer.update(key, value)
    keys, values = layer.update(*states(1, seed=1))
    (keys.sum() + values.sum()).backward()
    assert torch.equal(key.grad, torch.ones_like(key))


def test_reset_forgets_the_buffers() -> None:
    layer = BucketedLayer()
    layer.update(*states(5))
    layer.reset()
    assert layer.get_seq_length() == 0
    key, value = states(2, batch=3)
    assert torch.equal(layer.update(key, value)[0], key)


def test_cross_attention_states_are_kept_without_a_copy() -> None:
    layer = StoredOnceLayer()
    key, value = states(1500)
    layer.update(key, value)
    assert layer.keys.data_ptr() == key.data_ptr()
    assert layer.values.data_ptr() == value.data_ptr()


def test_a_new_cache_is_empty_and_makes_its_layers_when_they_are_used() -> None:
    cache = new_cache()
    assert cache.get_seq_length() == 0
    cache.self_attention_cache.update(*states(2), 3)
    assert [type(layer) for layer in cache.self_attention_cache.layers] == [BucketedLayer] * 4
    assert len(cache.cross_attention_cache.layers) == 0
