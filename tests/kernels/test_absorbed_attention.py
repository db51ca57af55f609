from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.absorbed_attention import (
    FORMULATIONS,
    MOST_SPLITS,
    AttentionConfig,
    absorbed_attention,
    choose_config,
    choose_splits,
    split_columns,
    workspace_shapes,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# `ring` has one shape: tests/kernels/test_absorbed_ring.py.
PLAIN = [each for each in FORMULATIONS if each != "ring"]
SIZES = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20}


def config(formulation: str, **options: int) -> AttentionConfig:
    """Small tiles, the smallest that the formulation takes."""
    options = {"queries": 16, "keys": 64 if formulation == "wgmma" else 16, "stages": 2} | options
    return AttentionConfig(formulation, **options)


def make(rows, clips, heads, d, keys, dtype, device):
    """Queries that give peaked, different distributions, and states with a mean of their own."""
    torch.manual_seed(rows * 1000 + d + keys)
    queries = torch.randn(rows, heads, d, device=device) * 3 / math.sqrt(d)
    states = torch.randn(clips, keys, d, device=device) + 0.3
    return queries.to(dtype), states.to(dtype)


def run(queries, states, splits=1, **options):
    """The combined mean [R, H, D] in float64, and the raw parts and statistics."""
    shapes = workspace_shapes(*queries.shape, splits)
    parts = torch.full(shapes[0], float("nan"), dtype=states.dtype, device=states.device)
    stats = torch.full(shapes[1], float("nan"), device=states.device)
    absorbed_attention(queries, states, parts, stats, splits=splits, **options)
    highest, total = stats.double().unbind(-1)
    shares = total * torch.exp2(highest - highest.amax(0))
    shares = torch.where(total > 0, shares, 0.0)
    mean = (parts.double() * (shares / shares.sum(0))[..., None]).sum(0)
    return mean, parts, stats


def wanted(queries, states, rows_per_clip=1):
    own = states.double().repeat_interleave(rows_per_clip, 0)[: len(queries)]
    weights = torch.einsum("rhd,rsd->rhs", queries.double(), own).softmax(-1)
    return torch.einsum("rhs,rsd->rhd", weights, own)


