"""Reasons that several back-ends share, and their wording."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from whisper_flash_attention.flash_attention.base import AttentionProblem, dtype_name
from whisper_flash_attention.flash_attention.machine import Capability, Machine

HALVES = (torch.float16, torch.bfloat16)
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
    """A reason if the package behind `module` is missing or older than `oldest`."""
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
