"""Small things between host and device, for which neither waits for what the other is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Numbers as a tensor on a device; on a CPU it shares their memory.

    `torch.tensor(..., device=...)` waits until a GPU has done all that it was asked for.
    """
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Have tensors copied to the host; the function returned waits for that, and gives them."""
    if not tensors[0].is_cuda:
        return lambda: tensors
    copies = tuple(
        torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
        for each in tensors
    )
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def arrived() -> tuple[Tensor, ...]:
        event.synchronize()
        return copies

    return arrived
