"""Choose kernels or PyTorch, the form of cross-attention, and the sizes of all buffers.

A CUDA graph holds addresses, so everything that a step reads or writes lies in buffers that are
allocated once. All of them are cut from one block of memory, the arena, which is as large as the
largest call so far: calls of mixed shapes share it, and memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from weakref import WeakMethod

import torch

from whisper_flash_attention.engine.device_memory import LARGE, segment_bytes
from whisper_flash_attention.engine.request import Request, stays_on_device
from whisper_flash_attention.engine.weights import HEAD_WIDTH, DecoderWeights

# Shape and dtype of a buffer.
Spec = tuple[tuple[int, ...], torch.dtype]

ALIGNMENT = 256
LENGTH_BUCKET = 64
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def length_bucket(length: int) -> int:
    """The capacity, in positions, of a decode of `length` positions."""
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def batch_bucket(batch: int) -> int:
    """The number of slots of a batch: graphs are recorded for these sizes only."""
    return next((size for size in BATCH_BUCKETS if size >= batch), -(-batch // 64) * 64)


@dataclass(frozen=True)
class Layout:
    """Sizes that determine a state's buffers.

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
            vocabulary=len(weights.embedding),
            dtype=weights.positions.dtype,
            device=weights.embedding.device,
            ffn=weights.layers[0].fc1.weight.shape[0],
            **sizes,  # type: ignore[arg-type]
        )

    @property
    def slots_per_clip(self) -> int:
        return self.slots // self.clips

    @property
    def transposed_keys(self) -> bool:
        """Whether projected cross keys are stored along S, for products of matrices on a CPU."""
        return not self.kernels and self.device.type == "cpu" and self.dtype is torch.float32

    def past_shape(self) -> tuple[int, ...]:
        """Self-attention keys (and values): [layers, slots, heads, positions, 64]."""
        return (self.layers, self.slots, self.heads, self.positions, HEAD_WIDTH)

    def cross_shape(self) -> tuple[int, ...]:
        """Projected keys (and values): [layers, clips, heads, S, 64]; or states: [clips, S, D]."""
        if self.absorbed:
            return (self.clips, self.keys, self.width)
        return (self.layers, self.clips, self.heads, self.keys, HEAD_WIDTH)

    def cross_keys_shape(self) -> tuple[int, ...]:
        """Projected keys as `cross_shape`; transposed, [layers, clips, heads, 64, S]."""
        *outer, keys, width = self.cross_shape()
        return (*outer, width, keys) if self.transposed_keys else (*outer, keys, width)


def block_bytes(device: torch.device, size: int) -> int:
    """What an arena of this size takes: on a GPU a segment that nobody else gets a part of."""
    return segment_bytes(max(size, LARGE)) if device.type == "cuda" else size


class Arena:
    """One block of device memory, allocated in aligned parts.

    On a GPU it has a memory pool of its own: PyTorch's allocator would cut it out of memory that
    the encoder has just freed and soon needs again, and then reserve that twice.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.capacity = block_bytes(device, size)
        self._used = 0
        self._pool = torch.cuda.MemPool() if device.type == "cuda" else None
        with torch.cuda.use_mem_pool(self._pool, device) if self._pool else nullcontext():
            self._block = torch.empty(self.capacity, dtype=torch.uint8, device=device)

    def free(self) -> None:
        """Give the memory back to the driver, if no tensor is left in it.

        Without this call PyTorch keeps it: an arena may go in the midst of a recording, during
        which nothing may be given back.
        """
        del self._block  # first: a pool that goes gives back only what is free in it
        del self._pool

    def restart(self) -> None:
        """Allocate from the beginning again; earlier tensors are overwritten."""
        self._used = 0

    def skip_to(self, offset: int) -> None:
        """Leave everything before `offset` as it is, which is a multiple of `ALIGNMENT`."""
        self._used = max(self._used, offset)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate an uninitialised tensor."""
        size = aligned_bytes(shape, dtype)
        piece = self._block[self._used : self._used + math.prod(shape) * dtype.itemsize]
        self._used += size
        return piece.view(dtype).view(shape)


