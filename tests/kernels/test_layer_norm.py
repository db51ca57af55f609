"""Layer norm, its clamp and the bias it leaves behind, against float64 and PyTorch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.launch import Overlap, interpreted, set_pdl
from whisper_flash_attention.kernels.layer_norm import Config, choose, layer_norm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = tuple(TOLERANCE)
WIDTHS = (384, 512, 768, 1024, 1280)
LIMIT = 64504.0
CPU = torch.device("cpu")


def between_nans(values: Tensor, margin: int) -> Tensor:
    """The same rows [R, D] within a larger buffer: NaN above, below and on either side."""
    padded = F.pad(values, (margin, margin, 1, 1), value=float("nan"))
    return padded[1:-1, margin : margin + values.shape[1]]


def surroundings(view: Tensor) -> Tensor:
    """What `between_nans` put around a view."""
    whole = view._base
    assert whole is not None
    mask = torch.ones_like(whole, dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return whole[mask]


@dataclass
class Case:
    """Random arguments: x [R, D] as a slice, the vectors, and an output of NaN, also a slice."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor
    out: Tensor

    def run(self, config: Config | None = None, **options: Any) -> Tensor:
        layer_norm(self.x, self.weight, self.bias, self.out, eps=1e-5, config=config, **options)
        assert surroundings(self.x).isnan().all() and surroundings(self.out).isnan().all()
        return self.out

    def expected(self, limit: float | None = None, shift: Tensor | None = None) -> Tensor:
        """In float64, of the shifted and clamped x."""
        moved = self.x.double() if shift is None else self.x.double() + shift
        if limit is not None:
            # The limit, too, is a number of the dtype.
            bound = float(torch.tensor(limit, dtype=self.x.dtype))
            moved = moved.clamp(-bound, bound)
        return F.layer_norm(
            moved,
            self.weight.shape,
            self.weight.double(),
            self.bias.double(),
            1e-5,
        )


def make(
    rows: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    margin: int = 64,
    std: float = 2.0,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 10007 + d)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * std + mean
        return values.to(device, dtype)

    def vector(mean: float = 0.0, std: float = 1.0) -> Tensor:
        return between_nans(normal(1, d, mean=mean, std=std), 64)[0]

    return Case(
        x=between_nans(normal(rows, d, mean=0.7, std=std), margin),
        weight=vector(1.0, 0.3),
        bias=vector(0.0, 0.5),
        shift=vector().float(),
        out=between_nans(torch.full((rows, d), float("nan"), dtype=dtype, device=device), 128),
    )


def error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN, which compares false, if any element is NaN."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [384, 512, 640, 1280])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("config", [Config(1, 1), Config(4, 2)], ids=["one row", "four rows"])
def test_it_is_layer_norm_and_leaves_x_alone(
    device: torch.device, dtype: torch.dtype, d: int, rows: int, config: Config
) -> None:
    case = make(rows, d, dtype, device)
    before = case.x.clone()
    assert error(case.run(config), case.expected()) < TOLERANCE[dtype]
    assert torch.equal(case.x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [None, 1.5])
def test_a_shift_is_added_before_the_clamp(
    device: torch.device, dtype: torch.dtype, limit: float | None
) -> None:
    case = make(3, 384, dtype, device)
    before = case.x.clone()
    out = case.run(limit=limit, shift=case.shift)
    assert error(out, case.expected(limit, case.shift)) < TOLERANCE[dtype]
    assert error(out, case.expected(limit)) > 1e-1
    assert torch.equal(case.x, before)


def test_a_limit_alone_does_not_write_x(device: torch.device) -> None:
    case = make(3, 384, device=device)
    before = case.x.clone()
    assert error(case.run(limit=0.5), case.expected(0.5)) < 1e-5
    assert error(case.out, case.expected()) > 1e-2
    assert torch.equal(case.x, before)


def test_infinity_is_clamped_as_pytorch_does_it(device: torch.device) -> None:
    case = make(2, 384, torch.float16, device)
    case.x[0, 3], case.x[1, 5] = float("inf"), -float("inf")
    out = case.run(limit=LIMIT, shift=case.shift)
    assert error(out, case.expected(LIMIT, case.shift)) < TOLERANCE[torch.float16]


def test_nan_is_not_clamped_away(device: torch.device) -> None:
    case = make(2, 384, torch.float16, device)
    case.x[0, 7] = float("nan")
    out = case.run(limit=LIMIT, shift=case.shift)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("limit", [None, 1.5])
