"""Cross-attention over all keys against softmax in float64, compiled or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.cross_attention import (
    Config,
    Workspace,
    choose,
    choose_splits,
    cross_attention,
    workspace_size,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
VECTOR = Config("vector", block_m=1, block=16, warps=4, stages=2)
DOT = Config("dot", block_m=16, block=16, warps=4, stages=2)
CONFIGS = pytest.mark.parametrize("config", [VECTOR, DOT], ids=["vector", "dot"])
# The interpreter's maximum (of NumPy) warns of rows that are NaN throughout.
NAN_ROWS = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")


@dataclass
class Problem:
    """Random inputs, and one workspace for all runs: NaN at first, with counters of zero."""

    q: Tensor
    keys: Tensor
    values: Tensor
    rows_per_clip: int = 1
    workspaces: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self, splits: int = 1, **options: object) -> Tensor:
        out = torch.full_like(self.q, float("nan"))
        self.launch(out, splits, **options)
        return out

    def launch(self, out: Tensor, splits: int, **options: object) -> None:
        if splits not in self.workspaces:
            size = workspace_size(self.q.shape[0], self.keys.shape[1], splits)
            self.workspaces[splits] = (
                torch.full((size.partials,), float("nan"), device=self.q.device),
                torch.zeros(size.counters, dtype=torch.int32, device=self.q.device),
            )
        partials, counters = self.workspaces[splits]
        cross_attention(
            *(self.q, self.keys, self.values, out),
            partials=partials,
            counters=counters,
            splits=splits,
            rows_per_clip=self.rows_per_clip,
            **options,
        )

    def oracle(self) -> Tensor:
        """[R, D] float64."""
        clips, heads, _, width = self.keys.shape
        q = self.q.double().view(clips, self.rows_per_clip, heads, width).transpose(1, 2)
        weights = (q @ self.keys.double().mT).softmax(-1)
        return (weights @ self.values.double()).transpose(1, 2).reshape(self.q.shape)


def make(
    device: torch.device,
    dtype: torch.dtype,
    clips: int,
    heads: int,
    keys_count: int,
    rows_per_clip: int = 1,
) -> Problem:
    generator = torch.Generator().manual_seed(clips * 1000 + keys_count)
    q = torch.randn(clips * rows_per_clip, heads * 64, generator=generator) * 0.3
    both = torch.randn(2, clips, heads, keys_count, 64, generator=generator)
    return Problem(*(tensor.to(device, dtype) for tensor in (q, *both)), rows_per_clip)


def assert_close(out: Tensor, reference: Tensor) -> None:
    assert out.isfinite().all()
    error = (out.double() - reference).norm() / reference.norm()
    assert error < TOLERANCES[out.dtype]


@CONFIGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("clips", "heads", "keys_count", "rows_per_clip", "splits"),
    [
        (1, 1, 1, 1, 1),
        (2, 2, 37, 1, 1),
        (1, 2, 60, 1, 4),
        (1, 1, 100, 1, 3),
        (2, 1, 37, 3, 1),
        (1, 2, 50, 2, 3),
        (1, 1, 17, 18, 2),
    ],
)
def test_equals_a_softmax_over_all_keys_run_after_run(
    device: torch.device,
    dtype: torch.dtype,
    config: Config,
    clips: int,
    heads: int,
    keys_count: int,
    rows_per_clip: int,
    splits: int,
) -> None:
    if device.type == "cpu" and rows_per_clip > 16 and config is VECTOR:
        pytest.skip("one row per program: as few rows show it, and faster in the interpreter")
    if (device.type, dtype, config.variant) == ("cpu", torch.bfloat16, "dot"):
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices as integers")
    problem = make(device, dtype, clips, heads, keys_count, rows_per_clip)
    outputs = [problem.run(splits, config=config) for _ in range(3 if device.type == "cuda" else 2)]
    assert_close(outputs[0], problem.oracle())
    # Parts are merged in one order, whichever program comes last: bits are equal with splits too.
    assert all(torch.equal(outputs[0], later) for later in outputs[1:])
    assert not problem.workspaces[splits][1].any()


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    keys_count = data.draw(st.integers(1, 50), "keys")
    problem = make(
        device,
        data.draw(st.sampled_from((torch.float32, torch.float16)), "dtype"),
        data.draw(st.integers(1, 2), "clips"),
        data.draw(st.integers(1, 2), "heads"),
        keys_count,
        data.draw(st.integers(1, 3), "rows per clip"),
    )
    splits = data.draw(st.integers(1, -(-keys_count // 16)), "splits")
    config = data.draw(st.sampled_from((VECTOR, DOT)), "config")
    assert_close(problem.run(splits, config=config), problem.oracle())


@CONFIGS
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_finished_slots_are_zeros(
    device: torch.device, config: Config, splits: int
) -> None:
    # Clips of two beams of two tokens: the second beam of clip 0, and both of clip 1, are finished.
    problem = make(device, torch.float32, 2, 1, 40, rows_per_clip=4)
    reference = problem.oracle()
    problem.keys[1] = float("nan")
    problem.values[1] = float("nan")
    finished = torch.tensor([False, True, True, True], device=device)
    for _ in range(2):
        out = problem.run(splits, finished=finished, tokens_per_slot=2, config=config)
        assert_close(out[:2], reference[:2])
        assert torch.equal(out[2:], torch.zeros_like(out[2:]))
        assert not problem.workspaces[splits][1].any()


@NAN_ROWS
@CONFIGS
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_a_query_reaches_its_row_and_head_only(
    device: torch.device, config: Config, splits: int
) -> None:
    problem = make(device, torch.float32, 1, 2, 50, rows_per_clip=3)
    reference = problem.oracle()
    problem.q[1, 3] = float("nan")
    out = problem.run(splits, config=config)
    assert out[1, :64].isnan().all()
    assert_close(out[[0, 2]], reference[[0, 2]])
    assert_close(out[1, 64:], reference[1, 64:])


@NAN_ROWS
@CONFIGS
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_a_key_or_a_value_passes(device: torch.device, config: Config, splits: int) -> None:
    problem = make(device, torch.float32, 1, 2, 50)
    problem.keys[0, 0, 20, 5] = float("nan")
    problem.values[0, 1, 49, 9] = float("nan")
    out = problem.run(splits, config=config)
    assert out[0, :64].isnan().all()
    assert out[0, 64:].isnan().nonzero().flatten().tolist() == [9]


@CONFIGS
def test_keys_and_rows_may_have_any_strides(device: torch.device, config: Config) -> None:
    problem = make(device, torch.float16, 2, 2, 20, rows_per_clip=2)
    both = torch.full((3, 2, 2, 2, 24, 64), float("nan"), dtype=torch.float16, device=device)
    both[1, 0, :, :, :20] = problem.keys
    values = problem.values.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((4, 256), float("nan"), dtype=torch.float16, device=device)
    wide[:, :128] = problem.q
    moved = Problem(wide[:, :128], both[1, 0, :, :, :20], values, 2)
    assert torch.equal(moved.run(2, config=config), problem.run(2, config=config))


@CONFIGS
def test_huge_scores_stay_finite(device: torch.device, config: Config) -> None:
    problem = make(device, torch.float32, 1, 2, 60)
    problem.q.mul_(1e4)
    assert_close(problem.run(3, config=config), problem.oracle())


@given(
    clips=st.integers(1, 300),
    rows_per_clip=st.integers(1, 80),
    heads=st.sampled_from((6, 8, 12, 16, 20)),
    keys_count=st.integers(1, 1500),
)
def test_splits_are_never_more_than_tiles(
    clips: int, rows_per_clip: int, heads: int, keys_count: int
) -> None:
    rows = clips * rows_per_clip
    splits = choose_splits(rows, heads, keys_count, rows_per_clip=rows_per_clip)
    assert 1 <= splits <= -(-keys_count // choose(rows_per_clip).block)


def test_small_batches_are_split_and_large_ones_are_not() -> None:
    assert [choose_splits(rows, 16, 1500) for rows in (1, 4, 16, 32, 256)] == [12, 5, 2, 1, 1]
    assert choose_splits(1, 6, 1500) == 24
    assert choose_splits(5, 6, 1500, rows_per_clip=5) == 24


def test_one_split_needs_no_workspace(device: torch.device) -> None:
    assert workspace_size(64, 16, 1) == Workspace(0, 0)
    assert workspace_size(2, 6, 3) == Workspace(2 * 6 * 3 * 66, 12)
    problem = make(device, torch.float32, 1, 1, 20)
    out = torch.empty_like(problem.q)
    cross_attention(
        *(problem.q, problem.keys, problem.values, out), partials=None, counters=None, splits=1
    )
    assert_close(out, problem.oracle())


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    problem = make(device, torch.float32, 2, 2, 40)
    tensors = (problem.q, problem.keys, problem.values, problem.q.clone())
    partials = torch.zeros(2 * 2 * 2 * 66)
    counters = torch.zeros(4, dtype=torch.int32)

    def refuse(match: str, **options: object) -> None:
        arguments = {"partials": partials, "counters": counters, "splits": 2, "config": VECTOR}
        with pytest.raises(KernelShapeError, match=match):
            cross_attention(*tensors, **{**arguments, **options})

    refuse("splits must be 1 to 3", splits=4)
    refuse("splits must be 1 to 3", splits=0)
    refuse("partials must hold 528 elements of torch.float32 for 2 .* none", partials=None)
    refuse("partials must hold 528", partials=partials[:-1])
    refuse("counters must hold 4 elements of torch.int32 .* torch.int64", counters=counters.long())
    refuse("counters must be contiguous", counters=counters.repeat(2)[::2])
    refuse("2 clips of 2 rows each", rows_per_clip=2)
    refuse(r"finished must be \[2\]", finished=torch.zeros(3, dtype=torch.bool))
    refuse("finished", tokens_per_slot=1, finished=torch.zeros(2, 1, dtype=torch.bool))
    refuse("slots of 2 tokens", tokens_per_slot=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 64, 256])
def test_all_sizes(dtype: torch.dtype, width: int, rows: int) -> None:
    heads = width // 64
    problem = make(torch.device("cuda"), dtype, rows, heads, 1500 if rows < 64 else 300)
    reference = problem.oracle()
    for splits in {1, 2, 5, choose_splits(rows, heads, problem.keys.shape[2])}:
        outputs = [problem.run(splits) for _ in range(3)]
        assert_close(outputs[0], reference)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
        assert not problem.workspaces[splits][1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_per_clip", [2, 4, 5, 16, 20, 40, 64, 200])
def test_several_rows_of_a_clip(dtype: torch.dtype, rows_per_clip: int) -> None:
    problem = make(torch.device("cuda"), dtype, 3, 6, 1500, rows_per_clip)
    reference = problem.oracle()
    for splits in {1, 4, choose_splits(3 * rows_per_clip, 6, 1500, rows_per_clip=rows_per_clip)}:
        for _ in range(3):
            assert_close(problem.run(splits), reference)
            assert not problem.workspaces[splits][1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_clip", [1, 5])
def test_parts_meet_in_a_graph_replay_after_replay(rows_per_clip: int) -> None:
    problem = make(torch.device("cuda"), torch.float16, 8, 8, 1500, rows_per_clip)
    out = torch.zeros_like(problem.q)
    problem.launch(out, 12)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.launch(out, 12)
    expected = problem.run(12)
    assert_close(expected, problem.oracle())
    for _ in range(200):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
