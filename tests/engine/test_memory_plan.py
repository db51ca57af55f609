"""What `generate` takes in memory: as much as is allocated, and the most clips that fit.

The plans are for GPUs that are not here, and for the CPU.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperForConditionalGeneration

from whisper_flash_attention.engine import layout as layouts
from whisper_flash_attention.engine import memory_plan
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.layout import ABSORBED_FROM_CLIPS, BATCH_BUCKETS, Arena
from whisper_flash_attention.engine.logits_processors import LogitsProcessors
from whisper_flash_attention.engine.memory_plan import (
    MemoryPlan,
    PlanRequest,
    largest_plan,
    make_plan,
    plan_memory,
)
from whisper_flash_attention.engine.packing import has_int8, pack
from whisper_flash_attention.engine.request import Beams, Request
from whisper_flash_attention.engine.weights import Linear, Weights, collect_weights
from whisper_flash_attention.errors import MissingPackage, OptionError

PARTS = ("weights", "self_attention_cache", "cross_attention_state", "workspace", "encoder")
CPU, GPU = torch.device("cpu"), torch.device("cuda:99")
MIB = 2**20


@pytest.fixture(scope="module")
def weights(small_model: WhisperForConditionalGeneration) -> Weights:
    return collect_weights(small_model)


@pytest.fixture(scope="module")
def large() -> Weights:
    """Weights of the shapes of openai/whisper-large-v3, without data."""
    config = WhisperConfig(
        vocab_size=51866,
        d_model=1280,
        encoder_layers=32,
        decoder_layers=32,
        encoder_attention_heads=20,
        decoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
        num_mel_bins=128,
    )
    with torch.device("meta"):
        return collect_weights(WhisperForConditionalGeneration(config))


def wanted_of(**changes: Any) -> PlanRequest:
    options: dict[str, Any] = {
        "max_new_tokens": 20,
        "prompt_tokens": 4,
        "num_beams": 1,
        "cross_attention": "auto",
        "device": CPU,
        "dtype": torch.float32,
    }
    return PlanRequest(**(options | changes))


anything_wanted = st.builds(
    PlanRequest,
    max_new_tokens=st.integers(1, 400),
    prompt_tokens=st.integers(1, 40),
    num_beams=st.integers(1, 6),
    cross_attention=st.sampled_from(["auto", "projected", "absorbed"]),
    device=st.sampled_from([CPU, GPU]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


@pytest.mark.parametrize("form", ["projected", "absorbed"])
@pytest.mark.parametrize(("clips", "num_beams", "prompt"), [(1, 1, 1), (3, 1, 4), (2, 5, 3)])
def test_the_state_that_a_decode_allocates_is_the_one_planned(
    small_model: WhisperForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
    clips: int,
    num_beams: int,
    prompt: int,
    form: str,
) -> None:
    allocated: list[int] = []

    class Counted(Arena):
        def __init__(self, device: torch.device, capacity: int) -> None:
            super().__init__(device, capacity)
            allocated.append(self._block.nbytes)

    monkeypatch.setattr(layouts, "Arena", Counted)
    engine = Engine(collect_weights(small_model))
    request = Request(
        processors=LogitsProcessors(),
        max_length=prompt + 7,
        eos=(299,),
        pad=299,
        beams=Beams(num_beams, 1, 1.0, False, 2 * num_beams) if num_beams > 1 else None,
        cross_attention=form,
    )
    engine.decode(
        torch.zeros(clips, 100, 128),
        torch.full((clips * num_beams, prompt), 298),
        request,
    )
    wanted = wanted_of(
        max_new_tokens=7, prompt_tokens=prompt, num_beams=num_beams, cross_attention=form
    )
    plan = plan_memory(engine.weights, wanted, clips)
    assert allocated == [plan.self_attention_cache + plan.cross_attention_state]
    assert plan.cross_attention == form
    assert plan.workspace == 0


@settings(deadline=None)
@given(wanted=anything_wanted, batch=st.integers(1, 300))
def test_parts_add_up_and_are_shown(weights: Weights, wanted: PlanRequest, batch: int) -> None:
    plan = plan_memory(weights, wanted, batch)
    parts = [getattr(plan, name) for name in PARTS]
    assert plan.total == sum(parts)
    assert min(parts[:3]) > 0 and parts[4] > 0
    assert plan.fits(plan.total)
    assert not plan.fits(plan.total - 1)
    head, *rows = str(plan).splitlines()
    assert head.endswith(f"{plan.cross_attention} cross-attention: {plan.total / 1e9:.2f} GB")
    assert f"batch {batch}, {wanted.max_new_tokens} new tokens" in head
    assert (f", {wanted.num_beams} beams" in head) == (wanted.num_beams > 1)
    shown = {row.rsplit(maxsplit=2)[0].strip(): row.split()[-2] for row in rows}
    values = {name.replace("_", " "): getattr(plan, name) for name in (*PARTS, "total")}
    assert shown == {name: f"{value / MIB:,.1f}" for name, value in values.items()}


def test_weights_are_counted_once_in_the_dtype_planned(
    small_model: WhisperForConditionalGeneration, weights: Weights
) -> None:
    numbers = sum(parameter.numel() for parameter in small_model.parameters())
    assert plan_memory(weights, wanted_of(), 1).weights == 4 * numbers
    assert plan_memory(weights, wanted_of(dtype=torch.float16), 1).weights == 2 * numbers
    # An output layer of its own, [300, 128], which stock Whisper ties to the embedding.
    own = Linear(weights.decoder.projection.weight.clone(), None)
    untied = replace(weights, decoder=replace(weights.decoder, projection=own))
    assert plan_memory(untied, wanted_of(), 1).weights == 4 * (numbers + 300 * 128)


def test_laid_out_weights_count_as_they_are_held(
    small_model: WhisperForConditionalGeneration, weights: Weights
) -> None:
    if not has_int8():
        pytest.skip("PyTorch without 8-bit products")
    narrow, rest = 0, 0
    for name, weight in small_model.state_dict().items():
        is_cross = ".encoder_attn.k_proj." in name or ".encoder_attn.v_proj." in name
        if weight.dim() == 2 and "embed_" not in name and not is_cross:
            narrow += weight.numel() + 4 * len(weight)
            # A bias of zeros where the model has none.
            rest += 4 * len(weight) * ("k_proj" in name or "proj_out" in name)
        else:
            rest += weight.nbytes
    plan = plan_memory(pack(weights, "int8"), wanted_of(), 1)
    assert plan.weights == narrow + rest
    assert "int8 on cpu" in str(plan)
    assert plan_memory(pack(weights, "float32"), wanted_of(), 1).weights > 2 * plan.weights


def test_beams_share_their_clips_states_and_features(weights: Weights) -> None:
    one, five = (plan_memory(weights, wanted_of(num_beams=beams), 3) for beams in (1, 5))
    assert five.cross_attention_state == one.cross_attention_state
    assert 4.5 < five.self_attention_cache / one.self_attention_cache <= 5


def budgets(plan: MemoryPlan) -> st.SearchStrategy[int]:
    """From the plan's own total to some hundred times that."""
    return st.floats(0, 7).map(lambda power: int(plan.total * 2**power))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), wanted=anything_wanted)
