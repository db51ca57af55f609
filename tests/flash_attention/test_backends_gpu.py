"""Every CUDA back-end against the oracle over the shared table, on memory poisoned with NaN."""

from __future__ import annotations

import pytest
import torch

from tests.flash_attention.cases import (
    ALL_CASES,
    DTYPES,
    MORE_CASES,
    Call,
    Case,
    assert_agrees,
    make_call,
)
from whisper_flash_attention.errors import UnsupportedAttention
from whisper_flash_attention.flash_attention import AttentionInputs, attend, explain

pytestmark = pytest.mark.gpu

CUDA_BACKENDS = (
    "reference",
    "sdpa_flash",
    "sdpa_cudnn",
    "sdpa_efficient",
    "xformers",
    "flash_attn",
)
ABSENT = ("is not installed", "cannot be imported", "is older than", "build with CUDA")


def poison(call: Call) -> None:
    """Leave NaN in the blocks that the allocator will hand out for outputs and workspaces."""
    for dtype in (call.q.dtype, torch.float32):
        blocks = [torch.full_like(call.k, float("nan"), dtype=dtype) for _ in range(4)]
        blocks += [torch.full_like(call.q, float("nan"), dtype=dtype) for _ in range(4)]
        del blocks


def reasons_against(call: Call, backend: str, dropout: float = 0.0) -> list[str]:
    """Skips where the package is absent; other reasons are for the caller to check."""
    inputs = AttentionInputs(
        call.q, call.k, call.v, causal=call.causal, mask=call.mask, dropout=dropout
    )
    reasons = explain(inputs.problem)[backend]
    if any(mark in reason for mark in ABSENT for reason in reasons):
        pytest.skip("; ".join(reasons))
    return reasons


def require(call: Call, backend: str, dropout: float = 0.0) -> None:
    """Skip where the back-end cannot run the call; that it says so is tested by the table."""
    if reasons := reasons_against(call, backend, dropout):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    call = make_call(case, dtype, "cuda")
    if reasons := reasons_against(call, backend):
        with pytest.raises(UnsupportedAttention) as refusal:
            call.run(backend)
        assert reasons[0] in str(refusal.value)
        return
    wanted = call.exact().run_with_gradients("reference")
    poison(call)
    assert_agrees(call.run_with_gradients(backend), wanted, dtype)
    poison(call)
    with torch.inference_mode():
        assert_agrees({"out": call.run(backend)}, wanted, dtype)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_output_and_gradients_agree_with_the_oracle(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    check(case, dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_whole_table_agrees_with_the_oracle(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient"])
def test_torch_kernels_run_the_shapes_of_inference(backend: str, dtype: torch.dtype) -> None:
    """What must never be refused on a GPU of the last generations."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    for q_len, kv_len in ((1500, 1500), (1, 64), (1, 1500), (4, 4)):
        call = make_call(Case(q_len, kv_len, 6, 1, False, False), dtype, "cuda")
        assert reasons_against(call, backend) == []


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_a_query_without_keys_gives_zeros_and_passes_none_on(backend: str) -> None:
    call = make_call(Case(7, 20, 6, 3, False, True), torch.float16, "cuda")
    mask = torch.ones(3, 1, 7, 20, dtype=torch.bool, device="cuda")
    mask[0, :, 2] = False
    mask[1] = False
    call.mask = mask
    require(call, backend)
    wanted = call.exact().run_with_gradients("reference")
    found = call.run_with_gradients(backend)
    assert_agrees(found, wanted, torch.float16)
    assert not found["out"][0, 2].any() and not found["out"][1].any()
    assert not found["q"][1].any() and not found["k"][1].any() and not found["v"][1].any()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("shape", [(3, 1, 1, 20), (1, 1, 7, 20), (1, 6, 7, 20), (3, 6, 7, 20)])
def test_additive_masks_of_every_shape(backend: str, shape: tuple[int, ...]) -> None:
    call = make_call(Case(7, 20, 6, 3, True, False), torch.float16, "cuda")
    call.mask = torch.randn(shape, device="cuda").half()
    call.mask[..., 0] = float("-inf")
    require(call, backend)
    wanted = call.exact().run_with_gradients("reference")
    assert_agrees(call.run_with_gradients(backend), wanted, torch.float16)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    wide = torch.randn(3, 2, 9, 6, 67, device="cuda").half()
    q, k, v = wide[..., 2:66].unbind()
    call = Call(q, k, v, None, True, torch.ones_like(q))
    require(call, backend)
    out = call.run(backend)
    dense = (tensor.contiguous() for tensor in (q, k, v))
    torch.testing.assert_close(out, attend(*dense, causal=True, backend=backend))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_dropout_is_right_on_average_and_repeats_with_its_seed(backend: str) -> None:
    call = make_call(Case(64, 64, 6, 1, False, False), torch.float16, "cuda")
    require(call, backend, dropout=0.25)
    plain = call.run(backend).float()
    torch.manual_seed(0)
    first = call.run(backend, dropout=0.25)
    torch.manual_seed(0)
    assert torch.equal(first, call.run(backend, dropout=0.25))
    with torch.no_grad():
        runs = [call.run(backend, dropout=0.25).float() for _ in range(400)]
    assert not torch.equal(runs[0], runs[1])
    mean = torch.stack(runs).mean(0)
    assert (mean - plain).abs().mean() < 0.1 * (runs[0] - plain).abs().mean()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_gradients_see_the_same_dropout_as_the_output(backend: str) -> None:
    """Output and gradient of v are linear in the kept weights: <out, g> equals <v, dv>."""
    call = make_call(Case(64, 64, 6, 1, False, False), torch.float16, "cuda")
    require(call, backend, dropout=0.25)
    out = call.run(backend, dropout=0.25)
    (dv,) = torch.autograd.grad(out, call.v, call.upstream)
    left = (out.double() * call.upstream.double()).sum()
    right = (call.v.double() * dv.double()).sum()
    size = (out.double() * call.upstream.double()).norm()
    assert abs(left - right) < 0.05 * size


def test_auto_runs_every_case_of_the_table() -> None:
    for case in MORE_CASES:
        call = make_call(case, torch.float16, "cuda")
        wanted = call.exact().run_with_gradients("reference")
        assert_agrees(call.run_with_gradients("auto"), wanted, torch.float16)


@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers"])
def test_a_cuda_graph_replays_the_call(backend: str) -> None:
    call = make_call(Case(1, 447, 6, 3, False, False), torch.float16, "cuda")
    require(call, backend)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.run(backend)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call.run(backend)
        call.k.copy_(torch.randn_like(call.k))
        graph.replay()
        torch.testing.assert_close(out, call.run(backend))
