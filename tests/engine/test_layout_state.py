"""Sizes of a decode's buffers: few of them, large enough, and exactly what is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine.layout import (
    ALIGNMENT,
    BATCH_BUCKETS,
    LENGTH_BUCKET,
    Arena,
    DecodeState,
    Layout,
    aligned_bytes,
    batch_bucket,
    buffers,
    length_bucket,
    state_bytes,
)
from whisper_flash_attention.engine.triton_layers import (
    Workspace,
    workspace_buffers,
    workspace_bytes,
)
from whisper_flash_attention.engine.weights import collect_weights

CPU = torch.device("cpu")
quick = settings(max_examples=60, deadline=None)


@quick
@given(st.integers(1, 2000), st.integers(0, 300))
def test_a_batch_gets_slots_enough_but_not_too_many(batch: int, more: int) -> None:
    slots = batch_bucket(batch)
    assert batch <= slots < 1.5 * batch + 1
    assert batch_bucket(slots) == slots
    assert batch_bucket(batch + more) >= slots


def test_batches_have_few_sizes() -> None:
    assert {batch_bucket(batch) for batch in range(1, 257)} == set(BATCH_BUCKETS)
    assert len({batch_bucket(batch) for batch in range(257, 1025)}) == 12


@quick
@given(st.integers(1, 448), st.integers(0, 300))
def test_a_decode_gets_positions_enough_but_not_too_many(length: int, more: int) -> None:
    positions = length_bucket(length)
    assert length <= positions < length + LENGTH_BUCKET
    assert length_bucket(positions) == positions
    assert length_bucket(length + more) >= positions


def test_decodes_have_few_lengths() -> None:
    assert len({length_bucket(length) for length in range(1, 449)}) == 7


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    heads, clips = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    return Layout(
        layers=draw(st.integers(1, 3)),
        heads=heads,
        width=64 * heads,
        vocabulary=draw(st.integers(50, 300)),
        slots=clips * draw(st.integers(1, 3)),
        clips=clips,
        positions=draw(st.integers(1, 20)),
        keys=draw(st.integers(1, 30)),
        absorbed=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        device=CPU,
        kernels=True,
        prompt=draw(st.integers(1, 4)),
        ffn=draw(st.integers(1, 200)),
        raw=draw(st.booleans()),
    )


@quick
@given(layouts())
def test_what_is_cut_is_what_was_counted(layout: Layout) -> None:
    size = state_bytes(layout)
    arena = Arena(CPU, size + workspace_bytes(layout))
    state = DecodeState.allocate(layout, arena)
    assert arena._used == size
    work = Workspace.allocate(layout, arena)
    assert arena._used == arena.capacity
    wanted = buffers(layout) | {f"work {k}": v for k, v in workspace_buffers(layout).items()}
    found = vars(state) | {f"work {name}": value for name, value in vars(work).items()}
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == wanted
    end = 0
    for tensor in sorted(filter(torch.Tensor.numel, tensors.values()), key=torch.Tensor.data_ptr):
        begin = tensor.data_ptr() - arena._block.data_ptr()
        assert begin >= end and begin % ALIGNMENT == 0 and tensor.is_contiguous()
        end = begin + tensor.numel() * tensor.itemsize
    assert end <= arena.capacity


def test_only_one_form_of_cross_attention_is_held() -> None:
    sizes: dict[str, Any] = {"layers": 3, "heads": 2, "width": 128, "vocabulary": 60, "slots": 4}
    sizes |= {"clips": 2, "positions": 8, "keys": 10, "dtype": torch.float16, "device": CPU}
    projected = Layout(**sizes, absorbed=False)
    absorbed = Layout(**sizes, absorbed=True)
    assert projected.slots_per_clip == 2
    assert buffers(projected)["cross_keys"] == ((3, 2, 2, 10, 64), torch.float16)
    assert buffers(absorbed)["states"] == ((2, 10, 128), torch.float16)
    assert "states" not in buffers(projected) and "cross_keys" not in buffers(absorbed)
    # Keys and values of every layer, or the states once.
    state = aligned_bytes((2, 10, 128), torch.float16)
    assert state_bytes(projected) - state_bytes(absorbed) == (2 * 3 - 1) * state


def test_an_arena_that_is_restarted_hands_out_the_same_memory() -> None:
    arena = Arena(CPU, 2 * ALIGNMENT)
    first = arena.take((3,), torch.int64)
    second = arena.take((5, 2), torch.float32)
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT
    arena.restart()
    assert arena.take((2,), torch.int32).data_ptr() == first.data_ptr()


def test_an_arena_does_not_hand_out_more_than_it_has() -> None:
    arena = Arena(CPU, ALIGNMENT)
    arena.take((ALIGNMENT - 8,), torch.uint8)
    with pytest.raises(RuntimeError):
        arena.take((1,), torch.int64)


def test_a_layout_for_weights(small_model: WhisperForConditionalGeneration) -> None:
    weights = collect_weights(small_model).decoder
    layout = Layout.of(weights, slots=6, clips=3, positions=9, keys=100, absorbed=True)
    assert layout == Layout(
        layers=2,
        heads=2,
        width=128,
        vocabulary=300,
        slots=6,
        clips=3,
        positions=9,
        keys=100,
        absorbed=True,
        dtype=torch.float32,
        device=CPU,
        ffn=256,
    )
    assert hash(layout) != hash(
        Layout.of(weights, slots=6, clips=2, positions=9, keys=100, absorbed=True)
    )