def test_the_most_clips_that_fit(
    weights: Weights, data: st.DataObject, wanted: PlanRequest
) -> None:
    cheap = replace(wanted, cross_attention="absorbed")
    budget = data.draw(budgets(plan_memory(weights, cheap, 1)))
    try:
        found = largest_plan(weights, wanted, budget)
    except OptionError:
        # Projected states may be larger than the budget of absorbed ones.
        assert not plan_memory(weights, wanted, 1).fits(budget)
        return
    assert found.fits(budget)
    assert wanted.cross_attention in ("auto", found.cross_attention)
    assert found == plan_memory(
        weights, replace(wanted, cross_attention=found.cross_attention), found.batch_size
    )
    forms = ("auto", "absorbed") if wanted.cross_attention == "auto" else (wanted.cross_attention,)
    more = {found.batch_size + 1, *(size for size in BATCH_BUCKETS if size > found.batch_size)}
    for form in forms:
        for batch in more:
            plan = plan_memory(weights, replace(wanted, cross_attention=form), batch)
            assert not plan.fits(budget), (batch, form)


def test_auto_absorbs_from_some_batch_on_or_where_memory_is_short(large: Weights) -> None:
    wanted = wanted_of(device=GPU, dtype=torch.float16)
    forms = {
        batch: plan_memory(large, wanted, batch).cross_attention
        for batch in (1, ABSORBED_FROM_CLIPS - 1, ABSORBED_FROM_CLIPS, 100)
    }
    assert list(forms.values()) == ["projected", "projected", "absorbed", "absorbed"]
    on_cpu = replace(wanted, device=CPU)
    assert plan_memory(large, on_cpu, 100).cross_attention == "projected"
    # Keys and values of 5 clips' states are 1.2 GB, beside 3.1 GB of weights.
    wanted = replace(wanted, max_new_tokens=444)
    short = make_plan(large, wanted, batch_size=None, memory_gb=4.5)
    assert short.cross_attention == "absorbed"
    projected = replace(wanted, cross_attention="projected")
    fewer = make_plan(large, projected, batch_size=None, memory_gb=4.5)
    assert fewer.batch_size < short.batch_size < ABSORBED_FROM_CLIPS
    ample = make_plan(large, wanted, batch_size=None, memory_gb=1000)
    assert ample.batch_size > 1000


def test_large_v3_by_orders_of_magnitude(large: Weights) -> None:
    wanted = wanted_of(max_new_tokens=444, device=GPU, dtype=torch.float16)
    plans = {
        form: plan_memory(large, replace(wanted, cross_attention=form), 256)
        for form in ("absorbed", "projected")
    }
    # 1,543,490,560 parameters.
    assert plans["absorbed"].weights == pytest.approx(2 * 1_543_490_560, rel=1e-3)
    # Layers, keys and values, clips, positions, width, bytes; and states [256, 1500, 1280].
    assert plans["absorbed"].self_attention_cache == pytest.approx(
        32 * 2 * 256 * 448 * 1280 * 2, rel=0.01
    )
    assert plans["absorbed"].cross_attention_state == 256 * 1500 * 1280 * 2
    assert plans["projected"].cross_attention_state == 32 * 2 * 256 * 1500 * 1280 * 2
    assert plans["absorbed"].fits(80 * 10**9)
    assert not plans["projected"].fits(80 * 10**9)
    assert plans["absorbed"].total < 40e9 < 80e9 < plans["projected"].total < 100e9


