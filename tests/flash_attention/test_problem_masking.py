"""Causality, masks and queries without keys, the same in every back-end that runs on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.flash_attention.cases import Case, assert_agrees, make_call
from whisper_flash_attention.flash_attention import attend

CPU_BACKENDS = ("reference", "sdpa_flash")
pytestmark = pytest.mark.parametrize("backend", CPU_BACKENDS)


def test_a_one_token_query_against_a_cache_sees_every_key(backend: str) -> None:
    """Aligned top-left, as PyTorch's own is_causal, it would see key 0 only."""
    q = torch.randn(2, 1, 6, 64)
    k, v = torch.randn(2, 2, 30, 6, 64).unbind()
    out = attend(q, k, v, causal=True, backend=backend)
    torch.testing.assert_close(out, attend(q, k, v, backend=backend))
    top_left = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(top_left, v[:, :1])
    assert not torch.allclose(out, top_left, atol=0.1)


def test_several_queries_against_a_cache_are_aligned_bottom_right(backend: str) -> None:
    q = torch.randn(1, 3, 2, 64)
    k = torch.randn(1, 8, 2, 64)
    v = torch.eye(8)[None, :, None].expand(1, 8, 2, 8)
    v = torch.cat([v, torch.zeros(1, 8, 2, 56)], dim=-1)
    weights = attend(q, k, v, causal=True, backend=backend)[0, :, 0, :8]
    seen = weights != 0
    assert seen.sum(-1).tolist() == [6, 7, 8]
    assert seen[0].tolist() == [True] * 6 + [False] * 2


def test_a_mask_and_causality_both_apply(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 6, 2, 64).unbind()
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    out = attend(q, k, v, causal=True, mask=padding[:, None, None], backend=backend)
    both = padding[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(out, attend(q, k, v, mask=both, backend=backend))
    unpadded = attend(q[:1, 2:], k[:1, 2:], v[:1, 2:], causal=True, backend=backend)
    torch.testing.assert_close(out[:1, 2:], unpadded)
    assert not out[0, :2].any()


@pytest.mark.parametrize("closed", [float("-inf"), torch.finfo(torch.float32).min])
def test_additive_and_bool_masks_say_the_same(backend: str, closed: float) -> None:
    q, k, v = torch.randn(3, 2, 6, 2, 64).unbind()
    allowed = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed[0, :, 3] = False
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, closed)
    out = attend(q, k, v, mask=additive, backend=backend)
    torch.testing.assert_close(out, attend(q, k, v, mask=allowed, backend=backend))


def test_an_additive_mask_is_added_to_the_scores(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 6, 2, 64).unbind()
    bias = torch.randn(1, 2, 6, 6)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8 + bias
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v, mask=bias, backend=backend), wanted)


@pytest.mark.parametrize("shape", [(6,), (6, 6), (1, 1, 6), (2, 1, 1, 6), (1, 2, 6, 6)])
def test_masks_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, 2, 6, 2, 64).unbind()
    mask = torch.rand(shape) < 0.7
    mask[..., -1] = True
    out = attend(q, k, v, mask=mask, backend=backend)
    whole = mask.expand(2, 2, 6, 6).contiguous()
    torch.testing.assert_close(out, attend(q, k, v, mask=whole, backend=backend))


def test_very_low_finite_numbers_still_rank_the_keys_in_half_precision(backend: str) -> None:
    """-1e30 has no float16; a row of nothing else must not turn into one without keys."""
    q, k, v = torch.randn(3, 1, 4, 2, 64).half().unbind()
    out = attend(q, k, v, mask=torch.full((1, 1, 4, 4), -1e30), backend=backend)
    assert out.isfinite().all()
    assert out.any(dim=-1).all()


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_query_without_keys_gives_zeros_and_passes_none_on(
    backend: str, kind: str, causal: bool, dtype: torch.dtype
) -> None:
    call = make_call(Case(7, 20, 6, 3, causal, False), dtype)
    mask = torch.ones(3, 1, 7, 20, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    if kind != "bool":
        closed = float("-inf") if kind == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, closed)
    call.mask = mask
    wanted = call.exact().run_with_gradients("reference")
    found = call.run_with_gradients(backend)
    if kind == "lowest":
        # In float64 these numbers are not the lowest; the other two kinds say what they mean.
        wanted = found
    assert_agrees(found, wanted, dtype)
    assert not found["out"][0, 2].any() and found["out"][0, 3].any()
    assert not found["q"][0, 2].any() and found["q"][0, 3].any()
    assert not any(found[name][1].any() for name in ("out", "q", "k", "v"))


def test_causality_and_a_mask_can_close_a_row_together(backend: str) -> None:
    """Each alone leaves query 0 a key: causality key 0, the mask keys 1 and 2."""
    q, k, v = torch.randn(3, 1, 3, 2, 64, requires_grad=True).unbind()
    mask = torch.tensor([False, True, True])
    out = attend(q, k, v, causal=True, mask=mask, backend=backend)
    assert not out[0, 0].any()
    assert out[0, 1:].isfinite().all() and out[0, 1:].any()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all() and not gradient[0, 0].any()
