"""The decoder's state: buffers at fixed addresses, allocated from one arena.

A CUDA graph remembers addresses, so everything that a step reads or writes lies in buffers that
are allocated once. All of them are cut from one block of memory, the arena, which is as large as
the largest call so far: calls of mixed shapes share it, and memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from whisper_flash_attention.engine.layout import Arena, Layout, Spec, aligned_bytes

# Which axis of a buffer counts slots (or their clips), if not the first, and which counts tokens.
SLOT_AXIS = {"keys": 1, "values": 1, "cross_keys": 1, "cross_values": 1}
POSITION_AXIS = {"keys": 3, "values": 3, "output": 1}


def buffers(layout: Layout) -> dict[str, Spec]:
    """Name, shape and dtype of every buffer of a state."""
    slots, positions = layout.slots, layout.positions
    specs: dict[str, Spec] = {
        "keys": (layout.past_shape(), layout.dtype),
        "values": (layout.past_shape(), layout.dtype),
        "output": ((slots, positions), torch.int64),
        "tokens": ((slots,), torch.int64),
        "positions": ((slots,), torch.int32),
        "finished": ((slots,), torch.bool),
        "failed": ((slots,), torch.bool),
        "limits": ((slots, 4), torch.int32),
        "sum_logprobs": ((slots,), torch.float32),
        "ancestors": ((slots, positions), torch.int32),
    }
    if layout.absorbed:
        specs["states"] = (layout.cross_shape(), layout.dtype)
    else:
        specs["cross_keys"] = (layout.cross_shape(), layout.dtype)
        specs["cross_values"] = (layout.cross_shape(), layout.dtype)
    return specs


def state_bytes(layout: Layout) -> int:
    """Device memory that a state of this layout takes, in bytes."""
    return sum(aligned_bytes(*spec) for spec in buffers(layout).values())


@dataclass
class DecodeState:
    """The buffers of one decode; shapes as in `buffers`.

    `branching` says that rows share their past (beams): position t of slot b lies in slot
    `ancestors[b, t]`.
    """

    layout: Layout
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    finished: torch.Tensor
    failed: torch.Tensor
    limits: torch.Tensor
    sum_logprobs: torch.Tensor
    ancestors: torch.Tensor
    states: torch.Tensor | None = None
    cross_keys: torch.Tensor | None = None
    cross_values: torch.Tensor | None = None
    branching: bool = False

    @classmethod
    def allocate(cls, layout: Layout, arena: Arena) -> DecodeState:
        """A state whose buffers lie in the arena, from its beginning."""
        arena.restart()
        tensors = {name: arena.take(*spec) for name, spec in buffers(layout).items()}
        return cls(layout, **tensors)  # type: ignore[arg-type]

    def rows(self, begin: int, end: int) -> DecodeState:
        """The slots from `begin` to `end`, a clip with each, as a state on the same memory."""
        layout = replace(self.layout, slots=end - begin, clips=end - begin)
        tensors = {
            name: getattr(self, name).narrow(SLOT_AXIS.get(name, 0), begin, end - begin)
            for name in buffers(self.layout)
        }
        return DecodeState(layout, **tensors)

    def adopt(self, other: DecodeState, slots: torch.Tensor, length: int) -> None:
        """Copy the first N rows of another state, a clip with each, into `slots` [N] int64.

        Args:
            length: number of tokens whose ids, keys and values are copied.
        """
        for axis, mine, theirs in self._pairs(other, length):
            mine.index_copy_(axis, slots, theirs.narrow(axis, 0, len(slots)))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot's row, a clip with it, to another slot; `length` as in `adopt`."""
        for axis, mine, _ in self._pairs(self, length):
            mine.select(axis, target).copy_(mine.select(axis, source))

    def _pairs(
        self, other: DecodeState, length: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The axis that counts slots, a buffer, and the other state's, up to `length` tokens."""
        for name in buffers(self.layout).keys() - {"ancestors"}:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name in POSITION_AXIS:
                along = POSITION_AXIS[name]
                mine, theirs = mine.narrow(along, 0, length), theirs.narrow(along, 0, length)
            yield SLOT_AXIS.get(name, 0), mine, theirs
