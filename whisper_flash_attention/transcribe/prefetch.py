"""Batches on their way to a GPU: cut, put together and copied while it works on the one before.

A thread of its own does it, whose time is spent in copies that other threads need not wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whisper_flash_attention.engine.cuda_graphs import copying_stream

Batch = TypeVar("Batch")
Clip = npt.NDArray[np.float32]
# Clips that share one piece of pinned memory, which is used again once it is copied.
CLIPS_AT_A_TIME = 32


def prefetch(
    batches: Iterator[Batch], clips_of: Callable[[Batch], list[Clip]], device: torch.device
) -> Generator[tuple[Batch, list[Any]]]:
    """Each batch, and its clips on the device; the next batch is made ready meanwhile.

    What `batches` raises is raised where its batch would come. On a CPU nothing is copied, and
    nothing is done ahead. Once this generator is closed, no batch is taken any more.

    Args:
        batches: taken from another thread if there is a GPU.
        clips_of: a batch's mono clips `[T]`.
        device: of the copies.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, list(clips_of(batch))
        return

    # Made here: a new thread has no CUDA context to make it in.
    stream = copying_stream(device)

    def make() -> tuple[Batch, _Copies] | None:
        batch = next(batches, None)
        return None if batch is None else (batch, _Copies(clips_of(batch), stream))

    with ThreadPoolExecutor(1, thread_name_prefix="whisper-flash-staging") as thread:
        coming = thread.submit(make)
        while (made := coming.result()) is not None:
            coming = thread.submit(make)
            batch, copies = made
            yield batch, copies.arrived()


class _Copies:
    """Clips on their way to a GPU, on a stream beside the one that computes."""

    def __init__(self, clips: list[Clip], stream: torch.cuda.Stream) -> None:
        self._clips: list[Tensor] = []
        self._rooms: list[Tensor] = []
        with torch.cuda.stream(stream):
            for start in range(0, len(clips), CLIPS_AT_A_TIME):
                self._copy(clips[start : start + CLIPS_AT_A_TIME], stream.device)
            self._event = stream.record_event()

    def _copy(self, clips: list[Clip], device: torch.device) -> None:
        room = torch.empty((len(clips), max(len(clip) for clip in clips)), pin_memory=True)
        for row, clip in zip(room.numpy(), clips, strict=True):
            row[: len(clip)] = clip
        there = room.to(device, non_blocking=True)
        self._rooms.append(there)
        self._clips += [row[: len(clip)] for row, clip in zip(there, clips, strict=True)]

    def arrived(self) -> list[Tensor]:
        """The clips, which the current stream does not touch before they are there."""
        stream = torch.cuda.current_stream(self._rooms[0].device)
        stream.wait_event(self._event)
        for room in self._rooms:
            room.record_stream(stream)
        return self._clips
