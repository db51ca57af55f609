"""CUDA graphs: a pass of hundreds of kernels launched with one call.

The first run of a pass launches kernel by kernel (which compiles and loads them), the second is
recorded, and later runs replay the graph. A pass that runs once leaves no graph. Graphs hold the
addresses of the state's buffers and of the weights, and are valid as long as both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import numpy.typing as npt
import torch
from torch import Tensor

# The driver's flag for a stream that does not wait for the default one.
NON_BLOCKING = 1
DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")

# Steps between two polls for the end of a decode.
POLL_INTERVAL = 8


class GraphRecorder:
    """Records passes on one device. They never run at the same time, so they share one memory pool.

    They also share one stream: PyTorch allocates 32 MiB for cuBLAS per stream with products.
    """

    def __init__(self) -> None:
        # torch.cuda.MemPool; its `id` is what capture_begin takes, though the types say otherwise.
        self._pool: Any = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        # Whether a graph was recorded in the pool.
        self._is_used = False

    def launch(self, launch: Callable[[], object]) -> None:
        """Run what `launch` launches, kernel by kernel.

        Tensors that `launch` allocates must not outlive it.
        """
        self._renew_pool()
        device = torch.cuda.current_device()
        with recording(torch.device("cuda", device)), torch.cuda.use_mem_pool(self._pool):
            launch()
        _launched.add(device)

    def capture(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Record what `launch` launches, which must have run before, without running it."""
        self._renew_pool()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also collect garbage and empty the allocator's cache: too slow.
        with recording(torch.device("cuda", torch.cuda.current_device())):
            graph.capture_begin(self._pool.id, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        self._alive.add(graph)
        _graphs.add(graph)
        self._is_used = True
        return graph

    def record(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Run what `launch` launches, then record it."""
        self.launch(launch)
        return self.capture(launch)

    def _renew_pool(self) -> None:
        # PyTorch records no graph in a pool that outlived all of its graphs.
        if self._pool is None or (self._is_used and not self._alive):
            self._pool = torch.cuda.MemPool()
            self._is_used = False

    def release(self) -> None:
        """Release the memory pool, which lives as long as its graphs."""
        self._pool = None


# GPUs, by number, on which a pass has run, and all graphs of this process.
_launched: set[int] = set()
_graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def has_launched(device: torch.device) -> bool:
    """Whether a pass has run on this device, so that the driver has loaded its kernels."""
    return (device.index or 0) in _launched


def is_recorded() -> bool:
    """Whether a graph of this process may be replayed."""
    return bool(_graphs)


class GraphCache:
    """Recorded passes by name.

    Args:
        is_warm: the passes have run before, and are recorded at once.
    """

    def __init__(self, recorder: GraphRecorder, *, is_warm: bool = False) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._recorder = recorder
        self._is_warm = is_warm
        self._launched: set[Hashable] = set()

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Run `launch` on the current stream; replay it from its `key`'s second time on."""
        graph = self._graphs.get(key)
        if graph is None:
            if not self._is_warm and key not in self._launched:
                self._recorder.launch(launch)
                self._launched.add(key)
                return
            graph = self._graphs[key] = self._recorder.capture(launch)
        graph.replay()


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Run the block on the capture stream, ordered after prior and before later work on the current
    stream."""
    stream, current = capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device on which passes are recorded."""
    return _new_stream(device)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device for copies that overlap with computation."""
    return _new_stream(device)


@cache
def preparation_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device for small work that others wait for, ahead of the rest."""
    return _new_stream(device, priority=-1)


def _new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream that does not wait for the default one; those of lower numbers go first.

    From the driver if possible: PyTorch creates its whole pool of streams with the first one, and
    each takes device memory.
    """
    handle = ctypes.c_void_p()
    for name in DRIVER_LIBRARIES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        with torch.cuda.device(device):
            created = driver.cuStreamCreateWithPriority(
                ctypes.byref(handle), NON_BLOCKING, priority
            )
            if created == 0:
                return torch.cuda.ExternalStream(handle.value, device)  # type: ignore[no-untyped-call]
    return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Numbers as a tensor on a device; on a CPU it shares their memory.

    `torch.tensor(..., device=...)` waits until a GPU has finished all queued work.
    """
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start copying tensors to the host; the returned function waits and returns them."""
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


class CompletionPoll:
    """Poll whether all of `flags` (bool) are true, without waiting for the GPU.

    The result is a few steps old on a GPU, and current on a CPU.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self._flags = flags
        self._result = torch.zeros((), dtype=torch.bool, pin_memory=flags.is_cuda)
        self._event: torch.cuda.Event | None = None

    def all_true(self, *, wait: bool = False) -> bool:
        """Read the last copy if it has arrived, and start another.

        Args:
            wait: until the last copy has arrived.
        """
        if not self._flags.is_cuda:
            return bool(self._flags.all())
        if self._event is not None and wait:
            self._event.synchronize()
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            return False
        if self._event is not None and bool(self._result):
            return True
        self._result.copy_(self._flags.all(), non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()
        return False