def assert_close(found, expected, dtype):
    assert found.isfinite().all()
    assert (found - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("formulation", PLAIN)
@pytest.mark.parametrize(
    ("rows", "heads", "d", "keys", "rows_per_clip", "splits"),
    [
        pytest.param(2, 2, 128, 37, 1, 1, id="one column block"),
        pytest.param(3, 6, 384, 50, 1, 2, id="two column blocks"),
        pytest.param(2, 20, 128, 100, 1, 3, id="20 heads"),
        pytest.param(10, 6, 128, 37, 5, 2, id="5 rows share a clip"),
        pytest.param(1, 3, 128, 20, 1, 4, id="parts without keys"),
    ],
)
def test_equals_softmax_over_states(
    device, formulation, rows, heads, d, keys, rows_per_clip, splits
) -> None:
    queries, states = make(rows, rows // rows_per_clip, heads, d, keys, torch.float16, device)
    queries_a_program = 16 if formulation == "blocks" else 24
    mean, parts, stats = run(
        queries, states, splits, 
        rows_per_clip=rows_per_clip, config=config(formulation, queries=queries_a_program),
    )  # fmt: skip
    assert_close(mean, wanted(queries, states, rows_per_clip), torch.float16)
    assert parts.isfinite().all()
    assert not stats.isnan().any()


@pytest.mark.parametrize("formulation", PLAIN)
def test_heads_of_a_clip_can_be_shared_among_programs(device, formulation) -> None:
    queries, states = make(2, 2, 20, 128, 40, torch.float16, device)
    mean, _, _ = run(queries, states, 2, config=config(formulation, queries=7))
    assert_close(mean, wanted(queries, states), torch.float16)


@pytest.mark.parametrize("formulation", PLAIN)
def test_statistics_are_in_base_two(device, formulation) -> None:
    queries, states = make(1, 1, 4, 128, 33, torch.float16, device)
    _, _, stats = run(queries, states, config=config(formulation))
    scores = torch.einsum("rhd,rsd->rhs", queries.double(), states.double()) / math.log(2)
    highest = scores.amax(-1)
    total = torch.exp2(scores - highest[..., None]).sum(-1)
    torch.testing.assert_close(stats[0, ..., 0].double(), highest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats[0, ..., 1].double(), total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("formulation", PLAIN)
def test_nothing_is_read_for_finished_slots(device, formulation) -> None:
    queries, states = make(8, 4, 4, 128, 37, torch.float16, device)
    states[1] = float("nan")
    finished = torch.tensor([False, True, False, False], device=device)
    mean, parts, stats = run(
        queries, states, 2,
        rows_per_clip=2, tokens_per_slot=2, finished=finished, config=config(formulation),
    )  # fmt: skip
    done = finished.repeat_interleave(2)
    assert (parts[:, done] == 0).all()
    assert (stats[:, done, :, 0] == -math.inf).all()
    assert (stats[:, done, :, 1] == 0).all()
    assert_close(mean[~done], wanted(queries, states, 2)[~done], torch.float16)


@pytest.mark.parametrize("formulation", PLAIN)
def test_a_clip_with_one_unfinished_beam_is_read(device, formulation) -> None:
    queries, states = make(4, 2, 4, 128, 37, torch.float16, device)
    finished = torch.tensor([True, False, True, True], device=device)
    mean, parts, _ = run(
        queries, states, rows_per_clip=2, finished=finished, config=config(formulation)
    )
    assert_close(mean[1], wanted(queries, states, 2)[1], torch.float16)
    assert (parts[:, 2:] == 0).all()


@pytest.mark.parametrize("formulation", PLAIN)
def test_a_clip_does_not_see_the_next_ones_states(device, formulation) -> None:
    """The last keys' tile reaches beyond the clip's end."""
    queries, states = make(1, 2, 4, 128, 37, torch.float16, device)
    states[1] = float("nan")
    mean, _, _ = run(queries, states, config=config(formulation))
    assert_close(mean, wanted(queries, states[:1]), torch.float16)


@pytest.mark.parametrize("formulation", PLAIN)
def test_large_scores_do_not_overflow(device, formulation) -> None:
    queries, states = make(1, 1, 4, 128, 37, torch.float16, device)
    mean, _, _ = run(queries * 30, states, 2, config=config(formulation))
    assert_close(mean, wanted(queries * 30, states), torch.float16)


def test_float32_is_true_float32(device) -> None:
    queries, states = make(3, 3, 6, 384, 37, torch.float32, device)
    mean, _, _ = run(queries, states, 2)
    assert_close(mean, wanted(queries, states), torch.float32)


@settings(max_examples=12, deadline=None)
@given(
    rows_per_clip=st.integers(1, 5),
    clips=st.integers(1, 3),
    heads=st.integers(1, 9),
    keys=st.integers(1, 70),
    splits=st.integers(1, 4),
    queries_a_program=st.integers(1, 33),
    formulation=st.sampled_from(("rows", "wgmma")),
    backwards=st.booleans(),
)
def test_any_shape(
    rows_per_clip, clips, heads, keys, splits, queries_a_program, formulation, backwards
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = rows_per_clip * clips
    queries, states = make(rows, clips, heads, 64, keys, torch.float16, device)
    mean, _, _ = run(
        queries, states, splits, rows_per_clip=rows_per_clip, backwards=backwards,
        config=config(formulation, queries=queries_a_program),
    )  # fmt: skip
    assert_close(mean, wanted(queries, states, rows_per_clip), torch.float16)


@pytest.mark.parametrize("formulation", PLAIN)
def test_backwards_is_the_same(device, formulation) -> None:
    queries, states = make(2, 2, 6, 128, 75, torch.float16, device)
    options = {"config": config(formulation), "splits": 2, "backwards": True}
    mean, _, _ = run(queries, states, **options)
    assert_close(mean, wanted(queries, states), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 64, 256])
def test_chosen_configuration_on_whisper_sizes(d, dtype, rows) -> None:
    queries, states = make(rows, rows, SIZES[d], d, 1500, dtype, "cuda")
    mean, _, _ = run(queries, states, choose_splits(rows, 1500))
    assert_close(mean, wanted(queries, states), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("formulation", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_formulations_on_whisper_sizes(d, formulation, dtype) -> None:
    if formulation == "wgmma" and d > 512:
        options = {"stages": 1 if d > 768 else 2, "warps": 4 if d <= 768 else 8}
    else:
        options = {"stages": 3, "warps": 8 if d > 768 else 4}
    rows = 8
    queries, states = make(rows, rows, SIZES[d], d, 1500, dtype, "cuda")
    mean, _, _ = run(queries, states, 2, config=config(formulation, **options))
    assert_close(mean, wanted(queries, states), dtype)


@pytest.mark.parametrize(
    ("d", "columns"),
    [(64, (64, 0)), (384, (256, 128)), (1280, (1024, 256)), (896, None), (48, None), (1056, None)],
)
def test_split_columns(d, columns) -> None:
    assert split_columns(d) == columns


def test_choices_fit_whisper_and_other_devices() -> None:
    for (d, heads), rows in product(SIZES.items(), (1, 5)):
        assert choose_config(rows * heads, d, torch.float16).formulation != "blocks"
        assert choose_config(rows * heads, d, torch.float32).formulation == "blocks"
        for capability in ((8, 0), (12, 0)):
            config = choose_config(rows * heads, d, torch.float16, capability)
            assert (config.formulation, config.keys, config.stages) == ("rows", 16, 2)
    assert choose_config(14, 896, torch.float16).formulation == "blocks"
    for keys, capability in ((37, (9, 0)), (1500, (10, 0))):
        few = choose_config(20, 1280, torch.float16, capability, keys=keys)
        assert few.formulation == "rows"


def test_splits_fill_the_device_and_no_more() -> None:
    assert choose_splits(128, 1500) == 1
    assert choose_splits(64, 1500) == 2
    assert choose_splits(32, 1500) == 4
    assert choose_splits(1, 1500) == MOST_SPLITS
    assert choose_splits(1, 37) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "not float32"),
        ({"d": 896, "heads": 14}, "two powers of two"),
        ({"d": 96}, "multiple of 64"),
        ({"clips": 1}, "rows per clip"),
        ({"splits": 3}, "workspaces"),
        ({"queries_dtype": torch.bfloat16}, "queries are"),
    ],
)
def test_refuses_with_reasons(change, message) -> None:
    shape = {"clips": 2, "d": 128, "heads": 2, "dtype": torch.float16, "splits": 2}
    shape |= change
    d, heads, dtype = shape["d"], shape["heads"], shape["dtype"]
    queries = torch.zeros(2, heads, d, dtype=shape.get("queries_dtype", dtype))
    states = torch.zeros(shape["clips"], 20, d, dtype=dtype)
    parts, stats = (torch.zeros(s) for s in workspace_shapes(2, heads, d, 2))
    with pytest.raises(KernelShapeError, match=message):
        absorbed_attention(
            queries, states, parts.to(dtype), stats,
            splits=shape["splits"], config=config("rows"),
        )  # fmt: skip
