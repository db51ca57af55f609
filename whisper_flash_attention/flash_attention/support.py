"""Why a back-end cannot run a problem: device, dtype, shapes, packages, the libraries' checks.

Back-ends hold a `Machine`, so that their reasons can be tested for machines that are not there. The
libraries judge tensors; the stand-ins made here have the right shapes and share a few bytes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from whisper_flash_attention.flash_attention.problem import AttentionProblem, MaskKind, dtype_name

Capability = tuple[int, int]


class Machine(Protocol):
    """The questions that back-ends ask."""

    def capability(self, index: int) -> Capability | None:
        """CUDA compute capability of GPU `index`; None if there is no such GPU."""

    def version(self, module: str) -> str | None:
        """Version of the installed package that provides `module`; None if there is none."""

    def import_failure(self, module: str) -> str | None:
        """Why `module`, which is installed, cannot be imported; None if it can."""


class ThisMachine:
    """The machine that we run on."""

    def capability(self, index: int) -> Capability | None:
        """What PyTorch says; None too where PyTorch was built without CUDA."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return None
        return torch.cuda.get_device_capability(index)

    def version(self, module: str) -> str | None:
        """Looked up without importing: optional packages take seconds to import."""
        return _version(module)

    def import_failure(self, module: str) -> str | None:
        """Imports it: whether a compiled package fits this PyTorch shows only then."""
        return _import_failure(module)


THIS_MACHINE = ThisMachine()


@lru_cache
def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


@lru_cache
def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return " ".join(str(error).split())
    return None


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
