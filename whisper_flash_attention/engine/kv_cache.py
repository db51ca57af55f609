"""The decoder's state: buffers that never move while a clip is decoded, cut from one arena.

A CUDA graph remembers addresses, so everything that a step reads or writes lies in buffers that
are allocated once. All of them are cut from one block of memory, the arena, which is as large as
the largest call so far: calls of mixed shapes share it, and memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from whisper_flash_attention.engine.weights import HEAD_WIDTH, DecoderWeights

# Shape and dtype of a buffer.
Spec = tuple[tuple[int, ...], torch.dtype]

# Which axis of a buffer counts slots (or their clips), if not the first, and which counts tokens.
SLOT_AXIS = {"keys": 1, "values": 1, "cross_keys": 1, "cross_values": 1}
POSITION_AXIS = {"keys": 3, "values": 3, "output": 1}

ALIGNMENT = 256
LENGTH_BUCKET = 64
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def length_bucket(length: int) -> int:
    """The capacity, in positions, that a decode of `length` positions gets."""
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def batch_bucket(batch: int) -> int:
    """The number of slots that a batch gets: graphs are made for these sizes only."""
    return next((size for size in BATCH_BUCKETS if size >= batch), -(-batch // 64) * 64)


@dataclass(frozen=True)
class Layout:
    """Everything that the sizes of a state's buffers follow from.

    Args:
        layers, heads, width, vocabulary: the decoder's dimensions; width is D.
        slots: rows of the batch, beams included.
        clips: recordings whose encoder states are held; slots are a multiple of it.
        positions: capacity in tokens, prompt included.
        keys: S, the encoder's states per clip.
        absorbed: hold the encoder's states [clips, S, D] instead of projected keys and values.
        kernels: there are workspaces for the Triton kernels too.
        prompt: tokens per slot in the kernels' first pass; their workspaces hold that many.
        ffn: width of the feed-forward.
        raw: the kernels also store the logits [slots, V].
    """

    layers: int
    heads: int
    width: int
    vocabulary: int
    slots: int
    clips: int
    positions: int
    keys: int
    absorbed: bool
    dtype: torch.dtype
    device: torch.device
    kernels: bool = False
    prompt: int = 1
    ffn: int = 0
    raw: bool = False

    @classmethod
    def of(cls, weights: DecoderWeights, **sizes: int) -> Layout:
        """A layout for these weights; `sizes` are the fields that weights do not determine."""
        return cls(
            layers=len(weights.layers),
            heads=weights.heads,
            width=weights.width,
            vocabulary=weights.projection.shape[0],
            dtype=weights.embedding.dtype,
            device=weights.embedding.device,
            ffn=weights.layers[0].fc1.weight.shape[0],
            **sizes,  # type: ignore[arg-type]
        )

    @property
    def slots_per_clip(self) -> int:
        return self.slots // self.clips

    def past_shape(self) -> tuple[int, ...]:
        """Self-attention keys (and values): [layers, slots, heads, positions, 64]."""
        return (self.layers, self.slots, self.heads, self.positions, HEAD_WIDTH)

    def cross_shape(self) -> tuple[int, ...]:
        """Projected keys (and values): [layers, clips, heads, S, 64]; or states: [clips, S, D]."""
        if self.absorbed:
            return (self.clips, self.keys, self.width)
        return (self.layers, self.clips, self.heads, self.keys, HEAD_WIDTH)


class Arena:
    """One block of memory on a device, handed out in aligned pieces.

    On a GPU it is taken from the driver and goes back to it as a whole. PyTorch's allocator would
    cut it out of what the encoder has just freed and soon needs again, and then reserve that twice.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.capacity = capacity
        self._used = 0
        if device.type == "cuda":
            self._pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(self._pool, device):
                self._block = torch.empty(capacity, dtype=torch.uint8, device=device)
        else:
            self._block = torch.empty(capacity, dtype=torch.uint8, device=device)

    def restart(self) -> None:
        """Hand out everything again from the beginning; earlier pieces are overwritten."""
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; its content is whatever lay there."""
        size = aligned_bytes(shape, dtype)
        piece = self._block[self._used : self._used + math.prod(shape) * dtype.itemsize]
        self._used += size
        return piece.view(dtype).view(shape)


def aligned_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Memory that a buffer takes in an arena."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def buffers(layout: Layout) -> dict[str, Spec]:
    """Name, shape and dtype of every buffer of a state."""
    slots, positions = layout.slots, layout.positions
    wanted: dict[str, Spec] = {
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
        wanted["states"] = (layout.cross_shape(), layout.dtype)
    else:
        wanted["cross_keys"] = (layout.cross_shape(), layout.dtype)
        wanted["cross_values"] = (layout.cross_shape(), layout.dtype)
    return wanted


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
    def cut(cls, layout: Layout, arena: Arena) -> DecodeState:
        """A state whose buffers lie in the arena, from its beginning."""
        arena.restart()
        cut = {name: arena.take(*spec) for name, spec in buffers(layout).items()}
        return cls(layout, **cut)  # type: ignore[arg-type]

    def rows(self, begin: int, end: int) -> DecodeState:
        """The slots from `begin` to `end`, a clip with each, as a state on the same memory."""
        layout = replace(self.layout, slots=end - begin, clips=end - begin)
        cut = {
            name: getattr(self, name).narrow(SLOT_AXIS.get(name, 0), begin, end - begin)
            for name in buffers(self.layout)
        }
        return DecodeState(layout, **cut)

    def adopt(self, other: DecodeState, slots: torch.Tensor, length: int) -> None:
        """Copy the first N rows of another state, a clip with each, into `slots` [N] int64.

        Args:
            length: so many tokens and their keys and values are copied.
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
        """The axis that counts slots, a buffer, and the other state's, up to so many tokens."""
        for name in buffers(self.layout).keys() - {"ancestors"}:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name in POSITION_AXIS:
                along = POSITION_AXIS[name]
                mine, theirs = mine.narrow(along, 0, length), theirs.narrow(along, 0, length)
            yield SLOT_AXIS.get(name, 0), mine, theirs
