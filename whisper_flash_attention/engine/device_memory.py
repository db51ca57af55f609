"""Memory of a GPU as its driver counts it, and what PyTorch's allocator takes from the driver."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

MIB = 2**20
# PyTorch's allocator serves up to 1 MiB from segments of 2 MiB, less than 10 MiB from segments of
# 20 MiB, and takes multiples of 2 MiB for more.
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT = 10 * MIB, 20 * MIB
STEP = 2 * MIB
# PyTorch's workspace of cuBLAS per stream: on devices of capability 9.0 and 10.x, and on others
# (`CUBLAS_WORKSPACE_CONFIG` in PyTorch's notes on CUDA).
CUBLAS_BYTES = (32 * MIB, 2 * 4 * MIB + 8 * 16 * 2**10)


def segment_bytes(size: int) -> int:
    """What the allocator takes from the driver for a tensor for which it has no room."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else -(-size // STEP) * STEP


def used_bytes(device: torch.device) -> tuple[int, bool]:
    """Memory in use by this process, and True; of the whole device, and False, where only that is
    known (in most containers).

    It includes the CUDA context and all that PyTorch's allocator has reserved.
    """
    own = _process_bytes(device)
    if own is not None:
        return own, True
    free, total = torch.cuda.mem_get_info(device)
    return total - free, False


def _process_bytes(device: torch.device) -> int | None:
    """Bytes of this process on the device by NVML; None where NVML does not report it."""
    try:
        import pynvml
    except ImportError:
        return None
    identity = str(torch.cuda.get_device_properties(device).uuid)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity.removeprefix('GPU-')}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return own[0] if own else None


def reserved_bytes(device: torch.device, sizes: Iterable[int]) -> int:
    """What the allocator's own pool will have reserved with further tensors of these sizes.

    Arenas and recordings have pools of their own, and do not count.
    """
    reserved = 0
    free: list[tuple[int, bool]] = []
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        if segment["device"] != (device.index or 0) or tuple(segment["segment_pool_id"]) != (0, 0):
            continue
        reserved += segment["total_size"]
        is_small = segment["segment_type"] == "small"
        holes = (each["size"] for each in segment["blocks"] if each["state"] == "inactive")
        free += [(hole, is_small) for hole in holes]
    for size in sizes:
        is_small = size <= SMALL
        fitting = (hole for hole, small in free if hole >= size and small == is_small)
        room = min(fitting, default=None)
        if room is None:
            room = segment_bytes(size)
            reserved += room
        else:
            free.remove((room, is_small))
        free.append((room - size, is_small))
    return reserved


# GPUs, by number, on which cuBLAS has been seen.
_with_cublas: set[int] = set()


def has_cublas(device: torch.device) -> bool:
    """Whether a handle of cuBLAS is there, as far as PyTorch's workspaces for it tell."""
    index = device.index or 0
    for segment in torch.cuda.memory_snapshot() if index not in _with_cublas else ():  # type: ignore[no-untyped-call]
        for block in segment["blocks"]:
            if segment["device"] == index and block.get("requested_size") in CUBLAS_BYTES:
                _with_cublas.add(index)
    return index in _with_cublas


def release_cached(device: torch.device, *, workspaces: bool) -> None:
    """Give back what PyTorch keeps for later: free segments, and the workspaces of cuBLAS.

    Args:
        workspaces: no recorded graph uses the workspaces any more.
    """
    torch.cuda.synchronize(device)
    has_cublas(device)  # which cannot be seen afterwards
    if workspaces:
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
