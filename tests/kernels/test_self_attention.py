"""Self-attention over the cache against softmax in float64, compiled or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.self_attention import Config, choose, self_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
EAGER = Config(block=16, warps=4, stages=3, eager=True)
LAZY = Config(block=16, warps=4, stages=2, eager=False)


@dataclass(frozen=True)
class Problem:
    """Random inputs; what no row may read is NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    tokens_per_slot: int

    def run(self, **options: object) -> Tensor:
        out = torch.full_like(self.q, float("nan"))
        self_attention(
            *(self.q, self.keys, self.values, self.positions, out),
            tokens_per_slot=self.tokens_per_slot,
            **options,
        )
        return out

    def oracle(self, ancestors: Tensor | None = None) -> Tensor:
        """[R, D] float64."""
        rows = []
        for row, q in enumerate(self.q.double()):
            slot = row // self.tokens_per_slot
            count = int(self.positions[slot]) + row % self.tokens_per_slot + 1
            owners = torch.full((count,), slot) if ancestors is None else ancestors[slot, :count]
            past = torch.arange(count, device=q.device)
            k = self.keys[owners.to(q.device), :, past].double()  # [count, H, 64]
            v = self.values[owners.to(q.device), :, past].double()
            weights = torch.einsum("hd,thd->ht", q.view(-1, 64), k).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, v).flatten())
        return torch.stack(rows)


def make(
    device: torch.device,
    dtype: torch.dtype,
    positions: list[int],
    heads: int,
    capacity: int,
    tokens_per_slot: int = 1,
) -> Problem:
    generator = torch.Generator().manual_seed(len(positions) * 1000 + capacity)
    slots = len(positions)
    q = torch.randn(slots * tokens_per_slot, heads * 64, generator=generator) * 0.3
    keys, values = torch.randn(2, slots, heads, capacity, 64, generator=generator)
    for slot, position in enumerate(positions):
        keys[slot, :, position + tokens_per_slot :] = float("nan")
        values[slot, :, position + tokens_per_slot :] = float("nan")
    return Problem(
        *(tensor.to(device, dtype) for tensor in (q, keys, values)),
        torch.tensor(positions, dtype=torch.int32, device=device),
        tokens_per_slot,
    )


def assert_close(out: Tensor, reference: Tensor) -> None:
    assert out.isfinite().all()
    error = (out.double() - reference).norm() / reference.norm()
    assert error < TOLERANCES[out.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [None, EAGER, LAZY], ids=["default", "eager", "lazy"])
@pytest.mark.parametrize(
    ("positions", "heads", "capacity", "tokens_per_slot"),
    [
        ([0], 1, 1, 1),
        ([15, 16, 0], 2, 37, 1),
        ([36, 31], 2, 37, 1),
        ([0, 14], 1, 19, 5),
    ],
)
def test_equals_a_softmax_over_the_past(
    device: torch.device,
    dtype: torch.dtype,
    config: Config | None,
    positions: list[int],
    heads: int,
    capacity: int,
    tokens_per_slot: int,
) -> None:
    problem = make(device, dtype, positions, heads, capacity, tokens_per_slot)
    assert_close(problem.run(config=config), problem.oracle())


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 50), "capacity")
    tokens_per_slot = data.draw(st.integers(1, min(3, capacity)), "tokens per slot")
    positions = st.lists(st.integers(0, capacity - tokens_per_slot), min_size=1, max_size=3)
    problem = make(
        device,
        data.draw(st.sampled_from((torch.float32, torch.float16)), "dtype"),
        data.draw(positions, "positions"),
        data.draw(st.integers(1, 2), "heads"),
        capacity,
        tokens_per_slot,
    )
    config = data.draw(st.sampled_from((EAGER, LAZY)), "config")
    assert_close(problem.run(config=config), problem.oracle())


@pytest.mark.parametrize("config", [EAGER, LAZY], ids=["eager", "lazy"])
def test_one_key_gives_its_value(device: torch.device, config: Config) -> None:
    problem = make(device, torch.float16, [0, 0], heads=2, capacity=20)
    assert torch.equal(problem.run(config=config), problem.values[:, :, 0].flatten(1))


@pytest.mark.parametrize("config", [EAGER, LAZY], ids=["eager", "lazy"])
def test_rows_of_finished_slots_are_zeros(device: torch.device, config: Config) -> None:
    problem = make(device, torch.float32, [20, 3, 17], heads=2, capacity=24, tokens_per_slot=2)
    reference = problem.oracle()
    problem.keys[1] = float("nan")
    problem.values[1] = float("nan")
    finished = torch.tensor([False, True, False], device=device)
    out = problem.run(finished=finished, config=config)
    assert torch.equal(out[2:4], torch.zeros_like(out[2:4]))
    assert_close(out[[0, 1, 4, 5]], reference[[0, 1, 4, 5]])


@pytest.mark.parametrize("config", [EAGER, LAZY], ids=["eager", "lazy"])
def test_ancestors_say_whose_past_is_read(device: torch.device, config: Config) -> None:
    problem = make(device, torch.float32, [33, 33, 33], heads=2, capacity=40)
    problem.positions[1] = 9
    ancestors = torch.randint(0, 3, (3, 40), generator=torch.Generator().manual_seed(5))
    # Of positions that are not reached: to follow these is to read outside the cache.
    ancestors[:, 34:] = ancestors[1, 10:] = 1_000_000
    reference = problem.oracle(ancestors)
    out = problem.run(ancestors=ancestors.to(device, torch.int32), config=config)
    assert_close(out, reference)
    assert (out.double() - problem.oracle()).norm() > 0.1 * reference.norm()


