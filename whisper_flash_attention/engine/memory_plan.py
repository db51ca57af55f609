"""The memory of `generate`, computed before it runs, also for a device that is not present.

Sizes come from the layouts of the decode, and from the encoder and the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from whisper_flash_attention import validation as check
from whisper_flash_attention.engine import encoder
from whisper_flash_attention.engine.cuda_graphs import has_launched
from whisper_flash_attention.engine.device_memory import (
    CUBLAS_BYTES,
    SMALL_SEGMENT,
    has_cublas,
    reserved_bytes,
    used_bytes,
)
from whisper_flash_attention.engine.layout import (
    ABSORBED_FROM_CLIPS,
    HALF_DTYPES,
    Layout,
    Sizes,
    aligned_bytes,
    block_bytes,
    buffers,
    cache_bytes,
    has_encoder_kernels,
    has_kernels,
    is_absorbed,
    make_layout,
)
from whisper_flash_attention.engine.request import CROSS_ATTENTION
from whisper_flash_attention.engine.weights import PackedLinear, Weights
from whisper_flash_attention.errors import MissingPackage, OptionError

# PyTorch's allocator rounds up to multiples of this on CUDA devices.
ALLOCATION = 512
# What an NVIDIA H100's driver adds for the kernels and graphs of a first call, and for a handle of
# cuBLAS (`benchmarks/memory.py rows`); what passes reserve for small tensors.
FIRST_CALL_BYTES = 4_200_000
CUBLAS_HANDLE_BYTES = 69_200_000
RECORDER_BYTES = 2 * SMALL_SEGMENT
# Copies of the float32 logits [slots, V] that choosing tokens in PyTorch holds at a time.
SCORE_COPIES = 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CROSS_BUFFERS = frozenset({"states", "cross_keys", "cross_values"})


@dataclass(frozen=True)
class PlanRequest:
    """A decode to be planned.

    Args:
        max_new_tokens, prompt_tokens, num_beams: of every clip.
        cross_attention: "projected", "absorbed" or "auto".
        device: a CUDA device need not be present, and then counts as one that the kernels support.
        dtype: of weights and features.

    Raises:
        OptionError: a number is below 1, or the device, the dtype or the form of cross-attention
            is invalid.
    """

    max_new_tokens: int
    prompt_tokens: int
    num_beams: int
    cross_attention: str
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prompt_tokens", "num_beams"):
            _check_count(name, getattr(self, name))
        if self.device.type == "meta":
            raise OptionError("the model is on the meta device: give the device it would run on")
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}: give one of {', '.join(map(str, DTYPES))}")
        check.one_of("cross_attention", self.cross_attention, CROSS_ATTENTION)


@dataclass(frozen=True)
class MemoryPlan:
    """Device memory of one `generate` from features of a number of clips, in bytes.

    Args:
        cross_attention: the form chosen, "projected" or "absorbed".
        precision: in which weights are laid out for a CPU; None where they have the dtype.
        weights: the model's parameters, as they are held.
        self_attention_cache: keys and values of the tokens, and the tokens themselves.
        cross_attention_state: projected keys and values, or the encoder's states.
        workspace: of kernels and matrix products.
        encoder: features, the encoder's states, what the encoder needs beyond the place of the
            caches, and the largest temporaries of PyTorch's operations.
        cublas_streams: streams with products of cuBLAS.
        driver: what the driver will count, context and modules included, where the GPU is present:
            for this process, or for all of the GPU where it tells no more. It is computed from what
            it counts now.
    """

    batch_size: int
    max_new_tokens: int
    num_beams: int
    cross_attention: str
    device: torch.device
    dtype: torch.dtype
    precision: str | None
    weights: int
    self_attention_cache: int
    cross_attention_state: int
    workspace: int
    encoder: int
    cublas_streams: int
    driver: int | None = None

    @property
    def total(self) -> int:
        """The peak that PyTorch's allocator counts during the call, weights and features included.

        The driver counts more: the CUDA context, modules, graphs, and memory that the allocator
        reserves: `driver`.
        """
        return (
            self.weights
            + self.self_attention_cache
            + self.cross_attention_state
            + self.workspace
            + self.encoder
        )

    def fits(self, budget_bytes: int) -> bool:
        """Whether the peak stays within a budget in bytes."""
        return self.total <= budget_bytes

    def __str__(self) -> str:
        beams = f", {self.num_beams} beams" if self.num_beams > 1 else ""
        head = (
            f"batch {self.batch_size}, {self.max_new_tokens} new tokens{beams}, "
            f"{self.precision or str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{self.cross_attention} cross-attention: {self.total / 1e9:.2f} GB"
        )
        names = [
            "weights",
            "self_attention_cache",
            "cross_attention_state",
            "workspace",
            "encoder",
            "total",
        ]
        if self.driver is not None:
            names.append("driver")
        rows = [f"  {n.replace('_', ' '):<22}{getattr(self, n) / 2**20:>12,.1f} MiB" for n in names]
        return "\n".join([head, *rows])


def make_plan(
    weights: Weights, wanted: PlanRequest, *, batch_size: int | None, memory_gb: float | None
) -> MemoryPlan:
    """The plan for a number of clips, or for the most that a budget in units of 1e9 bytes allows.

    Raises:
        OptionError: not exactly one of the two was given, or it is out of range.
    """
    if (batch_size is None) == (memory_gb is None):
        raise OptionError("give either batch_size, or memory_gb for the most clips that fit")
    if batch_size is not None:
        return with_driver(plan_memory(weights, wanted, batch_size), weights)
    assert memory_gb is not None
    is_number = isinstance(memory_gb, int | float) and not isinstance(memory_gb, bool)
    if not is_number or not 0 < memory_gb < math.inf:
        raise OptionError(f"memory_gb is {memory_gb!r}: give a number above 0")
    return with_driver(largest_plan(weights, wanted, int(memory_gb * 1e9)), weights)


def with_driver(plan: MemoryPlan, weights: Weights) -> MemoryPlan:
    """The plan with what the driver will count, if its GPU is present."""
    device = plan.device
    if not _is_here(device):
        return plan
    states = plan.batch_size * weights.encoder.positions.numel() * plan.dtype.itemsize
    bins = weights.encoder.conv1.weight.shape[1]
    features = states // weights.encoder.positions.shape[1] * 2 * bins
    new = [features, states]
    where = weights.device
    is_loaded = where.type == "cuda" and (where.index or 0) == (device.index or 0)
    if not is_loaded or weights.dtype != plan.dtype:
        new.append(plan.weights)
    # Beyond what is reserved the driver counts the context and modules: PyTorch's, with a kernel.
    torch.ones(1, device=device).add_(1)
    torch.cuda.synchronize(device)
    outside = used_bytes(device)[0] - torch.cuda.memory_reserved(device)
    if not has_launched(device):
        outside += FIRST_CALL_BYTES
    if plan.cublas_streams and not has_cublas(device):
        outside += CUBLAS_HANDLE_BYTES
    pools = plan.total - plan.weights - features - states + RECORDER_BYTES
    return replace(plan, driver=outside + reserved_bytes(device, new) + pools)


def plan_memory(weights: Weights, wanted: PlanRequest, batch_size: int) -> MemoryPlan:
    """The plan of `generate` for `batch_size` clips.

    Raises:
        OptionError: the batch size is below 1, or the tokens are more than the model has positions.
        MissingPackage: the device is a GPU that is not present, and Triton is not installed.
    """
    _check_count("batch_size", batch_size)
    sizes = _planned_sizes(weights, wanted, batch_size)
    absorbed = is_absorbed(sizes, wanted.cross_attention)
    layout = replace(
        make_layout(weights.decoder, sizes, absorbed=absorbed),
        device=wanted.device,
        dtype=wanted.dtype,
    )
    state = {name: aligned_bytes(*spec) for name, spec in buffers(layout).items()}
    cross = sum(size for name, size in state.items() if name in CROSS_BUFFERS)
    held = sum(state.values())
    # The encoder works where the caches are.
    is_fused = _has_encoder_kernels(wanted)
    space = max(_space_bytes(weights, wanted, clips) for clips in (batch_size, layout.clips))
    beyond = max(0, space - cache_bytes(layout)) if is_fused else 0
    arena = block_bytes(wanted.device, held + beyond + kernel_bytes(layout))
    on_gpu = wanted.device.type == "cuda"
    streams = _cublas_streams(weights, wanted, layout, sizes) if on_gpu else set()
    return MemoryPlan(
        batch_size=batch_size,
        max_new_tokens=wanted.max_new_tokens,
        num_beams=wanted.num_beams,
        cross_attention="absorbed" if absorbed else "projected",
        device=wanted.device,
        dtype=wanted.dtype,
        precision=weights.precision,
        weights=weight_bytes(weights, wanted),
        self_attention_cache=held - cross,
        cross_attention_state=cross,
        workspace=arena - held - beyond + _cublas_bytes(wanted.device, len(streams)),
        encoder=beyond + _clip_bytes(weights, wanted, layout, sizes),
        cublas_streams=len(streams),
    )


def largest_plan(weights: Weights, wanted: PlanRequest, budget_bytes: int) -> MemoryPlan:
    """The plan with the most clips that stays within `budget_bytes`.

    With "auto", where the faster form of cross-attention does not fit, the other one may.

    Raises:
        OptionError: not even one clip fits.
    """

    def best(batch: int) -> MemoryPlan | None:
        plan = plan_memory(weights, wanted, batch)
        if not plan.fits(budget_bytes) and wanted.cross_attention == "auto":
            plan = plan_memory(weights, replace(wanted, cross_attention="absorbed"), batch)
        return plan if plan.fits(budget_bytes) else None

    # Graphs of small batches take memory of their own: only beyond them does the total increase.
    few = 2 * ABSORBED_FROM_CLIPS
    fitting = next((batch for batch in range(few, 0, -1) if best(batch)), 0)
    if fitting == few:
        while best(2 * fitting):
            fitting *= 2
        too_many = 2 * fitting
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            fitting, too_many = (middle, too_many) if best(middle) else (fitting, middle)
    found = best(fitting) if fitting else None
    if found is None:
        form = "absorbed" if wanted.cross_attention == "auto" else wanted.cross_attention
        least = plan_memory(weights, replace(wanted, cross_attention=form), 1)
        raise OptionError(
            f"a budget of {budget_bytes / 1e9:.2f} GB is too small for one clip, which takes "
            f"{least.total / 1e9:.2f} GB; give more, or take fewer tokens, half precision or a "
            "smaller model"
        )
    return found


def _planned_sizes(weights: Weights, wanted: PlanRequest, batch_size: int) -> Sizes:
    length = wanted.prompt_tokens + wanted.max_new_tokens
    longest = weights.decoder.positions.shape[0]
    if length > longest:
        raise OptionError(
            f"{wanted.prompt_tokens} prompt and {wanted.max_new_tokens} new tokens are {length}; "
            f"the model has {longest} positions"
        )
    device = wanted.device
    return Sizes(
        clips=batch_size,
        slots=batch_size * wanted.num_beams,
        keys=weights.encoder.positions.shape[0],
        prompt=wanted.prompt_tokens,
        max_length=length,
        raw=wanted.num_beams > 1,
        kernels=has_kernels(device) if _is_here(device) else _would_have_kernels(device),
    )


def _clip_bytes(weights: Weights, wanted: PlanRequest, layout: Layout, sizes: Sizes) -> int:
    """Features, the encoder's states, and the largest temporaries of PyTorch's operations."""
    keys, width = weights.encoder.positions.shape
    bins = weights.encoder.conv1.weight.shape[1]
    each = (2 * keys * bins + keys * width) * wanted.dtype.itemsize
    passes = _pass_bytes(layout, sizes, projects=_projects(wanted, layout, sizes))
    if _has_encoder_kernels(wanted):
        return sizes.clips * each + passes
    # A graph of PyTorch operations has features and states of its own.
    is_recorded = wanted.device.type == "cuda" and sizes.clips <= encoder.MOST_GRAPH_CLIPS
    copies = 2 if is_recorded else 1
    return copies * sizes.clips * each + max(_space_bytes(weights, wanted, sizes.clips), passes)


def _space_bytes(weights: Weights, wanted: PlanRequest, batch_size: int) -> int:
    """Temporaries of the encoder."""
    own, size = weights.dtype.itemsize, wanted.dtype.itemsize
    if _has_encoder_kernels(wanted):
        from whisper_flash_attention.engine import triton_encoder

        clips = _part_clips(weights, wanted, batch_size)
        return triton_encoder.space_bytes(weights.encoder, clips) // own * size
    clip = encoder.temporary_bytes(weights.encoder) // own * size
    budget = encoder.GPU_BUDGET if wanted.device.type == "cuda" else encoder.CPU_BUDGET
    return min(batch_size, max(1, budget // clip)) * clip


def _part_clips(weights: Weights, wanted: PlanRequest, batch_size: int) -> int:
    """Clips that the encoder's kernels take at a time."""
    from whisper_flash_attention.engine import triton_encoder

    budget = triton_encoder.BUDGET * weights.dtype.itemsize // wanted.dtype.itemsize
    return triton_encoder.clips_per_part(weights.encoder, batch_size, budget)


