"""Which path a decode takes, which form of cross-attention, and the layout of its buffers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from whisper_flash_attention.engine.kv_cache import (
    LENGTH_BUCKET,
    Layout,
    Spec,
    batch_bucket,
    length_bucket,
    state_bytes,
)
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.weights import DecoderWeights

# Of NVIDIA's Ampere: bfloat16 and asynchronous copies.
LEAST_CAPABILITY = (8, 0)
# Of NVIDIA's Hopper: matrix products of warp groups, on what tensor descriptors bring.
TENSOR_DESCRIPTORS = (9, 0)
HALVES = (torch.float16, torch.bfloat16)
# A prompt of more rows than this goes through matrix products instead of the kernels.
KERNEL_PROMPT_ROWS = 1024
KERNEL_PROMPT_TOKENS = 8
# From so many clips the encoder's states are read faster than projected keys and values.
ABSORBED_FROM_CLIPS = 24


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels and CUDA graphs run on this device."""
    return why_no_kernels(device) is None


def why_no_kernels(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on this device, in words; None if they do."""
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
    if dtype not in HALVES or not has_kernels(device):
        return False
    return torch.cuda.get_device_capability(device) >= TENSOR_DESCRIPTORS


def runs_on(device: torch.device) -> str:
    """What the engine runs a decode with on this device, in words: the kernels or PyTorch."""
    return "PyTorch" if why_no_kernels(device) else "Triton kernels"


@dataclass(frozen=True)
class Sizes:
    """What a decode's buffers follow from, besides the weights.

    Args:
        clips: recordings.
        slots: rows of the prompt, beams included; a multiple of `clips`.
        keys: S, the encoder's states per clip.
        prompt: tokens per row before the answer.
        max_length: tokens per row at most, the prompt included.
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


def entry_layout(weights: DecoderWeights, slots: Layout, *, clips: int, prompt: int) -> Layout:
    """The layout in which prompts of up to `prompt` tokens run before their rows go into `slots`.

    There is room for the prompt and two tokens more, for a row that is full has ended.
    """
    room = length_bucket(prompt + 2)
    sizes = Sizes(
        clips=clips,
        slots=clips,
        keys=slots.keys,
        prompt=prompt,
        # Few layouts, for each has recordings of its own.
        max_length=room if room == LENGTH_BUCKET else slots.positions,
        raw=False,
        kernels=slots.kernels,
    )
    return make_layout(weights, sizes, absorbed=slots.absorbed)


def kernel_buffers(layout: Layout) -> dict[str, Spec]:
    """Name, shape and dtype of what the kernels need beside the state; nothing without kernels."""
    if not layout.kernels:
        return {}
    from whisper_flash_attention.engine.workspace import workspace_buffers

    return workspace_buffers(layout)


def kernel_bytes(layout: Layout) -> int:
    """Device memory that those take, in bytes."""
    if not layout.kernels:
        return 0
    from whisper_flash_attention.engine.workspace import workspace_bytes

    return workspace_bytes(layout)


def slots_bytes(
    weights: DecoderWeights,
    *,
    slots: int,
    keys: int,
    max_length: int,
    form: str,
    refill: int,
    prompt: int,
) -> tuple[int, int]:
    """Device memory that a stream's slots take, in bytes, and what their refills take.

    The latter is shared with other decodes: of them and the refills, the largest counts.

    Args:
        refill, prompt: clips that are started together, and tokens of their longest prompt.
    """
    layout = slots_layout(weights, slots=slots, keys=keys, max_length=max_length, form=form)
    own = state_bytes(layout) + kernel_bytes(layout)
    if not layout.kernels:
        return own, 0
    entry = entry_layout(weights, layout, clips=refill, prompt=prompt)
    return own, state_bytes(entry) + kernel_bytes(entry)


def stays_on_device(request: Request) -> bool:
    """Whether the kernels can choose this request's tokens."""
    return (
        request.rules.fused is not None
        and not request.sample
        and request.beams is None
        and not request.want_scores
        and not request.want_logits
        and request.on_token is None
    )
