"""Device memory on a CUDA GPU: it stays as it is, goes with the model, and is as planned."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.settings import MODEL_SIZES
from whisper_flash_attention.engine.device_memory import release_cached, used_bytes
from whisper_flash_attention.engine.engine import MOST_LAYOUTS, Engine
from whisper_flash_attention.engine.layout import SharedArena
from whisper_flash_attention.engine.logits_processors import LogitsProcessors
from whisper_flash_attention.engine.request import Request

pytestmark = pytest.mark.gpu
MIB = 2**20


def model_of(size: str, layers: int) -> Any:
    return build_model(Ours, MODEL_SIZES[size], layers, device="cuda", dtype=torch.float16)


def features_of(batch: int) -> torch.Tensor:
    """Drawn on the host: in float32 they would take memory of the device that no call takes."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 80, 3000, generator=generator).half().cuda()


def held() -> tuple[int, int]:
    """Bytes allocated and reserved, garbage collected."""
    torch.cuda.synchronize()
    gc.collect()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def without_engines() -> int:
    """Bytes allocated without recordings, nor what PyTorch keeps for cuBLAS, which they use."""
    torch.cuda.synchronize()
    for engine in list(Engine._engines.values()):
        engine.release()
    gc.collect()
    release_cached(torch.device("cuda", 0), workspaces=True)
    return torch.cuda.memory_allocated()


# Clips and new tokens: as many layouts as are kept, and more.
FEW = [(batch, tokens) for batch in (1, 2, 5, 9) for tokens in (3, 70)]
MANY = [*FEW, (3, 3), (3, 70)]


@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["recorded", "recorded anew"])
def test_memory_does_not_grow_with_the_number_of_calls(shapes: list[tuple[int, int]]) -> None:
    assert (len(shapes) > MOST_LAYOUTS) == (shapes is MANY)
    model = model_of("tiny", 2)

    def call(index: int) -> None:
        batch, tokens = shapes[index % len(shapes)]
        model.generate(features_of(batch), max_new_tokens=tokens, min_new_tokens=tokens)

    for index in range(20):
        call(index)
    before = held()
    for index in range(20, 200):
        call(index)
    assert held() == before


def test_memory_goes_with_the_model_or_when_it_is_released() -> None:
    def use(model: Any) -> None:
        for form in ("projected", "absorbed"):
            model.cross_attention = form
            for options in ({}, {"num_beams": 2}, {"repetition_penalty": 1.2}):
                for batch in (1, 6):
                    model.generate(features_of(batch), max_new_tokens=10, **options)

    # What PyTorch, and the rules for this vocabulary, keep for any model.
    use(model_of("tiny", 2))
    empty = without_engines()
    model = model_of("base", 2)
    loaded = without_engines()
    assert loaded - empty > 50 * MIB
    use(model)
    assert held()[0] - loaded > 10 * MIB
    Engine.of(model).release()
    assert without_engines() - loaded <= MIB
    use(model)
    del model
    gc.collect()
    assert not Engine._engines
    assert without_engines() - empty <= MIB


def test_encoder_and_decodes_take_turns_in_one_arena() -> None:
    """Whatever the order of their sizes, a call gives what it gives alone."""
    model = model_of("tiny", 2)
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    alone = {}
    for batch in (1, 3, 6, 37):
        alone[batch] = model.generate(features_of(batch), **options)
        Engine.of(model).release()
    for batch in (1, 1, 3, 1, 37, 1, 1, 6, 37, 37, 3, 6, 6, 1):
        assert torch.equal(model.generate(features_of(batch), **options), alone[batch]), batch


def test_an_arena_that_grows_gives_its_memory_back_first() -> None:
    without_engines()
    before = torch.cuda.memory_reserved()
    memory = SharedArena(torch.device("cuda", 0))
    for size in (16, 64, 32, 80):
        memory.of(size * MIB)
    assert torch.cuda.memory_reserved() - before == 80 * MIB
    memory.release()
    assert torch.cuda.memory_reserved() == before


def test_the_encoders_arena_is_not_kept_beside_the_decodes() -> None:
    without_engines()
    model = model_of("base", 6)
    model.generate(features_of(1), max_new_tokens=25)
    pools = [each for each in torch.cuda.memory_snapshot() if each["segment_pool_id"] != (0, 0)]
    assert sum(each["allocated_size"] for each in pools) > 20 * MIB
    assert sum(each["total_size"] - each["allocated_size"] for each in pools) <= 4 * MIB


def test_a_callback_of_a_decode_may_encode() -> None:
    engine = Engine.of(model_of("tiny", 2))
    states, other = engine.encode(features_of(2)), engine.encode(features_of(9))
    prompt = torch.tensor([[50258, 50259, 50359, 50363]] * 2, device="cuda")
    request = Request(LogitsProcessors(), 40, (), 50257)
    wanted = engine.decode(states, prompt, request).sequences
    found: list[torch.Tensor] = []
    again = engine.decode(
        states, prompt, request, meanwhile=lambda: found.append(engine.encode(features_of(9)))
    )
    assert torch.equal(again.sequences, wanted) and torch.equal(found[0], other)


def test_one_clip_takes_no_workspace_of_cublas() -> None:
    without_engines()
    model = model_of("tiny", 2)
    before = torch.cuda.memory_allocated()
    model.generate(features_of(1), max_new_tokens=10)
    assert torch.cuda.memory_allocated() - before < 32 * MIB


def test_release_leaves_the_weights() -> None:
    model = model_of("tiny", 2)
    model.generate(features_of(1), max_new_tokens=3)
    model.release()
    loaded = torch.cuda.memory_reserved()
    for batch in (1, 6, 33):
        for _ in range(3):
            model.generate(features_of(batch), max_new_tokens=30)
    gc.collect()
    assert torch.cuda.memory_reserved() - loaded > 100 * MIB
    model.release()
    assert torch.cuda.memory_reserved() <= loaded


@pytest.mark.parametrize("batch", [1, 32])
def test_the_plan_is_what_the_driver_counts(batch: int) -> None:
    model = model_of("medium", 24)
    without_engines()
    planned = model.plan(batch_size=batch, max_new_tokens=128).driver
    for _ in range(3):
        model.generate(features_of(batch), max_new_tokens=128, min_new_tokens=128)
    assert planned == pytest.approx(used_bytes(model.device)[0], rel=0.03)


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("size", ["base", "medium"])
def test_the_plan_is_the_peak(size: str, batch: int) -> None:
    empty = without_engines()
    model = model_of(size, MODEL_SIZES[size].decoder_layers)
    options = {"max_new_tokens": 128, "min_new_tokens": 128}
    features = features_of(batch)
    model.generate(features, **options)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    model.generate(features, **options)
    peak = torch.cuda.max_memory_allocated() - empty
    planned = model.plan(batch_size=batch, max_new_tokens=128).total
    assert planned == pytest.approx(peak, rel=0.1)