def _is_long(layout: Layout, sizes: Sizes) -> bool:
    """Whether the prompt runs through PyTorch's products."""
    return not layout.kernels or sizes.prompt != layout.prompt


def _projects(wanted: PlanRequest, layout: Layout, sizes: Sizes) -> bool:
    """Whether a kernel projects cross keys and values."""
    is_absent = layout.absorbed or _is_long(layout, sizes)
    return not is_absent and _has_encoder_kernels(wanted)


def _cublas_streams(
    weights: Weights, wanted: PlanRequest, layout: Layout, sizes: Sizes
) -> set[str]:
    """The streams with products of cuBLAS: that of recordings, and the caller's."""
    streams = set()
    if _has_encoder_kernels(wanted):
        from whisper_flash_attention.engine.triton_encoder import has_own_products

        width = weights.encoder.positions.shape[1]
        if not has_own_products(_part_clips(weights, wanted, sizes.clips), width):
            streams.add("recordings")
    else:
        few = sizes.clips <= encoder.MOST_GRAPH_CLIPS
        streams.add("recordings" if few else "caller")
    if _is_long(layout, sizes):
        streams.add("caller")
    elif not layout.absorbed and not _projects(wanted, layout, sizes):
        from whisper_flash_attention.engine.triton_layers import RECORDED_CLIPS

        streams.add("recordings" if layout.clips <= RECORDED_CLIPS else "caller")
    return streams


