"""PyTorch's fused attention kernels, each by name.

They are called as the operators that `scaled_dot_product_attention` itself ends in, by PyTorch's
own bindings, not through `sdpa_kernel(...)`: that context manager sets flags of the whole process
(two threads that use it can leave PyTorch without its other kernels), costs time at every call, and
cannot ask the flash kernel for causality aligned bottom-right, which is what it has.
`tests/flash_attention/test_promises.py` guards their signatures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whisper_flash_attention.flash_attention.base import (
    AttentionInputs,
    AttentionProblem,
    MaskKind,
)
from whisper_flash_attention.flash_attention.machine import THIS_MACHINE, Machine
from whisper_flash_attention.flash_attention.masking import (
    bias_and_dead_rows,
    kernel_ready,
    padded_bias,
    silence,
)
from whisper_flash_attention.flash_attention.reasons import (
    AMPERE,
    HALVES,
    Refusals,
    cuda_reasons,
    dtype_reasons,
    head_dim_reasons,
)
from whisper_flash_attention.flash_attention.refusals import TorchKernel

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
        reasons = cuda_reasons(problem, self.machine, HALVES, AMPERE)
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
        reasons = cuda_reasons(problem, self.machine, HALVES, AMPERE)
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
        reasons = cuda_reasons(problem, self.machine, (*HALVES, torch.float32), (5, 0))
        reasons += head_dim_reasons(problem, multiple=8 if problem.dtype in HALVES else 4)
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
