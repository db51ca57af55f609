"""xFormers' `memory_efficient_attention`, an optional package for CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    HOPPER,
    Refusals,
    cuda_reasons,
    head_dim_reasons,
    import_reasons,
    package_reasons,
)
from whisper_flash_attention.flash_attention.refusals import xformers_refusals

OLDEST_RELEASE = (0, 0, 35)


@dataclass(frozen=True, slots=True)
class Xformers:
    """xFormers picks among kernels: flash without a mask, CUTLASS with one or in float32."""

    machine: Machine = THIS_MACHINE
    refusals: Refusals = xformers_refusals
    name: str = "xformers"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        half = problem.dtype in HALVES
        needs_cutlass = not half or problem.mask is not MaskKind.NONE
        reasons = cuda_reasons(
            problem,
            self.machine,
            (*HALVES, torch.float32),
            oldest=(5, 0) if needs_cutlass else AMPERE,
            newest=HOPPER if needs_cutlass else None,
        )
        reasons += head_dim_reasons(
            problem, multiple=8 if half else 4, most=None if needs_cutlass else 256
        )
        reasons += package_reasons(self.machine, "xformers", "xformers", OLDEST_RELEASE)
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
