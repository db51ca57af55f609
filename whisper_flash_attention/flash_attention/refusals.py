"""The last word of the libraries themselves on whether they can run a problem.

They judge tensors; ours have the right shapes and share a few bytes of memory.
"""

from __future__ import annotations

import warnings
from enum import Enum

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from whisper_flash_attention.flash_attention.base import AttentionProblem, MaskKind


class TorchKernel(Enum):
    """The fused CUDA kernels behind `torch.nn.functional.scaled_dot_product_attention`."""

    FLASH = "flash"
    CUDNN = "cuDNN"
    EFFICIENT = "memory-efficient"

    def refusals(self, problem: AttentionProblem) -> list[str]:
        """PyTorch's own reasons against this kernel for a CUDA problem; empty if it can run."""
        can_use = _CAN_USE[self]
        with torch.cuda.device(problem.device_index):
            params = sdpa_parameters(problem)
            if can_use(params):
                return []
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                can_use(params, debug=True)
        reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in said]
        return reasons or [f"PyTorch refuses its {self.value} kernel and does not say why"]


_CAN_USE = {
    TorchKernel.FLASH: can_use_flash_attention,
    TorchKernel.CUDNN: can_use_cudnn_attention,
    TorchKernel.EFFICIENT: can_use_efficient_attention,
}


def sdpa_parameters(problem: AttentionProblem) -> SDPAParams:
    """`problem` as PyTorch's checks take it.

    Causality that is not square goes unmentioned: we hand it over as a mask, or call the flash
    kernel below the public function, which is where it is refused.
    """
    q, kv = (_stand_in(problem, length).transpose(1, 2) for length in _lengths(problem))
    mask = _stand_in_mask(problem)
    causal = problem.causal and mask is None and problem.q_len == problem.kv_len
    return SDPAParams(q, kv, kv, mask, problem.dropout, causal, False)


def xformers_refusals(problem: AttentionProblem) -> list[str]:
    """xFormers' own reasons against each of its kernels for a CUDA problem; empty if one can run.

    Among them: its compiled part was built for another CUDA and does not load.
    """
    from xformers.ops import (
        MemoryEfficientAttentionCutlassOp,
        MemoryEfficientAttentionFlashAttentionOp,
        fmha,
    )

    q, kv = (_stand_in(problem, length) for length in _lengths(problem))
    bias = _stand_in_mask(problem)
    if bias is None and problem.causal:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    inputs = fmha.Inputs(query=q, key=kv, value=kv, attn_bias=bias, p=problem.dropout)
    reasons: list[str] = []
    for forward, backward in (
        MemoryEfficientAttentionFlashAttentionOp,
        MemoryEfficientAttentionCutlassOp,
    ):
        kernels = (forward, backward) if problem.needs_grad else (forward,)
        against = [
            f"{kernel.NAME}: {reason}"
            for kernel in kernels
            for reason in kernel.not_supported_reasons(inputs)
        ]
        if not against:
            return []
        reasons += against
    return reasons


def _lengths(problem: AttentionProblem) -> tuple[int, int]:
    return problem.q_len, problem.kv_len


def _stand_in(problem: AttentionProblem, length: int) -> Tensor:
    """[B, length, H, D]: one row of D numbers, repeated by its strides."""
    row = torch.empty(
        problem.head_dim,
        dtype=problem.dtype,
        device=problem.device,
        requires_grad=problem.needs_grad,
    )
    return row.expand(problem.batch, length, problem.heads, problem.head_dim)


def _stand_in_mask(problem: AttentionProblem) -> Tensor | None:
    """[B, H, Lq, Lk] in the dtype of the problem, which is how kernels get every mask."""
    if problem.mask is MaskKind.NONE:
        return None
    row = torch.empty(problem.kv_len, dtype=problem.dtype, device=problem.device)
    return row.expand(problem.batch, problem.heads, problem.q_len, problem.kv_len)
