"""How the kernels of this folder are launched: the interpreter, and overlap of dependent kernels.

Programmatic dependent launch (CUDA capability 9.0 and above) lets a kernel start while the one
before it on the stream still runs. Such a kernel may load constants (weights), must call `wait`
before any other memory access, and signals when its successor may start: `release` early, while
most of the work remains, or `release_late` near its end:

    @triton.jit
    def kernel(..., PDL: tl.constexpr):
        weights = tl.load(...)
        release(PDL)
        wait(PDL)
        ...                                   # reads activations, computes
        release_late(PDL)
        ...                                   # writes the result

    launch(kernel, grid)(..., **pdl(device))

`wait` returns when the kernel before has ended and its writes are visible. Since every kernel
waits, everything before that one has ended too. Reference: CUDA C++ Programming Guide,
"Programmatic Dependent Launch and Synchronization".

Launchers run kernels on the current CUDA device and stream: the caller selects them.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import IntEnum
from functools import cache, partial
from typing import Any, TypedDict

import torch
import triton
import triton.language as tl

# Threads that compile: most of a compilation runs outside Python's lock.
COMPILERS = 16


class PdlArguments(TypedDict, total=False):
    """Keyword arguments of a kernel launch."""

    PDL: int
    launch_pdl: bool


class Overlap(IntEnum):
    """When a kernel lets its successor start: after its own end, early, or near its end.

    Early hides the successor's start-up and its loads of constants. A successor without such loads
    would only occupy multiprocessors: late.
    """

    NONE = 0
    EARLY = 1
    LATE = 2


EARLY = tl.constexpr(int(Overlap.EARLY))
LATE = tl.constexpr(int(Overlap.LATE))


class _Switches(threading.local):
    overlap = Overlap.NONE
    compile_only = False


_switches = _Switches()


def set_pdl(overlap: Overlap) -> None:
    """Choose programmatic dependent launch, or none, for this thread's launches and captures."""
    _switches.overlap = overlap


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return `kernel[grid]`; within `compiling()`, a function that only compiles the kernel."""
    return partial(kernel.warmup, grid=grid) if _switches.compile_only else kernel[grid]


@contextmanager
def compiling(*, ignore_errors: bool = False) -> Iterator[None]:
    """Compile the kernels that the block launches, in parallel, instead of running them.

    Kernels in Triton's cache on disk are only loaded.

    Args:
        ignore_errors: skip kernels that do not compile; launching them will raise the error.
    """
    if interpreted():
        yield
        return
    with (
        ThreadPoolExecutor(COMPILERS) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=ignore_errors),
    ):
        _switches.compile_only = True
        try:
            yield
        finally:
            _switches.compile_only = False


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, instead of being compiled."""
    return bool(triton.knobs.runtime.interpret)


def pdl(device: torch.device) -> PdlArguments:
    """Additional arguments of a launch on `device`.

    `PDL` is the kernel's argument of that name; `launch_pdl` is Triton's, passed only where it is
    true: on devices of capability 9.0 and above, when turned on, and not in the interpreter.
    """
    if _switches.overlap and not interpreted() and _can_overlap(device):
        return {"PDL": int(_switches.overlap), "launch_pdl": True}
    return {"PDL": int(Overlap.NONE)}


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per program on `device`; those of an H100 if it is no GPU."""
    if device.type != "cuda":
        return 232_448
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def _can_overlap(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and their writes can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """With EARLY, let the next kernel start once all programs have reached this or ended."""
    if PDL == EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def release_late(PDL: tl.constexpr):
    """With LATE, as `release`."""
    if PDL == LATE:
        tl.extra.cuda.gdc_launch_dependents()