def _has_encoder_kernels(wanted: PlanRequest) -> bool:
    if _is_here(wanted.device):
        return has_encoder_kernels(wanted.device, wanted.dtype)
    return wanted.dtype in HALF_DTYPES and _would_have_kernels(wanted.device)


def _pass_bytes(layout: Layout, sizes: Sizes, *, projects: bool) -> int:
    """Peak of the temporaries of the decoder's operations in PyTorch."""
    size = layout.dtype.itemsize
    states = 0 if layout.absorbed or projects else sizes.clips * layout.keys * layout.width * size
    choosing = 0
    if sizes.raw or not layout.kernels:
        choosing = SCORE_COPIES * layout.slots * layout.vocabulary * 4
    rows = layout.slots * sizes.prompt
    if layout.kernels and sizes.prompt == layout.prompt:
        return max(states, choosing)
    wide = 2 * layout.width + max(4 * layout.width, 2 * layout.ffn)
    if layout.absorbed:
        # Scores, their softmax in float32 and that in the model's dtype; folded queries twice.
        cells = layout.keys * (2 * size + 4) + 2 * layout.width * size
        return max(choosing, rows * (wide * size + layout.heads * cells))
    return max(states, choosing, rows * wide * size)


def _cublas_bytes(device: torch.device, streams: int) -> int:
    if device.type != "cuda":
        return 0
    major = torch.cuda.get_device_capability(device)[0] if _is_here(device) else 9
    return streams * CUBLAS_BYTES[0 if major in (9, 10) else 1]


