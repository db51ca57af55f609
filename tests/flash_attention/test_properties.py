"""What attention must satisfy for any shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_flash_attention.flash_attention import attend

BACKENDS = st.sampled_from(["reference", "sdpa_flash", "auto"])
quick = settings(max_examples=40, deadline=None)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Lq, H, D], k and v [B, Lk, H, D] with Lk >= Lq, in float64."""
    batch, heads, q_len = (draw(st.integers(1, n)) for n in (3, 4, 12))
    kv_len = q_len + draw(st.integers(0, 12))
    width = draw(st.sampled_from([1, 3, 8, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q = torch.randn(batch, q_len, heads, width, generator=generator, dtype=torch.float64)
    k, v = torch.randn(
        2, batch, kv_len, heads, width, generator=generator, dtype=torch.float64
    ).unbind()
    return q, k, v


@quick
@given(tensors(), BACKENDS, st.floats(-50, 50))
def test_a_number_added_to_all_scores_changes_nothing(
    qkv: tuple[torch.Tensor, ...], backend: str, shift: float
) -> None:
    bias = torch.full((1, 1, 1, 1), shift, dtype=torch.float64)
    torch.testing.assert_close(
        attend(*qkv, mask=bias, backend=backend), attend(*qkv, backend=backend)
    )


@quick
@given(tensors(), BACKENDS, st.integers(0, 2**16))
def test_the_order_of_the_keys_does_not_matter(
    qkv: tuple[torch.Tensor, ...], backend: str, seed: int
) -> None:
    q, k, v = qkv
    order = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        attend(q, k[:, order], v[:, order], backend=backend), attend(q, k, v, backend=backend)
    )


@quick
@given(tensors(), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_back_ends_agree_on_any_shape_and_mask(
    qkv: tuple[torch.Tensor, ...], causal: bool, masked: bool, seed: int
) -> None:
    q, k, _ = qkv
    mask = None
    if masked:
        shape = (q.shape[0], 1, q.shape[1], k.shape[1])
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    outs = [
        attend(*qkv, causal=causal, mask=mask, backend=backend)
        for backend in ("reference", "sdpa_flash")
    ]
    torch.testing.assert_close(*outs)


@quick
@given(tensors(), BACKENDS)
def test_token_by_token_over_a_growing_cache_equals_the_whole(
    qkv: tuple[torch.Tensor, ...], backend: str
) -> None:
    q, k, v = qkv
    q_len, kv_len = q.shape[1], k.shape[1]
    whole = attend(q, k, v, causal=True, backend=backend)
    for i in range(q_len):
        seen = kv_len - q_len + i + 1
        step = attend(q[:, i : i + 1], k[:, :seen], v[:, :seen], causal=True, backend=backend)
        torch.testing.assert_close(step, whole[:, i : i + 1])


@quick
@given(tensors(), BACKENDS, st.integers(1, 5))
def test_chunk_by_chunk_equals_the_whole(
    qkv: tuple[torch.Tensor, ...], backend: str, size: int
) -> None:
    q, k, v = qkv
    offset = k.shape[1] - q.shape[1]
    chunks = []
    for start in range(0, q.shape[1], size):
        chunk = q[:, start : start + size]
        seen = offset + start + chunk.shape[1]
        chunks.append(attend(chunk, k[:, :seen], v[:, :seen], causal=True, backend=backend))
    whole = attend(q, k, v, causal=True, backend=backend)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole)


@quick
@given(tensors(), BACKENDS)
def test_outputs_lie_between_the_values(qkv: tuple[torch.Tensor, ...], backend: str) -> None:
    out, v = attend(*qkv, backend=backend), qkv[2]
    assert (out <= v.amax(1, keepdim=True) + 1e-9).all()
    assert (out >= v.amin(1, keepdim=True) - 1e-9).all()
