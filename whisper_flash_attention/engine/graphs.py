"""CUDA graphs: a pass of hundreds of kernels launched with one call.

The first time that a pass is asked for it runs kernel by kernel (which compiles and loads them) and
is recorded afterwards; from then on the recording is replayed. Recordings name the addresses of the
state's buffers and of the weights: they die with either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Pool:
    """Memory for the temporaries of recordings that never run at the same time: they share it."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """PyTorch's name for it; the first look needs a CUDA device."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class Graphs:
    """Recorded passes by name. What they record must allocate nothing that outlives it."""

    def __init__(self, pool: Pool | None = None) -> None:
        self._pool = pool or Pool()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what `launch` does, on the current stream; `key` must name it completely."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        launch()
        self._graphs[key] = record(launch, self._pool)

    def clear(self) -> None:
        """Forget all recordings and give back their memory."""
        self._graphs.clear()


def record(launch: Callable[[], object], pool: Pool | None = None) -> torch.cuda.CUDAGraph:
    """Record the kernels that `launch` launches; none of them runs.

    Without a pool the recording has memory of its own for its temporaries.
    """
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would also collect garbage and empty the allocator's cache: too slow here.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin((pool or Pool()).handle, capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
