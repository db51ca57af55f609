"""Memory that two processes share, through which a decoder hands over blocks of samples.

The memory has no name in the file system (POSIX) and ends with the last process that has it, so
that nothing is left over, whoever is killed. On Linux it does not count against /dev/shm, which
containers keep small. Blocks of `multiprocessing.shared_memory` lie there, under names that outlive
a killed process.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import uuid

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

# Blocks that a decoder may be ahead of its reader.
SLOTS = 4
# Of a block: 30 s at 16 kHz, 1.92 MB. Pages are taken when they are first written.
SLOT_SAMPLES = 480_000
_SLOT_BYTES = 4 * SLOT_SAMPLES


class SampleRing:
    """`SLOTS` blocks of float32 samples in shared memory.

    Args:
        handle: of a ring that another process made; None makes a new one.
    """

    def __init__(self, handle: str | None = None) -> None:
        size = SLOTS * _SLOT_BYTES
        self._descriptor: int | None = None
        if sys.platform == "win32":
            self.handle = handle or f"whisper-flash-{uuid.uuid4().hex}"
            self._memory = mmap.mmap(-1, size, tagname=self.handle)
        else:
            descriptor = _anonymous_file(size) if handle is None else int(handle)
            self._memory = mmap.mmap(descriptor, size)
            self.handle = str(descriptor)
            if handle is None:
                self._descriptor = descriptor  # kept open to be inherited
            else:
                os.close(descriptor)

    @property
    def inherited(self) -> tuple[int, ...]:
        """File descriptors that a process needs to open the ring by its handle."""
        return () if self._descriptor is None else (self._descriptor,)

    def write(self, slot: int, samples: Samples) -> None:
        """Fill a slot from its beginning with samples `[T]`, at most `SLOT_SAMPLES`."""
        self._slot(slot, samples.size)[:] = samples

    def read(self, slot: int, count: int) -> Samples:
        """Copy the first `count` samples of a slot."""
        return self._slot(slot, count).copy()

    def _slot(self, slot: int, count: int) -> Samples:
        assert 0 <= slot < SLOTS and 0 <= count <= SLOT_SAMPLES
        return np.frombuffer(self._memory, np.float32, count, slot * _SLOT_BYTES)

    def close(self) -> None:
        """Give the memory back; the other process keeps what it has mapped."""
        self._memory.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _anonymous_file(size: int) -> int:
    """A descriptor of `size` bytes without a name, zero until they are written."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("decoded-samples")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