def test_a_gpu_has_workspaces_and_recordings_of_small_batches(weights: Weights) -> None:
    wanted = wanted_of(device=GPU)
    on_cpu, on_gpu = plan_memory(weights, wanted_of(), 8), plan_memory(weights, wanted, 8)
    assert on_cpu.workspace == 0
    # cuBLAS's, on a Hopper.
    assert on_gpu.workspace > 32 * MIB
    # Long prompts go through products that are not recorded, on another stream.
    few, more = (plan_memory(weights, wanted_of(device=GPU, prompt_tokens=9), n) for n in (4, 6))
    assert few.workspace > 2 * 32 * MIB > more.workspace
    # A recording has features [80, 200] and states [100, 128] of its own.
    three, four, seven, eight = (plan_memory(weights, wanted, n).encoder for n in (3, 4, 7, 8))
    assert (four - three) - (eight - seven) == 4 * (80 * 200 + 100 * 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: give a whole number from 1 on"),
        ({"prompt_tokens": -1}, "prompt_tokens is -1: give a whole number from 1 on"),
        ({"num_beams": 1.0}, "num_beams is 1.0: give a whole number from 1 on"),
        ({"num_beams": True}, "num_beams is True: give a whole number from 1 on"),
        (
            {"cross_attention": "half"},
            "cross_attention is 'half': give auto, projected or absorbed",
        ),
        (
            {"dtype": torch.int8},
            "dtype is torch.int8: give one of torch.float32, torch.float16, torch.bfloat16, "
            "torch.float64",
        ),
        (
            {"dtype": "float16"},
            "dtype is 'float16': give one of torch.float32, torch.float16, torch.bfloat16, "
            "torch.float64",
        ),
        (
            {"device": torch.device("meta")},
            "the model is on the meta device: give the device it would run on",
        ),
    ],
)
def test_what_cannot_be_wanted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        wanted_of(**changes)


BOTH = "give either batch_size, or memory_gb for the most clips that fit"


@pytest.mark.parametrize(
    ("batch_size", "memory_gb", "message"),
    [
        (None, None, BOTH),
        (3, 8, BOTH),
        (0, None, "batch_size is 0: give a whole number from 1 on"),
        (2.0, None, "batch_size is 2.0: give a whole number from 1 on"),
        (None, 0, "memory_gb is 0: give a number above 0"),
        (None, -3.5, "memory_gb is -3.5: give a number above 0"),
        (None, float("nan"), "memory_gb is nan: give a number above 0"),
        (None, float("inf"), "memory_gb is inf: give a number above 0"),
        (None, "8", "memory_gb is '8': give a number above 0"),
        (None, True, "memory_gb is True: give a number above 0"),
    ],
)
def test_what_cannot_be_planned(
    weights: Weights, batch_size: Any, memory_gb: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        make_plan(weights, wanted_of(), batch_size=batch_size, memory_gb=memory_gb)


@pytest.mark.parametrize("form", ["auto", "absorbed", "projected"])
def test_a_budget_too_small_for_one_clip_says_how_much_is_needed(large: Weights, form: str) -> None:
    wanted = wanted_of(cross_attention=form, device=GPU, dtype=torch.float16)
    with pytest.raises(OptionError) as caught:
        make_plan(large, wanted, batch_size=None, memory_gb=3)
    found = re.fullmatch(
        r"a budget of 3\.00 GB is too small for one clip, which takes (\d\.\d\d) GB; give more, or "
        "take fewer tokens, half precision or a smaller model",
        str(caught.value),
    )
    assert found is not None
    needed = float(found[1])
    assert make_plan(large, wanted, batch_size=None, memory_gb=needed + 0.005).batch_size >= 1
    with pytest.raises(OptionError):
        make_plan(large, wanted, batch_size=None, memory_gb=needed - 0.005)


def test_more_tokens_than_positions_cannot_be_planned(weights: Weights) -> None:
    assert plan_memory(weights, wanted_of(max_new_tokens=444), 1).total > 0
    message = "4 prompt and 445 new tokens are 449; the model has 448 positions"
    with pytest.raises(OptionError, match=f"^{message}$"):
        plan_memory(weights, wanted_of(max_new_tokens=445), 1)


def test_a_plan_for_a_gpu_elsewhere_needs_triton(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "find_spec", lambda name: None)
    message = "a plan for cuda:99, which is not here, needs Triton: pip install triton"
    with pytest.raises(MissingPackage, match=f"^{message}$"):
        plan_memory(weights, wanted_of(device=GPU), 1)
    assert plan_memory(weights, wanted_of(), 1).total > 0
