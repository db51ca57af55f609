"""Intermediate buffers of the Triton kernels, allocated from the state's arena."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from whisper_flash_attention.engine.layout import Arena, Layout, Spec, aligned_bytes
from whisper_flash_attention.kernels import absorbed_attention, cross_attention
from whisper_flash_attention.kernels import logits as logits_kernel

# Up to this many clips, the recorded pass includes the projection of keys and values: a graph keeps
# its temporaries, which are small then.
RECORDED_CLIPS = 4


def splits(layout: Layout, count: int) -> int:
    """Parts into which cross-attention cuts a clip's states in a pass of `count` tokens a slot."""
    rows = layout.slots * count
    if layout.absorbed:
        return absorbed_attention.choose_splits(rows, layout.keys)
    return cross_attention.choose_splits(
        rows, layout.heads, layout.keys, rows_per_clip=count * layout.slots_per_clip
    )


def workspace_bytes(layout: Layout) -> int:
    """Device memory that the workspaces of this layout take, in bytes."""
    return sum(aligned_bytes(*spec) for spec in workspace_buffers(layout).values())


def workspace_buffers(layout: Layout) -> dict[str, Spec]:
    """Name, shape and dtype of every workspace; the largest pass decides."""
    rows = layout.slots * layout.prompt
    config = _logits_config(layout)
    blocks = triton.cdiv(layout.vocabulary, config.block_n)
    specs: dict[str, Spec] = {
        "x": ((rows, layout.width), layout.dtype),
        "query": ((rows, layout.width), layout.dtype),
        "mixed": ((rows, layout.width), layout.dtype),
        "hidden": ((rows, layout.ffn), layout.dtype),
        "probe_rows": ((layout.slots, layout.width), layout.dtype),
        "absent": ((layout.slots,), torch.bool),
        "limits": ((layout.slots, 4), torch.int32),
        "flags": ((layout.vocabulary,), torch.uint8),
        "prompt": ((layout.slots, layout.prompt), torch.int64),
        "first_positions": ((layout.slots,), torch.int32),
        "probe_positions": ((layout.slots,), torch.int64),
        "settings": ((layout.slots, 8), torch.int32),
        "best_values": ((4, layout.slots, blocks), torch.float32),
        "best_ids": ((2, layout.slots, blocks), torch.int32),
    }
    if layout.raw:
        specs["logits"] = ((layout.slots, layout.vocabulary), torch.float32)
    return specs | (_absorbed_buffers(layout) if layout.absorbed else _projected_buffers(layout))


def _passes(layout: Layout) -> tuple[int, ...]:
    return (1, layout.prompt)


def _projected_buffers(layout: Layout) -> dict[str, Spec]:
    sizes = [
        cross_attention.workspace_size(layout.slots * count, layout.heads, splits(layout, count))
        for count in _passes(layout)
    ]
    specs: dict[str, Spec] = {
        "partials": ((max(size.partials for size in sizes),), torch.float32),
        "counters": ((max(size.counters for size in sizes),), torch.int32),
    }
    if layout.clips <= RECORDED_CLIPS:
        specs["states"] = ((layout.clips, layout.keys, layout.width), layout.dtype)
    return specs


def _absorbed_buffers(layout: Layout) -> dict[str, Spec]:
    rows, heads = layout.slots * layout.prompt, layout.heads
    cells = max(splits(layout, count) * layout.slots * count for count in _passes(layout))
    return {
        "folded": ((rows, heads, layout.width), layout.dtype),
        "context": ((cells, heads, layout.width), layout.dtype),
        "stats": ((cells, heads, 2), torch.float32),
    }


def _logits_config(layout: Layout) -> logits_kernel.Config:
    return logits_kernel.choose(layout.slots, layout.width, layout.dtype)


@dataclass
class Workspace:
    """The workspaces of one state; shapes as in `workspace_buffers`."""

    layout: Layout
    x: torch.Tensor
    query: torch.Tensor
    mixed: torch.Tensor
    hidden: torch.Tensor
    probe_rows: torch.Tensor
    absent: torch.Tensor
    limits: torch.Tensor
    flags: torch.Tensor
    prompt: torch.Tensor
    first_positions: torch.Tensor
    probe_positions: torch.Tensor
    settings: torch.Tensor
    best_values: torch.Tensor
    best_ids: torch.Tensor
    logits: torch.Tensor | None = None
    partials: torch.Tensor | None = None
    counters: torch.Tensor | None = None
    folded: torch.Tensor | None = None
    context: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    states: torch.Tensor | None = None

    @classmethod
    def allocate(cls, layout: Layout, arena: Arena) -> Workspace:
        """Workspaces whose memory follows, in the arena, what was taken before."""
        tensors = {name: arena.take(*spec) for name, spec in workspace_buffers(layout).items()}
        return cls(layout=layout, **tensors)

    def prepare(self) -> None:
        """Initialise what the first pass reads; also needed after others used the memory."""
        for tensor in (self.prompt, self.counters, self.limits, self.settings, self.flags):
            if tensor is not None:
                tensor.zero_()

    @property
    def best(self) -> logits_kernel.Partials:
        """What the logits kernel leaves for `greedy_sample`."""
        return logits_kernel.Partials(self.best_values, self.best_ids, _logits_config(self.layout))

    def absorbed(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Folded queries [R, H, D], contexts [splits, R, H, D], their sums [splits, R, H, 2]."""
        assert self.folded is not None and self.context is not None and self.stats is not None
        rows, parts = self.layout.slots * count, splits(self.layout, count)
        heads, width = self.layout.heads, self.layout.width
        return (
            self.folded[:rows],
            self.context[: parts * rows].view(parts, rows, heads, width),
            self.stats[: parts * rows].view(parts, rows, heads, 2),
        )
