"""The back-ends: the formula itself, PyTorch's fused kernels, xFormers and FlashAttention.

PyTorch's kernels are called as the operators that `scaled_dot_product_attention` itself ends in, by
PyTorch's own bindings, not through `sdpa_kernel(...)`: that context manager sets flags of the whole
process (two threads that use it can leave PyTorch without its other kernels), costs time at every
call, and cannot ask the flash kernel for causality aligned bottom-right, which is what it has.
`tests/flash_attention/test_promises.py` guards their signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.flash_attention.masking import (
    bias_and_dead_rows,
    kernel_ready,
    padded_bias,
    silence,
)
from whisper_flash_attention.flash_attention.problem import (
    AttentionInputs,
    AttentionProblem,
    MaskKind,
)
from whisper_flash_attention.flash_attention.support import (
    AMPERE,
    HALF_DTYPES,
    HOPPER,
    THIS_MACHINE,
    Machine,
    Refusals,
    TorchKernel,
    cuda_reasons,
    dtype_reasons,
    head_dim_reasons,
    import_reasons,
    package_reasons,
    xformers_refusals,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """softmax(scale · q kᵀ + mask) v in float32 (float64 for float64), all weights in memory."""

    name: str = "reference"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """No reason ever: every device, dtype, mask and dropout will do."""
        return []

    def run(self, inputs: AttentionInputs) -> Tensor:
        """[B, Lq, H, D] in the dtype of q; dropout falls on the weights."""
        return _output(_weights(inputs), inputs)

    def run_with_weights(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """What `run` gives, and the weights before dropout [B, H, Lq, Lk] in the dtype of q."""
        weights = _weights(inputs)
        return _output(weights, inputs), weights.to(inputs.q.dtype)


def attention_weights(inputs: AttentionInputs) -> Tensor:
    """The attention weights [B, H, Lq, Lk] in the dtype of q, before dropout.

    Rows sum to 1, except those of queries that may attend to nothing: they are zero.
    """
    return _weights(inputs).to(inputs.q.dtype)


def _weights(inputs: AttentionInputs) -> Tensor:
    """Weights before dropout [B, H, Lq, Lk], float32 or float64."""
    wide = torch.float64 if inputs.q.dtype is torch.float64 else torch.float32
    q = inputs.q.transpose(1, 2).to(wide)  # [B, H, Lq, D]
    k = inputs.k.transpose(1, 2).to(wide)
    scores = torch.matmul(q * inputs.factor, k.transpose(2, 3))
    bias, dead = bias_and_dead_rows(inputs, wide, causal_as_bias=True)
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1)
    return silence(weights, None if dead is None else dead.transpose(1, 2))


def _output(weights: Tensor, inputs: AttentionInputs) -> Tensor:
    if inputs.dropout:
        weights = torch.dropout(weights, inputs.dropout, train=True)
    v = inputs.v.transpose(1, 2).to(weights.dtype)
    return torch.matmul(weights, v).transpose(1, 2).to(inputs.q.dtype)


_CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, slots=True)
class SdpaFlash:
    """FlashAttention-2 as PyTorch carries it: CUDA without masks, CPU without dropout."""

    machine: Machine = THIS_MACHINE
    refusals: Refusals = TorchKernel.FLASH.refusals
    name: str = "sdpa_flash"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        if problem.device_type == "cpu":
            reasons = dtype_reasons(problem, _CPU_DTYPES)
            if problem.dropout:
                reasons.append("takes no dropout on a CPU")
            return reasons
        reasons = cuda_reasons(problem, self.machine, HALF_DTYPES, AMPERE)
        if problem.mask is not MaskKind.NONE:
            reasons.append("takes no mask on a GPU")
        reasons += head_dim_reasons(problem, multiple=8, most=256)
        return reasons or self.refusals(problem)

    def run(self, inputs: AttentionInputs) -> Tensor:
        if inputs.q.device.type == "cpu":
            return self._run_on_cpu(inputs)
        # This operator's is_causal is aligned bottom-right, unlike that of the public function.
        out = torch._scaled_dot_product_flash_attention(
            *_heads_first(inputs), inputs.dropout, inputs.causal, False, scale=inputs.factor
        )
        return _tokens_first(out[0])

    def _run_on_cpu(self, inputs: AttentionInputs) -> Tensor:
        bias, dead = bias_and_dead_rows(inputs, inputs.q.dtype, causal_as_bias=not inputs.is_square)
        out = torch._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(inputs),
            0.0,
            inputs.causal and bias is None,
            attn_mask=bias,
            scale=inputs.factor,
        )
        return silence(_tokens_first(out[0]), dead)


@dataclass(frozen=True, slots=True)
class SdpaCudnn:
    """cuDNN's attention, the fastest on Hopper; it plans anew for each new shape."""

    machine: Machine = THIS_MACHINE
    refusals: Refusals = TorchKernel.CUDNN.refusals
    name: str = "sdpa_cudnn"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        reasons = cuda_reasons(problem, self.machine, HALF_DTYPES, AMPERE)
        reasons += head_dim_reasons(problem, multiple=8, most=128)
        if problem.kv_len == 1:
            reasons.append("needs two keys or more")
        if problem.dropout and problem.q_len == 1:
            reasons.append("takes no dropout with a one-token query")
        if (problem.dropout * 16) % 1:
            reasons.append("takes only multiples of 1/16 as dropout")
        return reasons or self.refusals(problem)

    def run(self, inputs: AttentionInputs) -> Tensor:
        bias, dead = bias_and_dead_rows(inputs, inputs.q.dtype, causal_as_bias=not inputs.is_square)
        if bias is not None:
            # Written out, since plans depend on strides: heads may share a bias, queries may not.
            bias = bias.expand(-1, -1, inputs.q.shape[1], inputs.k.shape[1]).contiguous()
        out = torch._scaled_dot_product_cudnn_attention(
            *_heads_first(inputs),
            bias,
            inputs.needs_grad,
            inputs.dropout,
            inputs.causal and bias is None,
            False,
            scale=inputs.factor,
        )
        return silence(_tokens_first(out[0]), dead)


