"""Attention of whole sequences against softmax in float64, through pointers and descriptors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.encoder_attention import Config, attention, choose
from whisper_flash_attention.kernels.launch import Overlap, interpreted, set_pdl

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
HALF_DTYPES = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")

Loads = Literal["pointers", "descriptors"]
LOADS = pytest.mark.parametrize("loads", ["pointers", "descriptors"])


def small(loads: Loads) -> Config:
    """The smallest tiles that products on a GPU of capability 9.0 take, smaller ones without."""
    return Config(32, 16, loads=loads) if interpreted() else Config(64, 64, loads=loads)


@dataclass
class Problem:
    """q, k, v: slices of one buffer, NaN around; out: heads of NaN between others, NaN too."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    def run(self, scale: float = 0.125, config: Config | None = None) -> Tensor:
        attention(self.q, self.k, self.v, self.out, scale=scale, config=config)
        whole = self.out._base
        assert whole is not None
        mask = torch.ones_like(whole, dtype=torch.bool)
        out = self.out
        mask.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
        assert whole[mask].isnan().all() and mask.any()
        return out

    def expected(self, scale: float = 0.125) -> Tensor:
        q, k, v = (tensor.double() for tensor in (self.q, self.k, self.v))
        weights = torch.einsum("blhd,bmhd->bhlm", q, k).mul(scale).softmax(-1)
        return torch.einsum("bhlm,bmhd->blhd", weights, v)


def make(
    batch: int,
    length: int,
    heads: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device = CPU,
    *,
    fused: bool = True,
    margin: int = 8,
    std: float = 1.5,
) -> Problem:
    """Random inputs: peaked distributions, values with a mean of their own.

    `fused` rows hold q, k and v side by side, [B, L, 3, H, 64]; else each is [B, H, L, 64] in
    memory. Every sequence lies between NaN rows, every row between `margin` NaN.
    """
    generator = torch.Generator().manual_seed(batch * 10007 + length * 101 + heads)
    q, k, v = torch.randn(3, batch, length, heads, 64, generator=generator) * std
    parts = torch.stack((q, k, v + 0.3)).to(dtype)
    out = torch.full((batch, length, heads, 64), float("nan"))
    if fused:
        rows = parts.permute(1, 2, 0, 3, 4).flatten(2)
        padded = F.pad(rows, (margin, margin, 3, 2), value=float("nan")).to(device)
        inner = padded[:, 3:-2, margin:-margin].unflatten(-1, (3, heads, 64))
        q, k, v = inner.unbind(2)
        room = F.pad(out, (0, 0, 1, 2, 1, 1), value=float("nan")).to(device, dtype)
        return Problem(q, k, v, room[:, 1:-1, 1:-2])
    padded = F.pad(parts.transpose(2, 3), (0, 0, 3, 2), value=float("nan")).to(device)
    q, k, v = padded[:, :, :, 3:-2].transpose(2, 3)
    room = F.pad(out.transpose(1, 2), (0, 0, 1, 1), value=float("nan")).to(device, dtype)
    return Problem(q, k, v, room[:, :, 1:-1].transpose(1, 2))