def test_the_output_may_be_x(device: torch.device, limit: float | None) -> None:
    case = make(5, 512, torch.float16, device)
    expected = case.expected(limit)
    case.out = case.x
    assert error(case.run(limit=limit), expected) < TOLERANCE[torch.float16]


def test_a_large_mean_does_not_spoil_the_variance(device: torch.device) -> None:
    case = make(4, 384, device=device)
    case.x += 1000.0
    # The rounding of x itself to float32 costs 1000 * 2**-24 of a standard deviation of 2.
    assert error(case.run(), case.expected()) < 1e-4


def test_rows_need_not_be_aligned(device: torch.device) -> None:
    case = make(4, 384, torch.float16, device, margin=3)
    assert error(case.run(), case.expected()) < TOLERANCE[torch.float16]


def test_no_rows_are_no_work(device: torch.device) -> None:
    empty, vector = torch.empty(0, 384, device=device), torch.ones(384, device=device)
    layer_norm(empty, vector, vector, empty.clone(), eps=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20),
    d=st.integers(1, 300),
    margin=st.integers(0, 9),
    limit=st.sampled_from([None, 0.5, 3.0]),
    shifted=st.booleans(),
    per_program=st.sampled_from([1, 2, 8]),
)
def test_any_shape_under_any_cut(
    rows: int, d: int, margin: int, limit: float | None, shifted: bool, per_program: int
) -> None:
    if not interpreted():
        pytest.skip("tries more shapes than are worth compiling")
    case = make(rows, d, margin=margin)
    shift = case.shift if shifted else None
    expected, before = case.expected(limit, shift), case.x.clone()
    case.run(Config(per_program, 1), limit=limit, shift=shift)
    # A row of few values may have next to no variance: what is left of it is rounding.
    torch.testing.assert_close(case.out.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(case.x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("rows", [1, 1500, 24000, 48000])
def test_choices_are_powers_of_two_that_fit_registers(
    rows: int, d: int, dtype: torch.dtype
) -> None:
    config = choose(rows, d, dtype)
    assert all(size > 0 and size & (size - 1) == 0 for size in (config.rows, config.warps))
    # Values that a thread holds, of 255 registers.
    assert config.rows * 2048 <= 64 * 32 * config.warps or d <= 1024
    assert config.rows * d <= 64 * 32 * config.warps


VECTOR = torch.zeros(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x must be \[R, D\] in float16, bfloat16 or float32"),
        ({"x": torch.zeros(2, 8).double()}, "but is .* in torch.float64"),
        ({"x": torch.zeros(2, 16)[:, ::2]}, r"x must be \[2, 8\] with adjacent values"),
        ({"x": torch.zeros(1, 8).expand(2, 8)}, "x must be .* rows apart"),
        ({"out": torch.zeros(3, 8)}, r"out must be \[2, 8\] .* but is \[3, 8\]"),
        (
            {"out": torch.zeros(2, 8).half()},
            "out must be torch.float32 on cpu, but is torch.float16",
        ),
        ({"weight": torch.zeros(9)}, r"weight must be contiguous \[8\], but is \[9\]"),
        ({"bias": torch.zeros(16)[::2]}, "bias must be contiguous"),
        ({"shift": torch.zeros(8).half()}, "shift must be torch.float32"),
        ({"limit": 0.0}, "limit must be positive, but is 0.0"),
        ({"limit": float("nan")}, "limit must be positive, but is nan"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 8),
        "weight": VECTOR,
        "bias": VECTOR,
        "eps": 1e-5,
    }
    arguments |= {"out": torch.zeros(2, 8)}
    with pytest.raises(KernelShapeError, match=message):
        layer_norm(**arguments | change)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", list(Overlap), ids=lambda overlap: overlap.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
def test_every_size_as_chosen(d: int, dtype: torch.dtype, overlap: Overlap) -> None:
    set_pdl(overlap)
    try:
        for rows in (1, 1500, 9001):
            case = make(rows, d, dtype, torch.device("cuda"))
            out = case.run(limit=3.0, shift=case.shift)
            assert error(out, case.expected(3.0, case.shift)) < TOLERANCE[dtype], rows
    finally:
        set_pdl(Overlap.NONE)


@pytest.mark.gpu
def test_a_graph_replays_the_norm_on_new_input() -> None:
    case = make(100, 1024, torch.float16, torch.device("cuda"))
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer_norm(case.x, case.weight, case.bias, case.out, eps=1e-5)
    case.x.neg_().add_(0.25)
    graph.replay()
    assert error(case.out, case.expected()) < TOLERANCE[torch.float16]
