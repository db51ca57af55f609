"""The decoder's layers on Triton kernels, launched kernel by kernel, and their workspaces.

Everything lies in the arena's buffers and nothing is allocated, so that a CUDA graph can record it.
A pass works on rows: row r is token r % P of slot r // P, where P is 1 in decoding and the
prompt's length at the start. A layer is eight dependent kernels with projected cross-attention and
nine with absorbed; at batch 1 their number is the time. With many rows its layer norms are up to
three more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.nn import functional as F

from whisper_flash_attention.engine.layout import (
    Arena,
    DecodeState,
    Layout,
    Spec,
    aligned_bytes,
    has_encoder_kernels,
)
from whisper_flash_attention.engine.torch_decoder import SCALE, fill_cross
from whisper_flash_attention.engine.weights import DecoderLayer, DecoderWeights, Norm
from whisper_flash_attention.kernels import logits as logits_kernel
from whisper_flash_attention.kernels.absorbed_attention import absorbed_attention
from whisper_flash_attention.kernels.absorbed_attention import (
    choose_splits as choose_absorbed_splits,
)
from whisper_flash_attention.kernels.absorbed_projections import (
    absorb_query,
    fold_queries,
    project_values,
)
from whisper_flash_attention.kernels.cross_attention import (
    choose_splits,
    cross_attention,
    workspace_size,
)
from whisper_flash_attention.kernels.launch import Overlap, set_pdl
from whisper_flash_attention.kernels.layer_norm import layer_norm
from whisper_flash_attention.kernels.linear import linear, qkv
from whisper_flash_attention.kernels.matmul import matmul
from whisper_flash_attention.kernels.self_attention import self_attention

# Up to this number of clips, the recorded pass includes the projection of keys and values.
RECORDED_CLIPS = 4


def splits(layout: Layout, count: int) -> int:
    """Parts of a clip's states in cross-attention, in a pass of `count` tokens per slot."""
    rows = layout.slots * count
    if layout.absorbed:
        return choose_absorbed_splits(rows, layout.keys)
    return choose_splits(
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
        "adopted": ((layout.slots,), torch.int64),
        "adopted_probability": ((layout.slots,), torch.float32),
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
        workspace_size(layout.slots * count, layout.heads, splits(layout, count))
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
    adopted: torch.Tensor
    adopted_probability: torch.Tensor
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
        """Workspaces in the arena, after what was allocated before."""
        tensors = {name: arena.take(*spec) for name, spec in workspace_buffers(layout).items()}
        return cls(layout=layout, **tensors)

    def prepare(self) -> None:
        """Initialise what the first pass reads; also needed after others used the memory."""
        for tensor in (self.prompt, self.counters, self.limits, self.settings, self.flags):
            if tensor is not None:
                tensor.zero_()

    @property
    def best(self) -> logits_kernel.Partials:
        """The reduced logits, for `greedy_sample`."""
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


# Up to this width and number of rows one kernel projects and absorbs queries; beyond, two are
# faster.
ONE_KERNEL_WIDTH = 512
ONE_KERNEL_ROWS = 64

# From this width and number of rows on, layer norms have a kernel of their own. Otherwise it is the
# product's kernel that normalises, and each of its programs repeats that for all of its rows.
NORM_WIDTH = 768
NORM_ROWS = 32

# Up to this number of slots kernels overlap with their predecessors (programmatic dependent
# launch), because latency dominates. With more slots, programs that start early take resources from
# those that still run.
OVERLAPPED_SLOTS = 2


@dataclass(frozen=True)
class Overlaps:
    """When kernels let their successors start.

    Args:
        weights: of a kernel whose successor has weights to load.
        nothing: of a kernel whose successor, as attention, has none.
        end: of the last kernel of a step.
    """

    weights: Overlap
    nothing: Overlap
    end: Overlap = Overlap.LATE

    @classmethod
    def of(cls, slots: int) -> Overlaps:
        if slots <= OVERLAPPED_SLOTS:
            return cls(weights=Overlap.EARLY, nothing=Overlap.LATE)
        return cls(weights=Overlap.NONE, nothing=Overlap.NONE)


class TritonLayers:
    """Launches the kernels of one pass on a state's buffers; the state has workspaces."""

    def __init__(self, weights: DecoderWeights, state: DecodeState, work: Workspace) -> None:
        self._weights = weights
        self._state = state
        self._work = work
        self._overlaps = Overlaps.of(state.layout.slots)
        # Whether a kernel projects cross keys and values, into the cache and without cuBLAS, where
        # the encoder's kernels run.
        self.projects = not state.layout.absorbed and has_encoder_kernels(
            state.layout.device, state.layout.dtype
        )

    def embed(self, tokens: torch.Tensor, *, ragged: bool = False) -> None:
        """Write the residual rows of tokens [slots, P], each slot from its own position.

        With `ragged`, tokens at positions below 0 are padding, whose keys are neither stored nor
        read, and a slot's prompt starts at the beginning of its row of `tokens`.
        """
        count = tokens.shape[1]
        places = self._state.positions[:, None] + torch.arange(count, device=tokens.device)
        if ragged:
            places = places.clamp(min=0)
            tokens = tokens.gather(1, places)
        x = F.embedding(tokens, self._weights.embedding)
        x += F.embedding(places, self._weights.positions)
        self.residual(count).copy_(x.view(-1, x.shape[-1]))

    def residual(self, count: int) -> torch.Tensor:
        """The residual stream [slots * P, D] of a pass with P = `count` tokens a slot."""
        return self._work.x[: self._state.layout.slots * count]

    def project_states(self, states: torch.Tensor) -> None:
        """Write what cross-attention reads of the encoder's states [clips, S, D]."""
        state = self._state
        if not self.projects:
            fill_cross(self._weights, states, state)
            return
        assert state.cross_keys is not None and state.cross_values is not None
        # A pass ends with another overlap set. A capture would then load a kernel that has not run,
        # which CUDA forbids, and this kernel would start before the copies that precede it end.
        set_pdl(Overlap.NONE)
        clips = len(states)
        for index, layer in enumerate(self._weights.layers):
            k, v = layer.cross_attention.k, layer.cross_attention.v
            matmul(states, [k.weight], [k.bias], state.cross_keys[index, :clips])
            matmul(states, [v.weight], [v.bias], state.cross_values[index, :clips])

    def layers(self, count: int) -> None:
        """Run the residual rows of `count` tokens a slot through all layers, in place.

        The next launch on this thread is treated as the end of a step.
        """
        for index, layer in enumerate(self._weights.layers):
            self._self_attention(layer, index, count)
            self._cross_attention(layer, index, count)
            self._feed_forward(layer, count)
        set_pdl(self._overlaps.end)

    def _self_attention(self, layer: DecoderLayer, index: int, count: int) -> None:
        state, part = self._state, layer.self_attention
        x = self.residual(count)
        query, mixed = self._work.query[: len(x)], self._work.mixed[: len(x)]
        keys, values = state.keys[index], state.values[index]
        set_pdl(self._overlaps.nothing)
        inputs, options = self._normalised(x, layer.self_norm)
        qkv(
            inputs,
            part.q.weight,
            part.q.bias,
            part.k.weight,
            part.k.bias,
            part.v.weight,
            part.v.bias,
            query,
            keys,
            values,
            state.positions,
            tokens_per_slot=count,
            scale=SCALE,
            **options,
        )
        set_pdl(self._overlaps.weights)
        self_attention(
            query,
            keys,
            values,
            state.positions,
            mixed,
            tokens_per_slot=count,
            finished=state.finished,
            ancestors=state.ancestors if state.branching else None,
        )
        linear(mixed, part.out.weight, part.out.bias, x, residual=x)

    def _cross_attention(self, layer: DecoderLayer, index: int, count: int) -> None:
        x = self.residual(count)
        mixed = self._work.mixed[: len(x)]
        if self._state.states is not None:
            self._absorbed(layer, index, x, mixed, count)
        else:
            self._projected(layer, index, x, mixed, count)
        out = layer.cross_attention.out
        linear(mixed, out.weight, out.bias, x, residual=x)

    def _query(self, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        part, query = layer.cross_attention.q, self._work.query[: len(x)]
        inputs, options = self._normalised(x, layer.cross_norm)
        linear(inputs, part.weight, part.bias, query, **options)
        return query

    def _normalised(self, x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, dict[str, Any]]:
        """Input and options of a product after a layer norm of x, whose kernel may have the norm.

        Else the normalised rows lie where attention writes its result later.
        """
        rows, width = x.shape
        if rows < NORM_ROWS or width < NORM_WIDTH:
            return x, {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        normed = self._work.mixed[:rows]
        layer_norm(x, norm.weight, norm.bias, normed, eps=norm.eps)
        return normed, {}

    def _projected(
        self, layer: DecoderLayer, index: int, x: torch.Tensor, mixed: torch.Tensor, count: int
    ) -> None:
        state, work = self._state, self._work
        assert state.cross_keys is not None and state.cross_values is not None
        set_pdl(self._overlaps.nothing)
        query = self._query(layer, x)
        set_pdl(self._overlaps.weights)
        cross_attention(
            query,
            state.cross_keys[index],
            state.cross_values[index],
            mixed,
            scale=SCALE,
            partials=work.partials,
            counters=work.counters,
            splits=splits(state.layout, count),
            rows_per_clip=count * state.layout.slots_per_clip,
            tokens_per_slot=count,
            finished=state.finished,
        )

    def _absorbed(
        self, layer: DecoderLayer, index: int, x: torch.Tensor, mixed: torch.Tensor, count: int
    ) -> None:
        state, work, part, norm = self._state, self._work, layer.cross_attention, layer.cross_norm
        assert state.states is not None
        folded, context, stats = work.absorbed(count)
        if x.shape[1] <= ONE_KERNEL_WIDTH and len(x) <= ONE_KERNEL_ROWS:
            set_pdl(self._overlaps.nothing)
            absorb_query(
                x,
                norm.weight,
                norm.bias,
                part.q.weight,
                part.q.bias,
                part.k.weight,
                folded,
                scale=SCALE,
                eps=norm.eps,
            )
        else:
            query = self._query(layer, x)
            set_pdl(self._overlaps.nothing)
            fold_queries(query, part.k.weight, folded, scale=SCALE)
        set_pdl(self._overlaps.weights)
        absorbed_attention(
            folded,
            state.states,
            context,
            stats,
            rows_per_clip=count * state.layout.slots_per_clip,
            tokens_per_slot=count,
            finished=state.finished,
            splits=splits(state.layout, count),
            # Every other layer begins with the states that the previous one left in the cache.
            backwards=index % 2 == 1,
        )
        project_values(
            context,
            stats,
            part.v.weight,
            part.v.bias,
            mixed,
            finished=state.finished,
            tokens_per_slot=count,
        )

    def _feed_forward(self, layer: DecoderLayer, count: int) -> None:
        x = self.residual(count)
        hidden = self._work.hidden[: len(x)]
        inputs, options = self._normalised(x, layer.ffn_norm)
        linear(inputs, layer.fc1.weight, layer.fc1.bias, hidden, gelu=True, **options)
        linear(hidden, layer.fc2.weight, layer.fc2.bias, x, residual=x)