@dataclass(frozen=True, slots=True)
class SdpaEfficient:
    """PyTorch's memory-efficient (CUTLASS) kernel: every mask, and float32, on any CUDA GPU."""

    machine: Machine = THIS_MACHINE
    refusals: Refusals = TorchKernel.EFFICIENT.refusals
    name: str = "sdpa_efficient"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        reasons = cuda_reasons(problem, self.machine, (*HALF_DTYPES, torch.float32), (5, 0))
        reasons += head_dim_reasons(problem, multiple=8 if problem.dtype in HALF_DTYPES else 4)
        return reasons or self.refusals(problem)

    def run(self, inputs: AttentionInputs) -> Tensor:
        bias, dead = bias_and_dead_rows(inputs, inputs.q.dtype, causal_as_bias=not inputs.is_square)
        out = torch._scaled_dot_product_efficient_attention(
            *_heads_first(inputs),
            None if bias is None else padded_bias(bias, inputs),
            inputs.needs_grad,
            inputs.dropout,
            inputs.causal and bias is None,
            scale=inputs.factor,
        )
        return silence(_tokens_first(out[0]), dead)


def _heads_first(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views [B, H, L, D]."""
    q, k, v = (kernel_ready(tensor).transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    return q, k, v


def _tokens_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


OLDEST_XFORMERS = (0, 0, 35)


@dataclass(frozen=True, slots=True)
class Xformers:
    """xFormers picks among kernels: flash without a mask, CUTLASS with one or in float32."""

    machine: Machine = THIS_MACHINE
    refusals: Refusals = xformers_refusals
    name: str = "xformers"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        half = problem.dtype in HALF_DTYPES
        needs_cutlass = not half or problem.mask is not MaskKind.NONE
        reasons = cuda_reasons(
            problem,
            self.machine,
            (*HALF_DTYPES, torch.float32),
            oldest=(5, 0) if needs_cutlass else AMPERE,
            newest=HOPPER if needs_cutlass else None,
        )
        reasons += head_dim_reasons(
            problem, multiple=8 if half else 4, most=None if needs_cutlass else 256
        )
        reasons += package_reasons(self.machine, "xformers", "xformers", OLDEST_XFORMERS)
        # Importing takes seconds: only where nothing else speaks against it.
        return reasons or import_reasons(self.machine, "xformers.ops") or self.refusals(problem)

    def run(self, inputs: AttentionInputs) -> Tensor:
        from xformers.ops import memory_efficient_attention

        bias, dead = bias_and_dead_rows(inputs, inputs.q.dtype, causal_as_bias=False)
        out: Tensor = memory_efficient_attention(
            kernel_ready(inputs.q),
            kernel_ready(inputs.k),
            kernel_ready(inputs.v),
            attn_bias=_causal_bias(inputs) if bias is None else padded_bias(bias, inputs),
            p=inputs.dropout,
            scale=inputs.factor,
        )
        return silence(out, dead)


def _causal_bias(inputs: AttentionInputs) -> Any:
    """xFormers' name for no bias, or for causality aligned bottom-right."""
    from xformers.ops import fmha

    if not inputs.causal:
        return None
    if inputs.is_square:
        return fmha.attn_bias.LowerTriangularMask()
    return fmha.attn_bias.LowerTriangularFromBottomRightMask()


VERSION_2, VERSION_3 = "flash_attn", "flash_attn_interface"
# Causality has been aligned bottom-right since 2.1; the extra pins what was read: 2.8.
OLDEST_FLASH_ATTN = (2, 8)


@dataclass(frozen=True, slots=True)
class FlashAttn:
    """FlashAttention-3 where it is installed and fits (Hopper, no dropout), else 2."""

    machine: Machine = THIS_MACHINE
    name: str = "flash_attn"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """Every reason against both versions; empty if one of them can run `problem`."""
        reasons = cuda_reasons(problem, self.machine, HALF_DTYPES, AMPERE)
        reasons += head_dim_reasons(problem, multiple=8, most=256)
        if problem.mask is not MaskKind.NONE:
            reasons.append("takes no mask")
        if not self._version_3_reasons(problem, may_import=not reasons):
            return reasons
        reasons += package_reasons(self.machine, VERSION_2, "flash", OLDEST_FLASH_ATTN)
        return reasons or import_reasons(self.machine, VERSION_2)

    def run(self, inputs: AttentionInputs) -> Tensor:
        q, k, v = (kernel_ready(tensor) for tensor in (inputs.q, inputs.k, inputs.v))
        if not self._version_3_reasons(inputs.problem, may_import=True):
            from flash_attn_interface import flash_attn_func as version_3

            out = version_3(q, k, v, softmax_scale=inputs.factor, causal=inputs.causal)
            # The first releases return the log-sum-exp too.
            attended: Tensor = out[0] if isinstance(out, tuple) else out
            return attended
        from flash_attn import flash_attn_func as version_2

        out_2: Tensor = version_2(
            q,
            k,
            v,
            dropout_p=inputs.dropout,
            softmax_scale=inputs.factor,
            causal=inputs.causal,
        )
        return out_2

    def _version_3_reasons(self, problem: AttentionProblem, *, may_import: bool) -> list[str]:
        if self.machine.version(VERSION_3) is None:
            return ["FlashAttention-3 is not installed"]
        if self.machine.capability(problem.device_index) != HOPPER or problem.dropout:
            return ["FlashAttention-3 needs Hopper and no dropout"]
        return import_reasons(self.machine, VERSION_3) if may_import else []
