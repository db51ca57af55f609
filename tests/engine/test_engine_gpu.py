"""`generate` on a CUDA GPU, kernels and recordings included, against stock Whisper (eager)."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration as Stock

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
from whisper_flash_attention.benchmark.random_weights import END, build_model
from whisper_flash_attention.benchmark.settings import MODEL_SIZES
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.errors import NotFinite

pytestmark = pytest.mark.gpu
LAYERS = 2
# Two tokens whose logits differ by less, relative to the largest, may change places.
TIE = 1e-4
FORMS = pytest.mark.parametrize("form", ["projected", "absorbed"])


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def model_of(
    kind: type, size: str, layers: int = LAYERS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    model = build_model(kind, MODEL_SIZES[size], layers, device="cuda", dtype=dtype, seed=seed)
    model.set_attn_implementation("eager" if kind is Stock else "auto")
    return model


def features_of(batch: int, size: str = "tiny", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(batch)
    shape = (batch, MODEL_SIZES[size].mel_bins, 3000)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


@dataclass
class Pair:
    """The same weights in the stock class and in ours, and what stock answered so far."""

    size: str
    stock: Any
    ours: Any
    answers: dict[str, torch.Tensor] = field(default_factory=dict)


def make_pair(size: str) -> Pair:
    return Pair(size, model_of(Stock, size), model_of(Ours, size))


@pytest.fixture(scope="module", params=["tiny", "base", "small", "medium", "large-v3"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = make_pair(request.param)
    yield made
    del made.stock, made.ours
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def tiny() -> Pair:
    return make_pair("tiny")


# Clips, and options of `generate`.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "three": (3, {}),
    "many": (33, {}),
    "beams": (2, {"num_beams": 3}),
    "timestamps": (3, {"return_timestamps": True}),
}
TOKENS = 24


def options_of(case: str, model: Any) -> dict[str, Any]:
    """With these the prompt is part of the answer, and all answers have the same length."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, **CASES[case][1]}
    if "return_timestamps" in options:
        no_timestamps = model.generation_config.no_timestamps_token_id
        options["suppress_tokens"] = [*range(END + 1, no_timestamps + 1)]
    return options | {"force_unique_generate_call": True}


@torch.no_grad()
def check_ties(stock: Any, features: torch.Tensor, found: torch.Tensor, wanted: Any) -> None:
    """Rows may differ from where stock's logits of the two tokens are as good as equal."""
    assert found.shape == wanted.shape
    for row in (found != wanted).any(dim=1).nonzero().flatten().tolist():
        place = int((found[row] != wanted[row]).nonzero()[0])
        past = wanted[row : row + 1, :place]
        logits = stock(features[row : row + 1], decoder_input_ids=past).logits[0, -1]
        gap = (logits[found[row, place]] - logits[wanted[row, place]]).abs()
        assert gap < TIE * logits.abs().max(), f"row {row} differs at {place}"


@FORMS
@pytest.mark.parametrize("case", CASES)
def test_float32_ids_are_those_of_stock(pair: Pair, case: str, form: str) -> None:
    features = features_of(CASES[case][0], pair.size)
    options = options_of(case, pair.stock)
    if case not in pair.answers:
        pair.answers[case] = pair.stock.generate(features, **options)
    wanted = pair.answers[case]
    pair.ours.cross_attention = form
    # First kernel by kernel, then recorded.
    for _ in range(2):
        found = pair.ours.generate(features, **options)
        if form == "projected" or case == "beams":
            assert torch.equal(found, wanted)
        else:
            check_ties(pair.stock, features, found, wanted)


def splitting_token(rows: list[list[int]]) -> int:
    """A token that, taken as the end, ends rows at the most different places."""

    def places(token: int) -> set[int]:
        return {row.index(token) if token in row else len(row) for row in rows}

    return max(sorted(set(chain(*rows))), key=lambda token: len(places(token)))


@FORMS
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_rows_that_end_at_different_places(tiny: Pair, form: str, options: dict[str, Any]) -> None:
    features = features_of(9)
    options = {"max_new_tokens": 40, **options}
    free = tiny.stock.generate(features, **options)
    end = splitting_token(free.tolist())
    options |= {"eos_token_id": end, "pad_token_id": END}
    wanted = tiny.stock.generate(features, **options)
    assert not torch.equal(wanted, free)
    tiny.ours.cross_attention = form
    for _ in range(2):
        assert torch.equal(tiny.ours.generate(features, **options), wanted)


@FORMS
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("length", [3, 12, 100])
def test_prompts_of_the_user(tiny: Pair, form: str, length: int, options: dict[str, Any]) -> None:
    """Long ones do not go through the kernels."""
    options = {"prompt_ids": torch.arange(1000, 1000 + length, device="cuda"), **options}
    options |= {"max_new_tokens": 12}
    features = features_of(2)
    wanted = tiny.stock.generate(features, **options)
    tiny.ours.cross_attention = form
    for _ in range(2):
        assert torch.equal(tiny.ours.generate(features, **options), wanted)