@pytest.mark.parametrize("config", [EAGER, LAZY], ids=["eager", "lazy"])
def test_caches_may_have_any_strides(device: torch.device, config: Config) -> None:
    problem = make(device, torch.float16, [18, 5], heads=2, capacity=23)
    both = torch.full((3, 2, 2, 2, 23, 64), float("nan"), dtype=torch.float16, device=device)
    both[1, 0].copy_(problem.keys)
    values = problem.values.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 256), float("nan"), dtype=torch.float16, device=device)
    wide[:, :128] = problem.q
    moved = Problem(wide[:, :128], both[1, 0], values, problem.positions, 1)
    assert torch.equal(moved.run(config=config), problem.run(config=config))


def test_nan_in_a_query_reaches_its_row_and_head_only(device: torch.device) -> None:
    problem = make(device, torch.float32, [20, 20], heads=2, capacity=24)
    reference = problem.run(config=LAZY)
    problem.q[1, 70] = float("nan")
    for config in (EAGER, LAZY):
        out = problem.run(config=config)
        assert out[1, 64:].isnan().all()
        assert_close(out[0], reference[0].double())
        assert_close(out[1, :64], reference[1, :64].double())


def test_nan_in_a_key_or_value_of_the_past_passes(device: torch.device) -> None:
    for config in (EAGER, LAZY):
        problem = make(device, torch.float32, [30], heads=2, capacity=31)
        problem.keys[0, 0, 3, 7] = float("nan")
        problem.values[0, 1, 29, 9] = float("nan")
        out = problem.run(config=config)
        assert out[0, :64].isnan().all()
        assert out[0, 64:].isnan().nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("config", [EAGER, LAZY], ids=["eager", "lazy"])
def test_positions_beyond_the_capacity_read_the_whole_cache(
    device: torch.device, config: Config
) -> None:
    problem = make(device, torch.float32, [19, 19], heads=1, capacity=20)
    reference = problem.oracle()
    problem.positions[1] = 448
    assert_close(problem.run(config=config), reference)


def test_huge_scores_stay_finite(device: torch.device) -> None:
    problem = make(device, torch.float32, [35, 2], heads=2, capacity=36)
    problem.q.mul_(1e4)
    for config in (EAGER, LAZY):
        assert_close(problem.run(config=config), problem.oracle())


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    problem = make(device, torch.float32, [3, 3], heads=2, capacity=8)
    q, keys, values, positions, out = (
        *(problem.q, problem.keys, problem.values, problem.positions),
        problem.q.clone(),
    )
    with pytest.raises(KernelShapeError, match=r"keys and values must both be \[B, H, T, 64\]"):
        self_attention(q, keys[..., :32], values[..., :32], positions, out)
    with pytest.raises(KernelShapeError, match=r"q and out must both be \[R, 128\]"):
        self_attention(q[:, :64], keys, values, positions, out)
    with pytest.raises(KernelShapeError, match="one dtype"):
        self_attention(q.half(), keys, values, positions, out)
    with pytest.raises(KernelShapeError, match="contiguous"):
        self_attention(q, keys.mT.contiguous().mT, values, positions, out)
    with pytest.raises(KernelShapeError, match="q must fit 2 slots of 3 tokens"):
        self_attention(q, keys, values, positions, out, tokens_per_slot=3)
    with pytest.raises(KernelShapeError, match="positions, finished, ancestors must fit"):
        self_attention(
            *(q, keys, values, positions[:1], out),
            finished=torch.zeros(3, dtype=torch.bool, device=device),
            ancestors=torch.zeros(2, 7, dtype=torch.int32, device=device),
        )


def test_few_programs_read_ahead_and_many_do_not() -> None:
    assert choose(1, 6, 448).eager
    assert choose(1, 6, 64).block < choose(1, 6, 448).block
    assert not choose(128, 16, 448).eager


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16, 33, 64, 256])
def test_all_sizes(dtype: torch.dtype, width: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    capacity = 448 if slots < 64 else 130
    positions = torch.randint(0, capacity, (slots,), generator=generator).tolist()
    problem = make(torch.device("cuda"), dtype, positions, width // 64, capacity)
    reference = problem.oracle()
    for config in (None, Config(64, 4, 2, False), Config(128, 8, 3, True), Config(32, 2, 3, False)):
        assert_close(problem.run(config=config), reference)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens_per_slot", [4, 200])
def test_prompts(tokens_per_slot: int) -> None:
    problem = make(torch.device("cuda"), torch.float16, [0, 17], 6, 256, tokens_per_slot)
    assert_close(problem.run(), problem.oracle())


@pytest.mark.gpu
def test_a_graph_follows_the_positions() -> None:
    problem = make(torch.device("cuda"), torch.float16, [100, 40], heads=6, capacity=128)
    out = torch.zeros_like(problem.q)
    arguments = (problem.q, problem.keys, problem.values, problem.positions, out)
    self_attention(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        self_attention(*arguments)
    for first, second in ((3, 40), (99, 0), (100, 39)):
        problem.positions.copy_(torch.tensor([first, second]))
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, problem.oracle())