class SharedArena:
    """The arena of all that take turns in it, from its beginning; it only grows.

    Before it grows, its users drop their tensors in it, so that the driver has the old memory back
    before it gives more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena: Arena | None = None
        # Weak: the memory must go with the engine, without waiting for the garbage collector.
        self._callbacks: list[WeakMethod[Callable[[], None]]] = []
        # Bytes, from the beginning, that were overwritten since a decoder last had its turn.
        self.overwritten = 0

    def on_release(self, drop: Callable[[], None]) -> None:
        """Call this bound method, which drops tensors in the arena, before it is freed."""
        self._callbacks.append(WeakMethod(drop))

    def of(self, size: int) -> Arena:
        """The arena, which has at least this number of bytes."""
        if self._arena is None or self._arena.capacity < size:
            self.release()
            self._arena = Arena(self._device, size)
        return self._arena

    def release(self) -> None:
        """Give the memory back."""
        for reference in self._callbacks:
            if drop := reference():
                drop()
        if self._arena is not None:
            self._arena.free()
            self._arena = None


def aligned_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Memory that a buffer takes in an arena."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


# Ampere: bfloat16 and asynchronous copies.
LEAST_CAPABILITY = (8, 0)
# Hopper: tensor descriptors, and matrix products of warp groups.
TENSOR_DESCRIPTORS = (9, 0)
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Prompts of more rows use matrix products instead of the kernels.
KERNEL_PROMPT_ROWS = 1024
KERNEL_PROMPT_TOKENS = 8
# Up to this width all of the encoder's products are ours, and of few clips up to a larger one. For
# one clip cuBLAS takes as much memory (its handle, workspaces, modules) as everything else of a
# call. Beside the weights of wider models that is little.
OWN_PRODUCT_WIDTH = 512
OWN_PRODUCT_CLIPS, OWN_PRODUCT_CLIPS_WIDTH = 4, 1024
# From this number of clips on, reading encoder states is faster than projected keys and values.
ABSORBED_FROM_CLIPS = 24


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels and CUDA graphs run on this device."""
    return why_no_kernels(device) is None