def test_calls_of_mixed_kinds_do_not_disturb_one_another(tiny: Pair) -> None:
    """Several layouts share their memory."""
    calls: list[tuple[int, str, dict[str, Any]]] = [
        (3, "projected", {}),
        (1, "absorbed", {"num_beams": 3}),
        (3, "absorbed", {"max_new_tokens": 90}),
        (3, "projected", {"suppress_tokens": [*range(20000, 51865)]}),
        (2, "projected", {"repetition_penalty": 1.5}),
    ]
    features = [features_of(batch) for batch, _, _ in calls]
    options = [{"max_new_tokens": 10} | more for _, _, more in calls]
    wanted = [tiny.stock.generate(f, **o) for f, o in zip(features, options, strict=True)]
    for _ in range(3):
        for index, (_, form, _) in enumerate(calls):
            tiny.ours.cross_attention = form
            found = tiny.ours.generate(features[index], **options[index])
            assert torch.equal(found, wanted[index]), f"call {index}"


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_half_precision_is_as_near_to_float32_as_stock(
    batch: int, dtype: torch.dtype, form: str
) -> None:
    features = features_of(batch, "base")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}

    def first_logits(kind: type, dtype: torch.dtype) -> torch.Tensor:
        model = model_of(kind, "base", layers=4, dtype=dtype)
        if kind is Ours:
            model.cross_attention = form
        logits: torch.Tensor = model.generate(features.to(dtype), **options).logits[0]
        return logits.double()

    exact = first_logits(Stock, torch.float32)
    stock_error = (first_logits(Stock, dtype) - exact).norm() / exact.norm()
    assert (first_logits(Ours, dtype) - exact).norm() / exact.norm() <= 1.1 * stock_error + 1e-5


def test_weights_that_changed_or_moved_are_seen(tiny: Pair) -> None:
    features, options = features_of(2), {"max_new_tokens": 16}

    def check() -> torch.Tensor:
        found: torch.Tensor = tiny.ours.generate(features, **options)
        for _ in range(2):
            assert torch.equal(tiny.ours.generate(features, **options), found)
        return found

    before = check()
    assert torch.equal(before, tiny.stock.generate(features, **options))

    other = model_of(Stock, "tiny", seed=7)
    engine = Engine.of(tiny.ours)
    tiny.ours.load_state_dict(other.state_dict())
    assert Engine.of(tiny.ours) is engine
    changed = check()
    assert torch.equal(changed, other.generate(features, **options))
    assert not torch.equal(changed, before)

    tiny.ours.cpu()
    assert torch.equal(tiny.ours.generate(features.cpu(), **options).cuda(), changed)
    tiny.ours.cuda()
    assert torch.equal(check(), changed)
    assert Engine.of(tiny.ours) is not engine

    tiny.ours.half()
    features = features.half()
    fresh = model_of(Ours, "tiny", dtype=torch.float16, seed=7)
    assert torch.equal(check(), fresh.generate(features, **options))


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, made in as many threads that start together."""
    barrier = threading.Barrier(len(calls), timeout=60)

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("recorded", [True, False])
def test_threads_that_generate_at_once(tiny: Pair, recorded: bool) -> None:
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 20},
        {"max_new_tokens": 30, "num_beams": 2},
    ]

    def call(batch: int) -> list[torch.Tensor]:
        features = features_of(batch)
        return [tiny.ours.generate(features, **options[batch - 1]) for _ in range(5)]

    wanted = [tiny.stock.generate(features_of(n + 1), **options[n]) for n in range(2)]
    if recorded:
        call(1), call(2)
    answers = at_once([lambda: call(1), lambda: call(2)])
    for found, expected in zip(answers, wanted, strict=True):
        assert all(torch.equal(each, expected) for each in found)


@FORMS
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"repetition_penalty": 1.2}], ids=str)
def test_what_is_not_finite_is_an_error(tiny: Pair, form: str, options: dict[str, Any]) -> None:
    features, options = features_of(2), {"max_new_tokens": 8, **options}
    wanted = tiny.stock.generate(features, **options)
    tiny.ours.cross_attention = form
    assert torch.equal(tiny.ours.generate(features, **options), wanted)
    bad = features.clone()
    bad[1, 5, 700] = math.nan
    with pytest.raises(NotFinite, match="in row 1 of the batch" if not options else "not finite"):
        tiny.ours.generate(bad, **options)
    assert torch.equal(tiny.ours.generate(features, **options), wanted)
    weight = tiny.ours.model.decoder.layers[1].fc1.weight.data
    kept = float(weight[3, 4])
    weight[3, 4] = math.nan
    with pytest.raises(NotFinite, match="not finite"):
        tiny.ours.generate(features, **options)
    weight[3, 4] = kept
    assert torch.equal(tiny.ours.generate(features, **options), wanted)
