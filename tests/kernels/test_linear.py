"""Linear layers of a few rows against float64, in both variants, in place, and into caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.launch import interpreted
from whisper_flash_attention.kernels.linear import Config, choose, fitting, linear, qkv

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = tuple(TOLERANCE)
WIDTHS = (384, 512, 768, 1024, 1280)
CPU = torch.device("cpu")

GEMV = Config("gemv", 2, 32, 512)
DOT = Config("dot", 16, 16, 64)
SPLIT = Config("dot", 16, 16, 64, split=4)
VARIANTS = pytest.mark.parametrize("config", [GEMV, DOT, SPLIT], ids=["gemv", "dot", "split"])


@dataclass
class Layer:
    """Random arguments of one linear layer: x [R, K], weight [N, K] and the rest."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    residual: Tensor

    def expected(self, norm: bool, bias: bool, gelu: bool, residual: bool) -> Tensor:
        """The same in float64, with PyTorch's own layers."""
        y = self.x.double()
        if norm:
            gain, shift = self.norm_weight.double(), self.norm_bias.double()
            y = F.layer_norm(y, y.shape[1:], gain, shift, 1e-5)
        y = F.linear(y, self.weight.double(), self.bias.double() if bias else None)
        y = F.gelu(y) if gelu else y
        return y + self.residual.double() if residual else y


