"""Memory kept between calls: one arena that only grows, and decoders by layout on it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.engine.cuda_decoder import CudaDecoder
from whisper_flash_attention.engine.cuda_graphs import GraphRecorder
from whisper_flash_attention.engine.engine import MOST_LAYOUTS, Buffers, decoder_bytes
from whisper_flash_attention.engine.layout import Layout, SharedArena, cache_bytes, state_bytes
from whisper_flash_attention.engine.triton_layers import workspace_bytes
from whisper_flash_attention.engine.weights import Weights, collect_weights


@pytest.fixture
def weights(small_model: WhisperForConditionalGeneration) -> Weights:
    return collect_weights(small_model)


@pytest.fixture
def kept(weights: Weights) -> Buffers:
    return Buffers(weights, GraphRecorder(), SharedArena(weights.device))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[CudaDecoder]:
    """The decoders that were prepared, in order."""
    found: list[CudaDecoder] = []
    original = CudaDecoder.prepare

    def prepare(decoder: CudaDecoder) -> None:
        found.append(decoder)
        original(decoder)

    monkeypatch.setattr(CudaDecoder, "prepare", prepare)
    return found


def layout(weights: Weights, slots: int = 1, positions: int = 8, **sizes: Any) -> Layout:
    options = {"clips": slots, "keys": 10, "absorbed": False, "kernels": True} | sizes
    return Layout.of(weights.decoder, slots=slots, positions=positions, **options)


def block(kept: Buffers) -> torch.Tensor:
    assert kept._memory._arena is not None
    return kept._memory._arena._block


def test_nothing_is_taken_before_it_is_needed(kept: Buffers) -> None:
    assert kept._memory._arena is None


def test_the_arena_has_the_size_of_the_largest_call(kept: Buffers, weights: Weights) -> None:
    small, large = layout(weights, 1), layout(weights, 3, 20)
    kept.state(small)
    assert len(block(kept)) == state_bytes(small)
    kept.state(large)
    assert len(block(kept)) == state_bytes(large)
    held = block(kept)
    assert kept.state(small).keys.data_ptr() == held.data_ptr()
    assert kept.state(large).keys.data_ptr() == held.data_ptr()
    assert block(kept) is held
    kept.cuda_decoder(large)
    assert len(block(kept)) == state_bytes(large) + workspace_bytes(large)


def test_the_old_arena_is_given_back_when_a_larger_one_is_made(
    kept: Buffers, weights: Weights
) -> None:
    decoder = kept.cuda_decoder(layout(weights))
    old = weakref.ref(block(kept)), weakref.ref(decoder)
    del decoder
    kept.cuda_decoder(layout(weights, 4))
    gc.collect()
    assert [reference() for reference in old] == [None, None]
    assert len(kept._decoders) == 1


def test_a_layout_keeps_its_decoder(kept: Buffers, weights: Weights) -> None:
    large, small = layout(weights, 3), layout(weights, 2)
    first, second = kept.cuda_decoder(large), kept.cuda_decoder(small)
    assert first is not second
    assert kept.cuda_decoder(layout(weights, 3)) is first
    assert kept.cuda_decoder(layout(weights, 2)) is second
    assert kept.cuda_decoder(layout(weights, 2, raw=True)) is not second
    assert first.state.layout == large
    assert first.state.keys.data_ptr() == second.state.keys.data_ptr() == block(kept).data_ptr()


def test_a_decoder_is_prepared_when_another_layout_was_used(
    kept: Buffers, weights: Weights, prepared: list[CudaDecoder]
) -> None:
    one, other = layout(weights, 3), layout(weights, 2)
    first = kept.cuda_decoder(one)
    kept.cuda_decoder(one)
    assert prepared == [first]
    second = kept.cuda_decoder(other)
    kept.cuda_decoder(other)
    assert prepared == [first, second]
    kept.cuda_decoder(one)
    assert prepared == [first, second, first]


def test_a_prepared_decoder_finds_nothing_of_others(kept: Buffers, weights: Weights) -> None:
    decoder = kept.cuda_decoder(layout(weights, 2))
    kept.cuda_decoder(layout(weights, 1))
    block(kept).fill_(255)
    work = kept.cuda_decoder(layout(weights, 2))._work
    for tensor in (work.counters, work.limits, work.settings, work.flags, decoder.state.tokens):
        assert tensor is not None and not tensor.any()


def test_the_encoder_has_its_turn_before_a_decode(
    weights: Weights, prepared: list[CudaDecoder]
) -> None:
    """It takes the caches' place, and leaves what a decoder keeps from call to call."""
    memory = SharedArena(weights.device)
    kept = Buffers(weights, GraphRecorder(), memory, lambda clips: 40_960 * clips)
    wanted = layout(weights, 2)
    assert cache_bytes(wanted) < 81_920
    decoder = kept.cuda_decoder(wanted)
    size = len(block(kept))
    assert size == decoder_bytes(wanted, 81_920)
    assert size < state_bytes(wanted) + workspace_bytes(wanted) + 81_920
    decoder._work.settings.fill_(7)
    decoder.state.finished.fill_(True)
    for used, times in ((81_920, 1), (81_921, 2), (300, 2)):
        memory.of(used)._block[: min(used, 81_920)].fill_(255)
        memory.overwritten = used
        assert kept.cuda_decoder(wanted) is decoder and len(prepared) == times
        assert decoder.state.finished.all()
        assert bool((decoder._work.settings == 7).all()) == (times == 1)
    assert decoder.state.keys.isnan().all()


def test_a_larger_encoder_takes_the_decoders_away(kept: Buffers, weights: Weights) -> None:
    held, old = weakref.ref(kept.cuda_decoder(layout(weights))), weakref.ref(block(kept))
    kept._memory.of(len(block(kept)) + 1)
    # At once: what is still held when the larger one is taken counts twice.
    assert held() is None and old() is None and not kept._decoders


def test_the_layout_that_was_not_used_for_longest_is_dropped(
    kept: Buffers, weights: Weights
) -> None:
    layouts = [layout(weights, 1, MOST_LAYOUTS + 1 - n) for n in range(MOST_LAYOUTS + 1)]
    decoders = [weakref.ref(kept.cuda_decoder(each)) for each in layouts[:MOST_LAYOUTS]]
    kept.cuda_decoder(layouts[0])
    kept.cuda_decoder(layouts[-1])
    gc.collect()
    assert [each for each, found in enumerate(decoders) if found() is None] == [1]
    assert len(kept._decoders) == MOST_LAYOUTS
    assert kept.cuda_decoder(layouts[0]) is decoders[0]()
    assert kept.cuda_decoder(layouts[1]).state.layout == layouts[1]


def test_release_gives_everything_back(
    kept: Buffers, weights: Weights, prepared: list[CudaDecoder]
) -> None:
    wanted = layout(weights)
    held = weakref.ref(kept.cuda_decoder(wanted)), weakref.ref(block(kept))
    prepared.clear()
    kept.release()
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert kept._memory._arena is None and not kept._decoders
    assert kept.cuda_decoder(wanted) is prepared[0]
    assert len(block(kept)) == state_bytes(wanted) + workspace_bytes(wanted)
