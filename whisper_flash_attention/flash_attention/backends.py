"""The back-ends (the formula, PyTorch's fused kernels, xFormers, FlashAttention) and their limits.

Back-ends hold a `Machine`, so that their reasons (device, dtype, shapes, packages) can be tested
for other machines. The libraries' own checks require tensors: those made here have the right
shapes and share a few bytes.

PyTorch's kernels are called as the operators that `scaled_dot_product_attention` itself ends in, by
PyTorch's own bindings, not through `sdpa_kernel(...)`: that context manager sets flags of the whole
process (two threads that use it can leave PyTorch without its other kernels), costs time at every
call, and cannot request bottom-right causality from the flash kernel, which is what it computes.
`tests/flash_attention/test_promises.py` guards their signatures.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from whisper_flash_attention.flash_attention.problem import (
    AttentionInputs,
    AttentionProblem,
    MaskKind,
    bias_and_dead_rows,
    dtype_name,
    kernel_ready,
    padded_bias,
    silence,
)

Capability = tuple[int, int]


class Machine(Protocol):
    """Facts about a machine that back-ends depend on."""

    def capability(self, index: int) -> Capability | None:
        """CUDA compute capability of GPU `index`; None if there is no such GPU."""

    def version(self, module: str) -> str | None:
        """Version of the installed package that provides `module`; None if there is none."""

    def import_failure(self, module: str) -> str | None:
        """Why `module`, which is installed, cannot be imported; None if it can."""


class ThisMachine:
    """The machine of this process."""

    def capability(self, index: int) -> Capability | None:
        """PyTorch's value; None also where PyTorch was built without CUDA."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return None
        return torch.cuda.get_device_capability(index)

    @staticmethod
    @lru_cache
    def version(module: str) -> str | None:
        """Look it up without importing: optional packages take seconds to import."""
        if importlib.util.find_spec(module) is None:
            return None
        names = importlib.metadata.packages_distributions().get(module)
        return importlib.metadata.version(names[0]) if names else "of unknown version"

    @staticmethod
    @lru_cache
    def import_failure(module: str) -> str | None:
        """Import it: only this shows whether a compiled package fits this PyTorch."""
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            return " ".join(str(error).split())
        return None


THIS_MACHINE = ThisMachine()

HALF_DTYPES = (torch.float16, torch.bfloat16)
AMPERE: Capability = (8, 0)
HOPPER: Capability = (9, 0)

Refusals = Callable[[AttentionProblem], list[str]]


def cuda_reasons(
    problem: AttentionProblem,
    machine: Machine,
    dtypes: tuple[torch.dtype, ...],
    oldest: Capability,
    newest: Capability | None = None,
) -> list[str]:
    """Reasons of device, GPU generation and dtype against a CUDA kernel."""
    reasons = dtype_reasons(problem, dtypes)
    if problem.device_type != "cuda":
        return [f"needs a CUDA GPU, not {problem.device}", *reasons]
    found = machine.capability(problem.device_index)
    if found is None:
        return [f"there is no {problem.device} on this machine", *reasons]
    has = f"but {problem.device} has {_dotted(found)}"
    if found < oldest:
        reasons.append(f"needs compute capability {_dotted(oldest)} or newer, {has}")
    if newest is not None and found > newest:
        reasons.append(f"needs compute capability {_dotted(newest)} or older, {has}")
    if problem.dtype is torch.bfloat16 and oldest <= found < AMPERE:
        reasons.append(f"needs compute capability {_dotted(AMPERE)} for bfloat16, {has}")
    return reasons


def head_dim_reasons(
    problem: AttentionProblem, multiple: int, most: int | None = None
) -> list[str]:
    """Reasons of head width against a kernel."""
    reasons = []
    if problem.head_dim % multiple:
        reasons.append(f"needs a head_dim that is a multiple of {multiple}, not {problem.head_dim}")
    if most is not None and problem.head_dim > most:
        reasons.append(f"needs a head_dim of at most {most}, not {problem.head_dim}")
    return reasons


def dtype_reasons(problem: AttentionProblem, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """A reason unless the problem has one of `dtypes`."""
    if problem.dtype in dtypes:
        return []
    *others, last = (dtype_name(dtype) for dtype in dtypes)
    return [f"needs {', '.join(others)} or {last}, not {dtype_name(problem.dtype)}"]


def package_reasons(
    machine: Machine, module: str, extra: str, oldest: tuple[int, ...]
) -> list[str]:
    """A reason if the package of `module` is missing or older than `oldest`."""
    version = machine.version(module)
    install = f"'whisper-flash-attention[{extra}]'"
    if version is None:
        return [f"{module} is not installed: pip install {install}"]
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[: len(oldest)])
    if numbers and numbers < oldest:
        wanted = ".".join(map(str, oldest))
        return [f"{module} {version} is older than {wanted}: pip install --upgrade {install}"]
    return []


def import_reasons(machine: Machine, module: str) -> list[str]:
    """A reason if `module`, which is installed, cannot be imported. Imports it."""
    failure = machine.import_failure(module)
    return [] if failure is None else [f"{module} cannot be imported: {failure}"]


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


class TorchKernel(Enum):
    """The fused CUDA kernels of `torch.nn.functional.scaled_dot_product_attention`."""

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
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                can_use(params, debug=True)
        reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
        return reasons or [f"PyTorch refuses its {self.value} kernel and does not say why"]


_CAN_USE = {
    TorchKernel.FLASH: can_use_flash_attention,
    TorchKernel.CUDNN: can_use_cudnn_attention,
    TorchKernel.EFFICIENT: can_use_efficient_attention,
}


def sdpa_parameters(problem: AttentionProblem) -> SDPAParams:
    """`problem` as an argument of PyTorch's checks.

    Causality with Lq != Lk is left out: back-ends pass it as a mask, or call the flash kernel
    below the public function, which alone refuses it.
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


@dataclass(frozen=True, slots=True)
class Reference:
    """softmax(scale · q kᵀ + mask) v in float32 (float64 for float64), all weights in memory."""

    name: str = "reference"

    def why_not(self, problem: AttentionProblem) -> list[str]:
        """Empty: it runs every device, dtype, mask and dropout."""
        return []

    def run(self, inputs: AttentionInputs) -> Tensor:
        """[B, Lq, H, D] in the dtype of q; dropout applies to the weights."""
        return _output(_weights(inputs), inputs)

    def run_with_weights(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """The result of `run`, and the weights before dropout [B, H, Lq, Lk] in the dtype of q."""
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
    """PyTorch's FlashAttention-2: CUDA without masks, CPU without dropout."""

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
    """cuDNN's attention, the fastest on Hopper; it makes a plan for each new shape."""

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
    """xFormers, which chooses a kernel: flash without a mask, CUTLASS with one or in float32."""

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
        # Importing takes seconds: only if there is no other reason.
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
    """xFormers' bias for causality aligned bottom-right; None if not causal."""
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
