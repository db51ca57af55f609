"""Switches of kernel launches: the interpreter and programmatic dependent launch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl

from whisper_flash_attention.kernels import launch
from whisper_flash_attention.kernels.launch import (
    Overlap,
    compiling,
    pdl,
    release,
    release_late,
    set_pdl,
    wait,
)


@pytest.fixture(autouse=True)
def pdl_off_again() -> Iterator[None]:
    yield
    set_pdl(Overlap.NONE)
    launch._can_overlap.cache_clear()


@triton.jit
def twice_kernel(x, out, SIZE: tl.constexpr, PDL: tl.constexpr):
    place = tl.arange(0, SIZE)
    release(PDL)
    wait(PDL)
    value = 2 * tl.load(x + place)
    release_late(PDL)
    tl.store(out + place, value)


@triton.jit
def refused_kernel(x):
    tl.static_assert(False)


def test_it_is_off_until_turned_on() -> None:
    assert pdl(torch.device("cuda", 0)) == {"PDL": 0}


def test_a_cpu_never_overlaps() -> None:
    set_pdl(Overlap.EARLY)
    assert pdl(torch.device("cpu")) == {"PDL": 0}


@pytest.mark.parametrize(
    ("capability", "interpreted", "expected"),
    [
        ((8, 9), False, {"PDL": 0}),
        ((9, 0), False, {"PDL": 1, "launch_pdl": True}),
        ((12, 0), False, {"PDL": 1, "launch_pdl": True}),
        ((9, 0), True, {"PDL": 0}),
    ],
)
def test_it_needs_capability_9_and_compiled_kernels(
    capability: tuple[int, int],
    interpreted: bool,
    expected: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch._can_overlap.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch, "interpreted", lambda: interpreted)
    set_pdl(Overlap.EARLY)
    assert pdl(torch.device("cuda", 0)) == expected
    set_pdl(Overlap.NONE)
    assert pdl(torch.device("cuda", 0)) == {"PDL": 0}


@pytest.mark.parametrize("overlap", list(Overlap))
def test_dependent_kernels_see_what_the_one_before_wrote(
    device: torch.device, overlap: Overlap
) -> None:
    set_pdl(overlap)
    buffers = torch.full((21, 1024), float("nan"), device=device)
    buffers[0] = torch.linspace(-1, 1, 1024)
    for source, target in pairwise(buffers):
        twice_kernel[(1,)](source, target, 1024, **pdl(device))
    assert torch.equal(buffers[-1], buffers[0] * 2**20)


@pytest.mark.gpu
def test_what_does_not_compile_can_be_left_out() -> None:
    x = torch.linspace(-1, 1, 1024, device="cuda")
    out = torch.empty_like(x)
    with compiling(ignore_errors=True):
        launch.launch(refused_kernel, (1,))(x)
        launch.launch(twice_kernel, (1,))(x, out, 1024, PDL=0)
    with pytest.raises(triton.CompilationError):
        launch.launch(refused_kernel, (1,))(x)
    launch.launch(twice_kernel, (1,))(x, out, 1024, PDL=0)
    assert torch.equal(out, 2 * x)