def _would_have_kernels(device: torch.device) -> bool:
    """Whether a device that is not present counts as one with kernels, which Triton sizes."""
    if device.type != "cuda":
        return False
    if find_spec("triton") is None:
        raise MissingPackage(
            f"a plan for {device}, which is not here, needs Triton: pip install triton"
        )
    return True


def _is_here(device: torch.device) -> bool:
    """Whether this machine has that CUDA device."""
    return device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()


def weight_bytes(weights: Weights, wanted: PlanRequest) -> int:
    decoder = weights.decoder
    is_tied = _is_shared(decoder.projection.weight, decoder.embedding)
    if weights.precision is not None:
        return _held_bytes(weights) - (decoder.embedding.nbytes if is_tied else 0)
    sizes = [tensor.numel() * wanted.dtype.itemsize for tensor in _tensors(weights)]
    if is_tied:
        sizes.remove(decoder.projection.weight.numel() * wanted.dtype.itemsize)
    if wanted.device.type != "cuda":
        return sum(sizes)
    return sum(-(-size // ALLOCATION) * ALLOCATION for size in sizes)


def _is_shared(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors share a storage; also on the meta device."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """All tensors in weights' dataclasses."""
    if isinstance(part, torch.Tensor):
        yield part
    for each in _inside(part):
        yield from _tensors(each)


def _held_bytes(part: Any) -> int:
    """Bytes of laid-out weights; tensors on the meta device are their shapes."""
    if isinstance(part, torch.Tensor):
        return 0 if part.is_meta else part.nbytes
    layout = part.nbytes if isinstance(part, PackedLinear) else 0
    return layout + sum(map(_held_bytes, _inside(part)))


def _inside(part: Any) -> Iterable[Any]:
    """The parts of a part of weights' dataclasses."""
    if isinstance(part, tuple):
        return part
    return (getattr(part, name) for name in getattr(part, "__dataclass_fields__", ()))


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise OptionError(f"{name} is {value!r}: give a whole number from 1 on")


def kernel_bytes(layout: Layout) -> int:
    """Device memory of the kernels' workspaces, in bytes."""
    if not layout.kernels:
        return 0
    from whisper_flash_attention.engine.triton_layers import workspace_bytes

    return workspace_bytes(layout)
