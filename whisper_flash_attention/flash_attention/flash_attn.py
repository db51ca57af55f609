"""The FlashAttention packages: `flash_attn` (FlashAttention-2) and `flash_attn_interface` (3).

Both are optional, compiled per CUDA and PyTorch version, and aligned bottom-right when causal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from whisper_flash_attention.flash_attention.base import (
    AttentionInputs,
    AttentionProblem,
    MaskKind,
)
from whisper_flash_attention.flash_attention.machine import THIS_MACHINE, Machine
from whisper_flash_attention.flash_attention.masking import kernel_ready
from whisper_flash_attention.flash_attention.reasons import (
    AMPERE,
    HALVES,
    HOPPER,
    cuda_reasons,
    head_dim_reasons,
    import_reasons,
    package_reasons,
)

VERSION_2, VERSION_3 = "flash_attn", "flash_attn_interface"
# Causality has been aligned bottom-right since 2.1; the extra pins what was read: 2.8.
OLDEST_RELEASE = (2, 8)


@dataclass(frozen=True, slots=True)
class FlashAttn:
    """FlashAttention-3 where it is installed and fits (Hopper, no dropout), else 2."""

    machine: Machine = THIS_MACHINE
    name: str = "flash_attn"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """Every reason against both versions; empty if one of them can run `problem`."""
        reasons = cuda_reasons(problem, self.machine, HALVES, AMPERE)
        reasons += head_dim_reasons(problem, multiple=8, most=256)
        if problem.mask is not MaskKind.NONE:
            reasons.append("takes no mask")
        if not self._version_3_reasons(problem, may_import=not reasons):
            return reasons
        reasons += package_reasons(self.machine, VERSION_2, "flash", OLDEST_RELEASE)
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