def why_no_kernels(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on this device; None if they do."""
    if device.type != "cuda":
        return "the kernels need a CUDA GPU"
    if torch.version.hip is not None:
        return "the kernels need CUDA, and PyTorch is built for ROCm"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        return f"the kernels need compute capability {least}, and this GPU has {found}"
    return None


def has_encoder_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the encoder runs on Triton kernels with weights of this device and dtype."""
    if dtype not in HALF_DTYPES or not has_kernels(device):
        return False
    return torch.cuda.get_device_capability(device) >= TENSOR_DESCRIPTORS


def backend_name(device: torch.device) -> str:
    """What decodes on this device: the kernels or PyTorch."""
    return "PyTorch" if why_no_kernels(device) else "Triton kernels"


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the decode buffers, besides the weights.

    Args:
        clips: recordings.
        slots: rows of the prompt, beams included; a multiple of `clips`.
        keys: S, the encoder's states per clip.
        prompt: prompt tokens per row.
        max_length: maximum number of tokens per row, prompt included.
        raw: logits are stored, and tokens chosen by PyTorch's operations.
        kernels: the Triton kernels run it.
    """

    clips: int
    slots: int
    keys: int
    prompt: int
    max_length: int
    raw: bool
    kernels: bool

    @classmethod
    def of(
        cls, device: torch.device, states: torch.Tensor, prompt: torch.Tensor, request: Request
    ) -> Sizes:
        """The sizes of a decode of `prompt` [B, P] given encoder states [clips, S, D]."""
        (clips, keys), (slots, length) = states.shape[:2], prompt.shape
        return cls(
            clips=clips,
            slots=slots,
            keys=keys,
            prompt=length,
            max_length=request.max_length,
            raw=not stays_on_device(request),
            kernels=has_kernels(device),
        )


def is_absorbed_faster(sizes: Sizes) -> bool:
    """Whether "auto" takes absorbed cross-attention."""
    return sizes.kernels and sizes.clips >= ABSORBED_FROM_CLIPS


def is_absorbed(sizes: Sizes, form: str) -> bool:
    """Whether this form of cross-attention, as in `Request`, is absorbed for these sizes."""
    return form == "absorbed" or (form == "auto" and is_absorbed_faster(sizes))


def layout_for(
    weights: DecoderWeights, states: torch.Tensor, prompt: torch.Tensor, request: Request
) -> Layout:
    """The layout of a decode of `prompt` [B, P] given encoder states [clips, S, D]."""
    sizes = Sizes.of(weights.embedding.device, states, prompt, request)
    return make_layout(weights, sizes, absorbed=is_absorbed(sizes, request.cross_attention))


def make_layout(weights: DecoderWeights, sizes: Sizes, *, absorbed: bool) -> Layout:
    """The layout for these sizes; with kernels, sizes are rounded up to those of a few graphs."""
    if not sizes.kernels:
        return Layout.of(
            weights,
            slots=sizes.slots,
            clips=sizes.clips,
            positions=sizes.max_length,
            keys=sizes.keys,
            absorbed=absorbed,
        )
    room = batch_bucket(sizes.clips)
    slots = room * (sizes.slots // sizes.clips)
    short = sizes.prompt <= KERNEL_PROMPT_TOKENS and sizes.prompt * slots <= KERNEL_PROMPT_ROWS
    return Layout.of(
        weights,
        slots=slots,
        clips=room,
        positions=length_bucket(sizes.max_length),
        keys=sizes.keys,
        absorbed=absorbed,
        kernels=True,
        prompt=sizes.prompt if short else 1,
        raw=sizes.raw,
    )


def slots_layout(
    weights: DecoderWeights, *, slots: int, keys: int, max_length: int, form: str
) -> Layout:
    """The layout of slots that are refilled one by one, of at most `max_length` tokens each.

    Args:
        keys: S, the encoder's states per clip.
        form: of cross-attention, as in `Request`.
    """
    sizes = Sizes(
        clips=slots,
        slots=slots,
        keys=keys,
        prompt=1,
        max_length=max_length,
        raw=False,
        kernels=has_kernels(weights.embedding.device),
    )
    return make_layout(weights, sizes, absorbed=is_absorbed(sizes, form))


def prefill_layout(weights: DecoderWeights, slots: Layout, *, clips: int, prompt: int) -> Layout:
    """The layout in which prompts of up to `prompt` tokens run before their rows go into `slots`.

    Capacity includes two more tokens, because a full row counts as ended.
    """
    room = length_bucket(prompt + 2)
    sizes = Sizes(
        clips=clips,
        slots=clips,
        keys=slots.keys,
        prompt=prompt,
        # Few layouts, because each has graphs of its own.
        max_length=room if room == LENGTH_BUCKET else slots.positions,
        raw=False,
        kernels=slots.kernels,
    )
    return make_layout(weights, sizes, absorbed=slots.absorbed)


# Which axis of a buffer counts slots (or their clips), if not the first, and which counts tokens.
SLOT_AXIS = {"keys": 1, "values": 1, "cross_keys": 1, "cross_values": 1}
POSITION_AXIS = {"keys": 3, "values": 3, "output": 1}


def caches(layout: Layout) -> dict[str, Spec]:
    """Name, shape and dtype of the large buffers, of which a decode reads only what it wrote."""
    shapes = {"keys": layout.past_shape(), "values": layout.past_shape()}
    if layout.absorbed:
        shapes["states"] = layout.cross_shape()
    else:
        shapes["cross_keys"] = layout.cross_keys_shape()
        shapes["cross_values"] = layout.cross_shape()
    return {name: (shape, layout.dtype) for name, shape in shapes.items()}


def buffers(layout: Layout) -> dict[str, Spec]:
    """Name, shape and dtype of every buffer of a state, the caches first."""
    slots, positions = layout.slots, layout.positions
    return caches(layout) | {
        "output": ((slots, positions), torch.int64),
        "tokens": ((slots,), torch.int64),
        "positions": ((slots,), torch.int32),
        "finished": ((slots,), torch.bool),
        "failed": ((slots,), torch.bool),
        "limits": ((slots, 4), torch.int32),
        "sum_logprobs": ((slots,), torch.float32),
        "ancestors": ((slots, positions), torch.int32),
    }


def state_bytes(layout: Layout) -> int:
    """Device memory that a state of this layout takes, in bytes."""
    return sum(aligned_bytes(*spec) for spec in buffers(layout).values())


def cache_bytes(layout: Layout) -> int:
    """Device memory of the caches alone, in bytes."""
    return sum(aligned_bytes(*spec) for spec in caches(layout).values())


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
    def allocate(cls, layout: Layout, arena: Arena, rest: int = 0) -> DecodeState:
        """A state whose caches lie at the arena's beginning, and other buffers from `rest` on."""
        arena.restart()
        tensors = {name: arena.take(*spec) for name, spec in caches(layout).items()}
        arena.skip_to(rest)
        for name, spec in buffers(layout).items():
            if name not in tensors:
                tensors[name] = arena.take(*spec)
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
