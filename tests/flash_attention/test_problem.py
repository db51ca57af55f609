"""What is refused before any back-end is tried, and the description of a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whisper_flash_attention.flash_attention import AttentionInputs, MaskKind, attend

Q = torch.zeros(2, 3, 4, 8)
KV = torch.zeros(2, 5, 4, 8)
BOOL = torch.ones(2, 1, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (Q[0], KV, KV, r"q must be \[B, L, H, D\], but has shape \[3, 4, 8\]"),
        (Q, KV, KV[..., 0], r"v must be \[B, L, H, D\]"),
        (Q, KV.half(), KV, "k is float16 on cpu"),
        (Q, KV, KV.to("meta"), "v is float32 on meta"),
        (Q.long(), KV.long(), KV.long(), "floating point, but are int64"),
        (Q, KV, KV[:, :4], r"v is \[2, 4, 4, 8\]"),
        (Q, KV[:1], KV[:1], r"k is \[1, 5, 4, 8\]"),
        (Q, KV[:, :, :2], KV[:, :, :2], "agree on B, H and D"),
        (Q, KV[..., :4], KV[..., :4], "agree on B, H and D"),
        (Q, KV[:, :0], KV[:, :0], "empty axis"),
        (Q[:0], KV[:0], KV[:0], "empty axis"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(q: Tensor, k: Tensor, v: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(q, k, v)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (BOOL[..., :4], r"broadcast to .* \[2, 4, 3, 5\], but has shape \[2, 1, 3, 4\]"),
        (BOOL[None], "broadcast to"),
        (torch.ones(3, 1, 3, 5, dtype=torch.bool), "broadcast to"),
        (BOOL.to("meta"), "the mask is on meta"),
        (BOOL.long(), "must be bool .* or floating point .* but is int64"),
        (torch.zeros(3, 5, requires_grad=True), r"mask\.detach\(\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(Q, KV, KV, mask=mask)


def test_causal_needs_as_many_keys_as_queries() -> None:
    with pytest.raises(ValueError, match="k has 3 and q has 5"):
        attend(KV, Q, Q, causal=True)
    assert attend(KV, Q, Q).shape == KV.shape


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_must_be_a_share_below_one(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        attend(Q, KV, KV, dropout=dropout)


def test_a_problem_describes_the_call_without_its_tensors() -> None:
    mask = torch.zeros(3, 5, dtype=torch.float16)
    leaf = KV.clone().requires_grad_()
    problem = AttentionInputs(Q, leaf, KV, True, mask, None, 0.25).problem
    assert (problem.batch, problem.q_len, problem.kv_len) == (2, 3, 5)
    assert (problem.heads, problem.head_dim, problem.dtype) == (4, 8, torch.float32)
    assert problem.causal and problem.needs_grad and problem.dropout == 0.25
    assert (problem.mask, problem.mask_shape) == (MaskKind.ADDITIVE, (1, 1, 3, 5))
    assert str(problem) == (
        "q [2, 3, 4, 8], k and v [2, 5, 4, 8], float32 on cpu, causal, "
        "additive mask [1, 1, 3, 5], dropout 0.25, with gradients"
    )


def test_equal_calls_have_equal_problems_and_hashes() -> None:
    one, other = (AttentionInputs(Q, KV, KV, mask=BOOL).problem for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != AttentionInputs(Q, KV, KV).problem


def test_a_one_token_query_is_never_causal() -> None:
    assert not AttentionInputs(Q[:, :1], KV, KV, causal=True).problem.causal
    assert AttentionInputs(Q, KV, KV, causal=True).problem.causal
