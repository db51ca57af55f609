"""The kernel's logits against float64, and its summary of each block against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.partials import empty_partials
from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels.logits import Config, choose, logits

ERRORS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", ERRORS, ids=str)
GEMV = Config("gemv", 1, 32, 128, 4, 1)
DOT = Config("dot", 16, 32, 64, 4, 2)


class Case:
    """Random inputs: V ids of which the last third are timestamps; poisoned outputs."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        slots: int = 2,
        width: int = 128,
        vocabulary: int = 101,
        tokens: int = 1,
        config: Config | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        def whole(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

        self.tokens = tokens
        begin = vocabulary * 2 // 3
        self.x = normal(slots * tokens, width) * 3 + 1
        self.weight, self.bias = 1 + normal(width) / 4, normal(width) / 4
        self.embedding = normal(vocabulary, width) / 4
        self.flags = (1 << whole(0, 5, vocabulary)).to(device, torch.uint8)
        stamp_from = whole(begin, vocabulary, slots)
        stamp_end = torch.minimum(
            stamp_from + whole(1, vocabulary, slots), torch.tensor(vocabulary)
        )
        text_from = whole(0, begin, slots)
        self.limits = torch.stack(
            [whole(0, 16, slots), text_from, stamp_from, stamp_end], dim=1
        ).to(device)
        self.settings = whole(0, 9, slots, 8).to(device)
        self.settings[:, 6] = begin
        self.partials = empty_partials(slots, self.embedding, config)
        self.partials.values.fill_(math.nan)
        self.partials.ids.fill_(-1)
        self.raw = torch.full((slots, vocabulary), math.nan, device=device, dtype=dtype)

    def run(self, norm: bool = True) -> None:
        logits(
            self.x,
            self.weight if norm else None,
            self.bias if norm else None,
            self.embedding,
            self.flags,
            self.limits,
            self.settings,
            self.partials,
            raw=self.raw,
            tokens_per_slot=self.tokens,
        )

    def expected_logits(self, norm: bool = True) -> torch.Tensor:
        rows = self.x[self.tokens - 1 :: self.tokens].double()
        if norm:
            rows = torch.nn.functional.layer_norm(
                rows, rows.shape[-1:], self.weight.double(), self.bias.double()
            )
        return rows @ self.embedding.double().T

    def check_logits(self, norm: bool = True) -> None:
        expected = self.expected_logits(norm)
        error = (self.raw.double() - expected).norm() / expected.norm()
        assert error < ERRORS[self.raw.dtype]

    def check_partials(self) -> None:
        """The summary is of the kernel's own logits, so ids and maxima are exact."""
        forbid, text_from, stamp_from, stamp_end = self.limits.T[..., None]
        begin = self.settings[:, 6, None]
        ids = torch.arange(self.raw.shape[1], device=self.raw.device)
        allowed = ((self.flags.int() & forbid) == 0) & (ids >= text_from)
        stamps = allowed & (ids >= begin) & (ids >= stamp_from) & (ids < stamp_end)
        for group, mask in enumerate((allowed & (ids < begin), stamps)):
            scores = self.raw.float().masked_fill(~mask, -math.inf)
            blocks = scores.split(self.partials.config.block_n, dim=1)
            assert len(blocks) == self.partials.values.shape[2]
            for block, part in enumerate(blocks):
                top = part.amax(dim=1)
                some = top > -math.inf
                # Of equal ones the lowest id, which `max` does not promise on a GPU.
                place = torch.arange(part.shape[1], device=part.device).expand_as(part)
                at = place.masked_fill(part < top[:, None], part.shape[1]).amin(dim=1)
                best = self.partials.values[2 * group, :, block]
                total = self.partials.values[2 * group + 1, :, block]
                assert torch.equal(best, top)
                found = self.partials.ids[group, :, block] - block * self.partials.config.block_n
                assert torch.equal(found[some].long(), at[some])
                shift = top.where(some, 0.0)[:, None]
                torch.testing.assert_close(total, (part - shift).exp().sum(dim=1))


@DTYPES
@pytest.mark.parametrize("config", [GEMV, DOT], ids=["gemv", "dot"])
@pytest.mark.parametrize(("slots", "tokens"), [(1, 1), (2, 4)])
def test_small(
    device: torch.device, dtype: torch.dtype, config: Config, slots: int, tokens: int
) -> None:
    if device.type == "cpu" and config is DOT and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices as integers")
    case = Case(device, dtype, slots=slots, tokens=tokens, config=config)
    case.run()
    case.check_logits()
    case.check_partials()


@pytest.mark.parametrize("config", [GEMV, DOT], ids=["gemv", "dot"])
def test_without_norm(device: torch.device, config: Config) -> None:
    case = Case(device, torch.float32, config=config)
    case.run(norm=False)
    case.check_logits(norm=False)
    case.check_partials()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 18),
    st.integers(1, 3),
    st.integers(3, 150),
    st.sampled_from([128, 384]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_shape(
    slots: int, tokens: int, vocabulary: int, width: int, gemv: bool, seed: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config("gemv", 1, 16, 512, 4, 1) if gemv and slots < 4 else DOT
    case = Case(
        device,
        torch.float32,
        slots=slots,
        tokens=tokens,
        vocabulary=vocabulary,
        width=width,
        config=config,
        seed=seed,
    )
    case.run()
    case.check_logits()
    case.check_partials()


def test_layer_norm_of_large_values(device: torch.device) -> None:
    """A residual stream far from zero: the variance must not be a difference of large squares."""
    for config in (GEMV, DOT):
        case = Case(device, torch.float32, config=config)
        case.x += 1000
        case.run()
        expected = case.expected_logits()
        assert (case.raw.double() - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("config", [GEMV, DOT], ids=["gemv", "dot"])
def test_ties_go_to_the_lowest_id(device: torch.device, config: Config) -> None:
    case = Case(device, torch.float32, config=config)
    case.embedding[:] = case.embedding[0]
    case.run()
    case.check_partials()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("config", [GEMV, DOT], ids=["gemv", "dot"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show_in_the_sums(
    device: torch.device, config: Config, bad: float
) -> None:
    case = Case(device, torch.float32, config=config)
    case.flags[:] = 0
    case.limits[:] = torch.tensor([0, 0, 67, 101])
    case.embedding[5] = bad
    case.embedding[40] = bad
    case.flags[40] = 1
    case.limits[:, 0] = 1
    case.run(norm=False)
    sums = case.partials.values[1]
    assert sums[:, 0].isnan().all()
    assert sums[:, 1:].isfinite().all() and case.partials.values[3].isfinite().all()


def test_rows_may_be_strided_and_untouched_memory_stays(device: torch.device) -> None:
    case = Case(device, torch.float32, tokens=2, config=DOT)
    case.run()
    plain = case.partials.values.clone()
    wide = torch.full((4, 200), math.nan, device=device)
    wide[:, :128] = case.x
    case.x = wide[:, :128]
    case.partials.values.fill_(math.nan)
    case.run()
    # Rows apart are loaded otherwise, and then a norm's sums have another order.
    torch.testing.assert_close(case.partials.values, plain)


def test_misfits_are_refused(device: torch.device) -> None:
    case = Case(device, torch.float32)
    case.tokens = 2
    with pytest.raises(KernelShapeError, match="do not fit"):
        case.run()
    case.tokens, case.weight = 1, None  # type: ignore[assignment]
    with pytest.raises(KernelShapeError, match="without norm_weight"):
        logits(
            case.x,
            None,
            case.bias,
            case.embedding,
            case.flags,
            case.limits,
            case.settings,
            case.partials,
        )
    with pytest.raises(KernelShapeError, match="divide"):
        Case(device, torch.float32, config=Config("dot", 16, 32, 96, 4, 2)).run()


@DTYPES
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16, 33, 64, 256])
def test_the_choice_is_possible(dtype: torch.dtype, width: int, slots: int) -> None:
    config = choose(slots, width, dtype)
    assert config.variant == ("gemv" if slots <= 2 else "dot")
    for size in (config.block_n, config.block_k, config.block_m):
        assert size == triton.next_power_of_2(size)
    assert config.variant == "gemv" or (width % config.block_k == 0 and config.block_m >= 16)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16, 33, 64, 256])
def test_whisper_sizes(dtype: torch.dtype, width: int, slots: int) -> None:
    case = Case(torch.device("cuda"), dtype, slots=slots, width=width, vocabulary=51865)
    case.run()
    case.check_logits()
    assert case.partials.values.isfinite().logical_or(case.partials.values == -math.inf).all()
    assert (case.partials.ids >= 0).all()
    case.check_partials()