def error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN, which compares false, if any element is NaN."""
    return float((out.double() - expected).norm() / expected.norm())


def skip_what_the_interpreter_cannot(dtype: torch.dtype) -> None:
    if interpreted() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")


@LOADS
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize(
    ("batch", "length", "heads"),
    [
        pytest.param(1, 1, 1, id="one key"),
        pytest.param(2, 16, 2, id="shorter than a tile"),
        pytest.param(1, 64, 3, id="whole tiles"),
        pytest.param(2, 65, 2, id="one key too many"),
        pytest.param(3, 47, 1, id="one key too few"),
    ],
)
def test_it_is_softmax_attention(
    device: torch.device,
    loads: Loads,
    dtype: torch.dtype,
    fused: bool,
    batch: int,
    length: int,
    heads: int,
) -> None:
    skip_what_the_interpreter_cannot(dtype)
    problem = make(batch, length, heads, dtype, device, fused=fused)
    assert error(problem.run(config=small(loads)), problem.expected()) < TOLERANCE[dtype]


@LOADS
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 32), (128, 128)])
def test_tiles_of_any_size(device: torch.device, loads: Loads, block_m: int, block_n: int) -> None:
    if not interpreted() and block_m < 64:
        pytest.skip("tiles that no GPU is meant to use")
    problem = make(1, 100, 2, device=device)
    out = problem.run(config=Config(block_m, block_n, loads=loads))
    assert error(out, problem.expected()) < TOLERANCE[torch.float16]


@LOADS
def test_float32_is_not_rounded(device: torch.device, loads: Loads) -> None:
    problem = make(2, 37, 2, torch.float32, device)
    config = replace(small(loads), block_m=16, block_n=16)
    assert error(problem.run(config=config), problem.expected()) < TOLERANCE[torch.float32]


@LOADS
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_scale_is_part_of_the_exponent(
    device: torch.device, loads: Loads, scale: float
) -> None:
    problem = make(1, 33, 1, device=device)
    out = problem.run(scale, small(loads))
    assert error(out, problem.expected(scale)) < TOLERANCE[torch.float16]
    assert error(out, problem.expected(0.125)) > 1e-2


@LOADS
def test_large_scores_do_not_overflow(device: torch.device, loads: Loads) -> None:
    problem = make(1, 40, 2, device=device, std=40.0)
    out = problem.run(1.0, small(loads))
    assert error(out, problem.expected(1.0)) < TOLERANCE[torch.float16]


@LOADS
def test_scores_far_below_zero_are_not_lost_to_the_padding(
    device: torch.device, loads: Loads
) -> None:
    """Keys beyond the end are zeros with a score of 0, far above all others here."""
    problem = make(1, 40, 1, device=device)
    problem.q.copy_(problem.q.abs() + 8)
    problem.k.copy_(-(problem.k.abs() + 8))
    assert error(problem.run(1.0, small(loads)), problem.expected(1.0)) < TOLERANCE[torch.float16]


@LOADS
def test_a_sequence_or_head_does_not_see_another_one(device: torch.device, loads: Loads) -> None:
    problem = make(3, 40, 2, device=device)
    before = problem.run(config=small(loads)).clone()
    for tensor in (problem.q, problem.k, problem.v):
        tensor[1] *= -2
        tensor[2, :, 1] *= -2
    after = problem.run(config=small(loads))
    assert torch.equal(before[0], after[0]) and torch.equal(before[2, :, 0], after[2, :, 0])
    assert (before[1] != after[1]).any(-1).all() and (before[2, :, 1] != after[2, :, 1]).any(
        -1
    ).all()


def test_misaligned_rows_are_loaded_through_pointers(device: torch.device) -> None:
    problem = make(1, 20, 1, device=device, margin=3)
    assert error(problem.run(), problem.expected()) < TOLERANCE[torch.float16]
    with pytest.raises(KernelShapeError, match='q, k, v have others: use loads="pointers"'):
        problem.run(config=small("descriptors"))


def test_one_tensor_may_be_queries_keys_and_values(device: torch.device) -> None:
    problem = make(2, 30, 2, device=device)
    problem.k = problem.v = problem.q
    assert error(problem.run(config=small("pointers")), problem.expected()) < 1e-3


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64)])
def test_nothing_to_attend_to_is_no_work(device: torch.device, shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape, dtype=torch.float16, device=device)
    attention(empty, empty, empty, empty, scale=1.0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    fused=st.booleans(),
    loads=st.sampled_from(["pointers", "descriptors"]),
    block_m=st.sampled_from([16, 32, 64]),
    block_n=st.sampled_from([16, 32, 64]),
)
def test_any_shape_under_any_cut(
    batch: int, length: int, heads: int, fused: bool, loads: Loads, block_m: int, block_n: int
) -> None:
    if not interpreted():
        pytest.skip("tries more shapes than are worth compiling")
    problem = make(batch, length, heads, fused=fused)
    out = problem.run(config=Config(block_m, block_n, loads=loads))
    assert error(out, problem.expected()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("heads", [6, 8, 12, 16, 20])
def test_few_sequences_are_cut_smaller(heads: int) -> None:
    few, many = choose(1, heads, 1500), choose(32, heads, 1500)
    assert few.block_m * few.block_n < many.block_m * many.block_n
    # The processors that have a tile to work on.
    assert heads * -(-1500 // few.block_m) >= 132


QUERIES = torch.zeros(2, 8, 3, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 9, 3, 64)}, r"k is \[2, 9, 3, 64\], not \[B, L, H, 64\] like q"),
        ({"q": torch.zeros(2, 8, 64)}, r"q is \[2, 8, 64\], not \[B, L, H, 64\]"),
        ({"q": torch.zeros(2, 8, 3, 32)}, r"q is \[2, 8, 3, 32\], not"),
        ({"v": torch.zeros(2, 8, 64, 3).transpose(2, 3)}, "v has strides .* last must be 1"),
        ({"out": torch.zeros(2, 8, 3, 64).half()}, "out is torch.float16 on cpu, not .* like q"),
        ({"q": QUERIES.double()}, "q is torch.float64 on cpu, not float16, bfloat16 or float32"),
        ({"scale": 0.0}, "scale must be positive, but is 0.0"),
        ({"scale": -1.0}, "scale must be positive, but is -1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"q": QUERIES, "k": QUERIES, "v": QUERIES, "out": torch.zeros_like(QUERIES)}
    with pytest.raises(KernelShapeError, match=message):
        attention(**arguments | {"scale": 0.125} | change)


@pytest.mark.gpu
def test_compiled_kernels_need_a_gpu() -> None:
    with pytest.raises(KernelShapeError, match="runs on CUDA devices, but q is on cpu"):
        attention(QUERIES, QUERIES, QUERIES, torch.zeros_like(QUERIES), scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", list(Overlap), ids=lambda overlap: overlap.name)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 6), (1, 20), (4, 16), (8, 20)])
def test_an_encoder_as_chosen(
    batch: int, heads: int, dtype: torch.dtype, fused: bool, overlap: Overlap
) -> None:
    set_pdl(overlap)
    try:
        problem = make(batch, 1500, heads, dtype, torch.device("cuda"), fused=fused)
        for loads in ("pointers", "descriptors"):
            config = replace(choose(batch, heads, 1500), loads=loads)
            out = problem.run(config=config)
            assert error(out, problem.expected()) < TOLERANCE[dtype], loads
    finally:
        set_pdl(Overlap.NONE)


@pytest.mark.gpu
def test_a_graph_replays_attention_on_new_input() -> None:
    problem = make(2, 200, 6, device=torch.device("cuda"))
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(problem.q, problem.k, problem.v, problem.out, scale=0.125)
    problem.q.neg_()
    problem.v.mul_(0.5)
    graph.replay()
    assert error(problem.out, problem.expected()) < TOLERANCE[torch.float16]
