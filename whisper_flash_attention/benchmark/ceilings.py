"""What this machine reaches: the copy bandwidth and the matmul rate that the roofline stands on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from whisper_flash_attention.benchmark.roofline import Ceilings

MIB = 2**20
ROUNDS = 5


def measure_ceilings(device_name: str, dtype_name: str) -> Ceilings:
    """Copy a large array and multiply two large matrices on the device.

    Bandwidth counts bytes read plus bytes written. Sizes are smaller on a CPU. Both are the best
    of a few rounds, each long enough for launches not to count.
    """
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    on_cpu = device.type == "cpu"
    numbers = (128 if on_cpu else 1024) * MIB // dtype.itemsize
    origin = torch.ones(numbers, dtype=dtype, device=device)
    target = torch.zeros_like(origin)  # touched, so that no page faults are timed
    copied = _best_seconds(lambda: target.copy_(origin), device)
    side = 8192
    if on_cpu:
        side = 2048 if dtype is torch.float32 else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    multiplied = _best_seconds(lambda: torch.mm(a, b, out=product), device)
    return Ceilings(2 * numbers * dtype.itemsize / copied, 2 * side**3 / multiplied)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, in the best of `ROUNDS` rounds."""
    calls = 1 if device.type == "cpu" else 10
    rounds = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
