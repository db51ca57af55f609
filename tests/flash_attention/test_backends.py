"""Every back-end against the oracle over the shared table: CPU here, CUDA in test_backends_gpu."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.flash_attention.cases import (
    ALL_CASES,
    BATCHES,
    DTYPES,
    FEW_CASES,
    FITTING_CASES,
    HEADS,
    LENGTHS,
    MORE_CASES,
    Case,
    assert_agrees,
    make_call,
)
from whisper_flash_attention.flash_attention import attend

CPU_BACKENDS = ("reference", "sdpa_flash")


def check(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    wanted = call.exact().run_with_gradients("reference")
    for backend in CPU_BACKENDS:
        assert_agrees(call.run_with_gradients(backend), wanted, dtype)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_output_and_gradients_agree_with_the_oracle(case: Case) -> None:
    dtype = DTYPES[FEW_CASES.index(case) % len(DTYPES)]
    check(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FITTING_CASES, ids=str)
def test_the_whole_table_agrees_with_the_oracle(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_every_dtype_meets_every_mask(dtype: torch.dtype, causal: bool, padded: bool) -> None:
    check(Case(7, 20, 6, 3, causal, padded), dtype)


def test_the_small_tables_still_meet_every_length_head_count_and_batch() -> None:
    for cases in (FEW_CASES, MORE_CASES):
        assert {(case.q_len, case.kv_len) for case in cases} == set(LENGTHS)
        assert {(case.heads, case.batch) for case in cases} == set(product(HEADS, BATCHES))
        assert {(case.causal, case.padded) for case in cases} == set(product((0, 1), repeat=2))
        assert len(cases) < len(ALL_CASES) / 4


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "layout", ["sliced batch", "heads first", "odd rows", "columns", "one storage", "offset"]
)
def test_strides_do_not_matter(backend: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 9, 6, 64)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def laid_out() -> torch.Tensor:
        if layout == "sliced batch":
            return random(4, 9, 6, 64)[::2]
        if layout == "heads first":
            return random(2, 6, 9, 64).transpose(1, 2)
        if layout == "odd rows":
            return random(2, 9, 6, 67)[..., 2:66]
        if layout == "columns":
            return random(2, 64, 6, 9).transpose(1, 3)
        if layout == "one storage":
            return random(2, 9, 3, 6, 64)[:, :, 1]
        return random(1 + 2 * 9 * 6 * 64)[1:].view(shape)

    q, k, v = laid_out(), laid_out(), laid_out()
    assert q.shape == shape
    out = attend(q, k, v, causal=True, backend=backend)
    dense = (tensor.contiguous().clone() for tensor in (q, k, v))
    torch.testing.assert_close(out, attend(*dense, causal=True, backend=backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scale_is_the_factor_of_the_scores(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 5, 6, 64).unbind()
    out = attend(q, k, v, scale=0.3, backend=backend)
    torch.testing.assert_close(out, attend(q * 0.3, k, v, scale=1.0, backend=backend))
    assert not torch.allclose(out, attend(q, k, v, backend=backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_head_width_of_any_size_is_fine_on_a_cpu(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 4, 2, 5).unbind()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v))
    ).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, backend=backend), wanted)


def test_no_gradient_is_recorded_without_need() -> None:
    q = torch.randn(1, 3, 2, 64, requires_grad=True)
    with torch.no_grad():
        assert not attend(q, q, q).requires_grad
    assert attend(q, q, q).requires_grad
