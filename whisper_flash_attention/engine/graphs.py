"""CUDA graphs: a pass of hundreds of kernels launched with one call.

The first time that a pass is asked for it runs kernel by kernel (which compiles and loads them) and
is recorded afterwards; from then on the recording is replayed. Recordings name the addresses of the
state's buffers and of the weights: they die with either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Recorded passes by name. What they record must allocate nothing that outlives it."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what `launch` does, on the current stream; `key` must name it completely."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        launch()
        self._graphs[key] = record(launch)

    def clear(self) -> None:
        """Forget all recordings and give back their memory."""
        self._graphs.clear()


def record(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record the kernels that `launch` launches; none of them runs."""
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would also collect garbage and empty the allocator's cache: too slow here.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