def random_layer(
    rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Layer:
    """A layer whose tensors lie between NaN, which a read beyond their ends would bring in."""
    generator = torch.Generator().manual_seed(rows * 10007 + n * 101 + k)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * std + mean
        padded = F.pad(values.flatten(), (64, 64), value=float("nan")).to(device, dtype)
        return padded[64:-64].view(shape)

    return Layer(
        x=normal(rows, k, mean=0.7, std=2.0),
        weight=normal(n, k, std=k**-0.5),
        bias=normal(n),
        norm_weight=normal(k, mean=1.0, std=0.3),
        norm_bias=normal(k, std=0.5),
        residual=normal(rows, n),
    )


def run(
    layer: Layer,
    config: Config | None = None,
    *,
    norm: bool = True,
    bias: bool = True,
    gelu: bool = False,
    residual: bool = False,
) -> Tensor:
    """`linear` into a buffer of NaN, with a NaN row on either side that must stay as it is."""
    rows, n = layer.residual.shape
    buffer = torch.full((rows + 2, n), float("nan"), dtype=layer.x.dtype, device=layer.x.device)
    out = buffer[1:-1]
    linear(
        layer.x,
        layer.weight,
        layer.bias if bias else None,
        out,
        norm_weight=layer.norm_weight if norm else None,
        norm_bias=layer.norm_bias if norm else None,
        gelu=gelu,
        residual=layer.residual if residual else None,
        config=config,
    )
    assert buffer[0].isnan().all() and buffer[-1].isnan().all()
    return out


def error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN, which compares false, if any element is NaN."""
    return float((out.double() - expected).norm() / expected.norm())


def skip_what_the_interpreter_cannot(config: Config, dtype: torch.dtype) -> None:
    if interpreted() and config.variant == "dot" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 257, 128), (2, 16, 384), (3, 37, 100), (17, 33, 65)]
)
def test_a_layer_is_what_pytorch_computes_in_float64(
    device: torch.device, config: Config, dtype: torch.dtype, rows: int, n: int, k: int
) -> None:
    skip_what_the_interpreter_cannot(config, dtype)
    layer = random_layer(rows, n, k, dtype, device)
    options = {"norm": True, "bias": True, "gelu": True, "residual": True}
    assert error(run(layer, config, **options), layer.expected(**options)) < TOLERANCE[dtype]


@VARIANTS
@pytest.mark.parametrize("option", ["norm", "bias", "gelu", "residual"])
@pytest.mark.parametrize("others", [False, True])
def test_every_option_changes_what_it_should(
    device: torch.device, config: Config, option: str, others: bool
) -> None:
    layer = random_layer(3, 20, 96, device=device)
    options = dict.fromkeys(("norm", "bias", "gelu", "residual"), others)
    flipped = options | {option: not others}
    assert error(run(layer, config, **options), layer.expected(**options)) < 1e-5
    assert error(run(layer, config, **flipped), layer.expected(**flipped)) < 1e-5
    assert error(run(layer, config, **flipped), layer.expected(**options)) > 1e-2


@VARIANTS
def test_the_residual_may_be_the_output(device: torch.device, config: Config) -> None:
    layer = random_layer(5, 48, 128, device=device)
    expected = layer.expected(norm=False, bias=True, gelu=False, residual=True)
    linear(
        layer.x, layer.weight, layer.bias, layer.residual, residual=layer.residual, config=config
    )
    assert error(layer.residual, expected) < 1e-5


@VARIANTS
def test_a_large_mean_does_not_spoil_the_variance(device: torch.device, config: Config) -> None:
    layer = random_layer(4, 16, 320, device=device)
    layer.x += 1000.0
    expected = layer.expected(norm=True, bias=True, gelu=False, residual=False)
    # The rounding of x itself to float32 costs 1000 * 2**-24 of a standard deviation of 2.
    assert error(run(layer, config), expected) < 1e-4


@VARIANTS
def test_gelu_is_exact_and_sees_the_rounded_value(device: torch.device, config: Config) -> None:
    layer = random_layer(8, 64, 64, torch.float16, device)
    plain = run(layer, config).float()
    out = run(layer, config, gelu=True)
    assert (out != F.gelu(plain).half()).float().mean() < 0.01
    assert (out != F.gelu(plain, approximate="tanh").half()).float().mean() > 0.1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 50),
    k=st.integers(1, 150),
    norm=st.booleans(),
    residual=st.booleans(),
    variant=st.sampled_from(["gemv", "dot"]),
    block_m=st.sampled_from([1, 2, 16, 32]),
    block_n=st.sampled_from([2, 8, 16, 32]),
    split=st.sampled_from([1, 2, 4]),
)
def test_any_shape_under_any_cut(
    rows: int,
    n: int,
    k: int,
    norm: bool,
    residual: bool,
    variant: Any,
    block_m: int,
    block_n: int,
    split: int,
) -> None:
    if not interpreted():
        pytest.skip("tries more shapes than are worth compiling")
    config = Config("gemv", block_m, block_n, 256)
    if variant == "dot":
        config = Config("dot", max(16, block_m), max(16, block_n), 64, split)
    layer = random_layer(rows, n, k)
    options = {"norm": norm, "bias": True, "gelu": False, "residual": residual}
    assert error(run(layer, config, **options), layer.expected(**options)) < 1e-5


@dataclass
class Projections:
    """Random arguments of `qkv` with caches full of NaN, and what they should hold after it."""

    arguments: dict[str, Any]
    q: Tensor
    keys: Tensor
    values: Tensor

    def check(self, tolerance: float) -> None:
        assert error(self.arguments["q_out"], self.q) < tolerance
        for name, expected in (("keys", self.keys), ("values", self.values)):
            found, written = self.arguments[name], ~expected.isnan()
            assert torch.equal(~found.isnan(), written)
            assert error(found[written], expected[written]) < tolerance


def random_projections(
    positions: list[int],
    tokens: int,
    d: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    *,
    norm: bool = True,
) -> Projections:
    slots, heads = len(positions), d // 64
    layer = random_layer(slots * tokens, 3 * d, d, dtype, device)
    # Two layers' keys and values in one buffer, one slot more than is used.
    caches = torch.full((2, 2, slots + 1, heads, capacity, 64), float("nan"), dtype=dtype)
    keys, values = caches.to(device)[1]
    q_weight, k_weight, v_weight = layer.weight.reshape(3, d, d)
    q_bias, _, v_bias = layer.bias.reshape(3, d)
    arguments = {
        "x": layer.x,
        "norm_weight": layer.norm_weight if norm else None,
        "norm_bias": layer.norm_bias if norm else None,
        "q_weight": q_weight,
        "q_bias": q_bias,
        "k_weight": k_weight,
        "k_bias": None,
        "v_weight": v_weight,
        "v_bias": v_bias,
        "q_out": torch.full_like(layer.x, float("nan")),
        "keys": keys,
        "values": values,
        "positions": torch.tensor(positions, dtype=torch.int32, device=device),
        "tokens_per_slot": tokens,
        "scale": 0.125,
    }
    y = layer.x.double()
    if norm:
        y = F.layer_norm(y, (d,), layer.norm_weight.double(), layer.norm_bias.double(), 1e-5)
    expected_keys, expected_values = keys.double(), values.double()
    k = F.linear(y, k_weight.double()).reshape(-1, heads, 64)
    v = F.linear(y, v_weight.double(), v_bias.double()).reshape(-1, heads, 64)
    for row in range(slots * tokens):
        slot, position = row // tokens, positions[row // tokens] + row % tokens
        if 0 <= position < capacity:
            expected_keys[slot, :, position] = k[row]
            expected_values[slot, :, position] = v[row]
    q = 0.125 * F.linear(y, q_weight.double(), q_bias.double())
    return Projections(arguments, q, expected_keys, expected_values)


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "tokens"),
    [
        ([3, 0, 6], 1),
        ([2], 4),
        pytest.param([0], 1, marks=pytest.mark.slow),
        pytest.param([4, 0], 3, marks=pytest.mark.slow),
    ],
)
def test_keys_and_values_go_to_their_positions_and_nowhere_else(
    device: torch.device, config: Config, dtype: torch.dtype, positions: list[int], tokens: int
) -> None:
    skip_what_the_interpreter_cannot(config, dtype)
    case = random_projections(positions, tokens, 128, 7, dtype, device)
    qkv(**case.arguments, config=config)
    case.check(TOLERANCE[dtype])


@VARIANTS
def test_positions_outside_the_cache_are_not_written(device: torch.device, config: Config) -> None:
    case = random_projections([5, 7, -1, 448, 3], 2, 64, 6, device=device)
    qkv(**case.arguments, config=config)
    case.check(1e-5)
    # Position 5 of slot 0; 0 of slot 2, whose first token stands at -1; 3 and 4 of slot 4.
    assert int((~case.keys.isnan()).sum()) == 4 * 64


@VARIANTS
def test_queries_keys_and_values_of_rows_as_they_are(device: torch.device, config: Config) -> None:
    case = random_projections([3, 0], 2, 64, 7, device=device, norm=False)
    qkv(**case.arguments, config=config)
    case.check(1e-5)


def test_blocks_that_do_not_divide_the_width_stay_within_their_weight(
    device: torch.device,
) -> None:
    case = random_projections([1, 2], 1, 192, 4, device=device)
    qkv(**case.arguments, config=Config("dot", 16, 128, 64))
    case.check(1e-5)


def test_queries_are_scaled_after_rounding(device: torch.device) -> None:
    case = random_projections([0], 1, 64, 1, torch.float16, device)
    qkv(**case.arguments | {"scale": 1.0}, config=DOT)
    whole = case.arguments["q_out"].clone()
    qkv(**case.arguments | {"scale": 0.3}, config=DOT)
    assert torch.equal(case.arguments["q_out"], (whole.float() * 0.3).half())


def test_a_key_bias_is_added_where_there_is_one(device: torch.device) -> None:
    case = random_projections([0], 1, 64, 1, device=device)
    bias = torch.linspace(-2, 2, 64, device=device)
    qkv(**case.arguments | {"k_bias": bias}, config=DOT)
    case.keys[0, :, 0] += bias.double()
    case.check(1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33, 64, 256])
def test_choices_are_powers_of_two_that_cover_the_work(
    rows: int, d: int, dtype: torch.dtype
) -> None:
    for n, k in ((d, d), (3 * d, d), (4 * d, d), (d, 4 * d)):
        for norm in (False, True):
            config = choose(rows, n, k, dtype, norm=norm)
            sizes = (config.block_m, config.block_n, config.block_k, config.split, config.warps)
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
            if config.variant == "gemv":
                assert config.block_m >= rows and k <= config.block_k < 2 * k
                assert n // config.block_n >= 132
            else:
                assert min(config.block_m, config.block_n, config.block_k // config.split) >= 16
                chunk = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
                fitted = fitting(config, dtype.itemsize, 99 * 1024)
                assert 1 <= fitted.stages <= config.stages
                assert fitted.stages * chunk <= 99 * 1024
                assert fitting(config, dtype.itemsize, 227 * 1024) == config


def test_one_row_is_for_cuda_cores_and_many_are_for_tensor_cores() -> None:
    assert choose(1, 1024, 1024, torch.float16).variant == "gemv"
    assert choose(32, 1024, 1024, torch.float16).variant == "dot"


def test_tiles_of_many_rows_leave_few_processors_idle() -> None:
    sizes = ((1280, 1280), (1280, 5120), (3840, 1280), (5120, 1280))
    found = [choose(128, n, k, torch.float16) for n, k in sizes]
    assert [2 * n // config.block_n for (n, _), config in zip(sizes, found, strict=True)] == [
        *(80, 80, 120, 160)
    ]
    assert [config.block_k for config in found] == [128, 128, 128, 64]
    assert choose(128, 1280, 1280, torch.float16, norm=True) != found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, r"weight must be contiguous \[16, 9\]"),
        ({"x": torch.zeros(2, 16)[:, ::2]}, "x must be contiguous .* is not contiguous"),
        ({"out": torch.zeros(3, 16)}, r"out must be contiguous \[2, 16\], but has shape \[3, 16\]"),
        ({"bias": torch.zeros(8)}, r"bias must be contiguous \[16\]"),
        ({"residual": torch.zeros(16)}, "residual must be"),
        ({"norm_weight": torch.zeros(8)}, "go together, but only one was given"),
        ({"weight": torch.zeros(16, 8).half()}, "like x .* but is torch.float16"),
        ({"x": torch.zeros(2, 8).double()}, "x must be float16, bfloat16 or float32"),
        ({"config": replace(GEMV, block_k=4)}, "gemv needs block_k of at least 8, but it is 4"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(16, 8),
        "bias": None,
        "out": torch.zeros(2, 16),
    }
    with pytest.raises(KernelShapeError, match=message):
        linear(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_slot": 2}, r"slots \* tokens_per_slot, 64 \* heads\]"),
        ({"keys": torch.zeros(2, 1, 4, 64)}, r"keys must be \[3 or more, 1, T, 64\]"),
        ({"values": torch.zeros(3, 1, 5, 64)}, "values must be"),
        ({"values": torch.zeros(3, 1, 4, 64).half()}, "values must be .* in torch.float32"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions must be int32"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, r"int32 \[3\], but is .* \[2\]"),
        ({"v_weight": torch.zeros(64, 32)}, "v_weight must be"),
        ({"v_bias": torch.zeros(32)}, "v_bias must be"),
        ({"norm_bias": None}, "go together, but only one was given"),
    ],
)
def test_caches_that_do_not_fit_are_errors(change: dict[str, Any], message: str) -> None:
    arguments = random_projections([0, 0, 0], 1, 64, 4).arguments
    with pytest.raises(KernelShapeError, match=message):
        qkv(**arguments | change)
