"""The oracle itself, against the formula written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from whisper_flash_attention.flash_attention import AttentionInputs, attend, attention_weights

B, LQ, LK, H, D = 2, 3, 5, 2, 4


def by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + mask) v, one number at a time."""
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(LQ):
                open_keys = [
                    j
                    for j in range(LK)
                    if (not causal or j <= i + LK - LQ) and (mask is None or mask[b, 0, i, j])
                ]
                powers = {
                    j: math.exp(float(q[b, i, h] @ k[b, j, h]) / math.sqrt(D)) for j in open_keys
                }
                for j, power in powers.items():
                    out[b, i, h] += power / sum(powers.values()) * v[b, j, h]
    return out


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, LQ, H, D, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, B, LK, H, D, generator=generator, dtype=torch.float64).unbind()
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_formula(
    tensors: tuple[Tensor, Tensor, Tensor], causal: bool, masked: bool
) -> None:
    mask = None
    if masked:
        mask = torch.rand(B, 1, LQ, LK, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[0, 0, 1] = False
    out = attend(*tensors, causal=causal, mask=mask, backend="reference")
    torch.testing.assert_close(out, by_hand(*tensors, causal, mask))


def test_gradients_are_those_of_the_formula(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    mask = torch.ones(B, 1, LQ, LK, dtype=torch.bool)
    mask[0, :, 1] = False
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, causal=True, mask=mask, backend="reference"), leaves
    )


def test_weights_sum_to_one_and_give_the_output(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = tensors
    weights = attention_weights(AttentionInputs(q, k, v, causal=True))
    assert weights.shape == (B, H, LQ, LK)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, LQ, dtype=torch.float64))
    assert not weights[:, :, 0, -2:].any()
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(out, attend(q, k, v, causal=True, backend="reference"))


def test_half_precision_is_computed_in_float32() -> None:
    """Scores beyond the largest float16 (65504) do not overflow."""
    q = torch.full((1, 1, 1, 64), 60.0, dtype=torch.float16)
    k = torch.stack([torch.full((64,), 60.0), torch.full((64,), 59.0)])[None, :, None].half()
    v = torch.tensor([1.0, -1.0]).half()[None, :, None, None].expand(1, 2, 1, 64)
    out = attend(q, k, v, scale=1.0, backend="reference")
    assert torch.equal(out, torch.ones_like(out))


def dropped(seed: int, share: float, times: int = 1) -> Tensor:
    """The kept weights [times, Lq, H, Lk]: the output for one-hot values, drawn `times` times."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 8, 2, 8, generator=torch.Generator().manual_seed(9)).unbind()
    v = torch.eye(8)[None, :, None].expand(1, 8, 2, 8)
    q, k, v = (tensor.expand(times, 8, 2, 8) for tensor in (q, k, v))
    return attend(q, k, v, dropout=share, backend="reference")


def test_dropout_zeroes_its_share_and_scales_the_rest() -> None:
    whole = dropped(0, 0.0, 500)
    kept = dropped(0, 0.3, 500)
    is_kept = kept != 0
    torch.testing.assert_close(kept[is_kept], whole[is_kept] / 0.7)
    assert is_kept.float().mean().item() == pytest.approx(0.7, abs=0.01)


def test_dropout_is_right_on_average_and_repeats_with_its_seed() -> None:
    assert torch.equal(dropped(4, 0.3), dropped(4, 0.3))
    assert not torch.equal(dropped(4, 0.3), dropped(5, 0.3))
    mean = dropped(0, 0.3, 5000).mean(0, keepdim=True)
    torch.testing.assert_close(mean, dropped(0, 0.0), atol=0.01, rtol=0.05)


def test_no_dropout_is_exact() -> None:
    assert torch.equal(dropped(0, 0.0), dropped(1, 0.0))


def test_gradients_follow_the_kept_weights() -> None:
    """out = P v with the kept weights P, so the gradient of v is Pᵀ g with the same P."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 8, 2, 8, generator=generator, dtype=torch.float64).unbind()
    one_hot = torch.eye(8, dtype=torch.float64)[None, :, None].expand(1, 8, 2, 8)
    torch.manual_seed(7)
    kept = attend(q, k, one_hot, dropout=0.4, backend="reference")  # [1, Lq, H, Lk]
    v = torch.randn(1, 8, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 8, 2, 8, generator=generator, dtype=torch.float64)
    torch.manual_seed(7)
    out = attend(q, k, v, dropout=0.4, backend="reference")
    torch.testing.assert_close(out, torch.einsum("bihj,bjhd->bihd", kept, v))
    (gradient,) = torch.autograd.grad(out, v, upstream)
    torch.testing.assert_close(gradient, torch.einsum("bihj,bihd->bjhd", kept, upstream))
