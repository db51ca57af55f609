"""Absorbed cross-attention: attend to the encoder's output itself, not to keys and values.

Where the key projection has no bias, keys k_j = W_k e_j and values v_j = W_v e_j + b_v give

    q . k_j        = (W_k^T q) . e_j                       `absorbed_query.absorb_query`
    sum_j p_j v_j  = W_v (sum_j p_j e_j) + b_v             `absorbed_values.project_values`

so that between the two one read of the states e serves all heads of a clip, and every layer. This
module owns the pass over the states: which formulation (`absorbed_tiles`), how many queries and
keys a program takes, and in how many parts the keys are split.
"""

# Triton's kernels carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from whisper_flash_attention.errors import UnsupportedAttention
from whisper_flash_attention.kernels.absorbed_tiles import (
    blocks_kernel,
    rows_kernel,
    wgmma_kernel,
)
from whisper_flash_attention.kernels.launch import interpreted, launch, pdl

Formulation = Literal["rows", "wgmma", "blocks"]
FORMULATIONS: tuple[Formulation, ...] = get_args(Formulation)
MOST_SPLITS = 8


@dataclass(frozen=True)
class AttentionConfig:
    """How one program works: at most `queries` queries of one clip, `keys` keys at a time."""

    formulation: Formulation
    queries: int = 16
    keys: int = 16
    warps: int = 4
    stages: int = 3


def split_columns(d: int) -> tuple[int, int] | None:
    """`d` as one or two powers of two of at least 64 (384 = 256 + 128), or None."""
    high = 1 << (d.bit_length() - 1)
    low = d - high
    if d < 64 or (low and (low < 64 or low & (low - 1))):
        return None
    return high, low


def choose_config(
    clip_queries: int, d: int, dtype: torch.dtype, capability: tuple[int, int] = (9, 0)
) -> AttentionConfig:
    """A configuration for `clip_queries` queries per clip (rows x heads) of width `d`.

    Args:
        capability: the device's CUDA compute capability; below 9.0 there are no tensor descriptors
            in hardware, hence `rows`.
    """
    if dtype == torch.float32 or split_columns(d) is None:
        return AttentionConfig("blocks", queries=16, keys=16, warps=4, stages=2)
    if capability < (9, 0):
        warps = 4 if d <= 512 else 8
        return AttentionConfig("rows", queries=16, keys=16, warps=warps, stages=2)
    if d <= 512:
        return AttentionConfig("wgmma", queries=16, keys=64, warps=4, stages=3)
    if d <= 768:
        return AttentionConfig("wgmma", queries=16, keys=64, warps=4, stages=2)
    if d <= 1024:
        return AttentionConfig("rows", queries=16, keys=16, warps=4, stages=3)
    return AttentionConfig("rows", queries=32, keys=32, warps=8, stages=2)


def choose_splits(rows: int, keys: int, multiprocessors: int = 132) -> int:
    """In how many parts to read each clip's `keys`, so that `rows` clips fill the device.

    The time of a launch is taken as rounds of programs over the multiprocessors, each as long as
    one part's keys, plus a start-up of about 48 keys' time per round. At most 8 parts.

    Args:
        rows: programs without a split: clips, or rows where rows share nothing.
        multiprocessors: programs that run at the same time.
    """

    def cost(splits: int) -> float:
        rounds = triton.cdiv(rows * splits, multiprocessors)
        return float(rounds * (keys / splits + 48))

    most = max(1, min(MOST_SPLITS, keys // 64))
    return min(range(1, most + 1), key=cost)


def workspace_shapes(
    rows: int, heads: int, d: int, splits: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of `partial_out` [splits, R, H, D] and `partial_stats` [splits, R, H, 2] (float32)."""
    return (splits, rows, heads, d), (splits, rows, heads, 2)


def absorbed_attention(
    queries: torch.Tensor,
    states: torch.Tensor,
    partial_out: torch.Tensor,
    partial_stats: torch.Tensor,
    *,
    rows_per_clip: int = 1,
    tokens_per_slot: int = 1,
    finished: torch.Tensor | None = None,
    splits: int,
    backwards: bool = False,
    config: AttentionConfig | None = None,
) -> None:
    """Softmax-weighted means of the states, per part of the keys: softmax_j(q . e_j) e_j.

    Args:
        queries: [R, H, D] absorbed (and scaled) queries; row r attends to clip r // rows_per_clip.
        states: [C, S, D] encoder output, C >= R / rows_per_clip; the dtype of `queries`.
        partial_out: [splits, R, H, D], written: each part's mean, normalised within the part.
        partial_stats: [splits, R, H, 2] float32, written: max of log2(e) q . e_j over the part,
            and sum of 2 ** (log2(e) q . e_j - max).
        rows_per_clip: consecutive rows that share a clip (beams, tokens of a short prefill).
        tokens_per_slot: row r belongs to slot r // tokens_per_slot.
        finished: [slots] bool; where every row of a program has finished nothing is read, and the
            row's parts are zeros with stats (-inf, 0). Other finished rows may get values.
        splits: parts of the keys; `choose_splits` gives a good number.
        backwards: read the keys from the last to the first. What a launch read last may still be
            in the device's cache: the next one on the same states does well to begin there.
        config: overrides `choose_config`.

    Raises:
        UnsupportedAttention: shapes, dtypes or D do not fit each other or the formulation.
    """
    rows, heads, d = queries.shape
    device = states.device
    if config is None:
        capability = torch.cuda.get_device_capability(device) if states.is_cuda else (9, 0)
        config = choose_config(rows_per_clip * heads, d, states.dtype, capability)
    _check(queries, states, partial_out, partial_stats, rows_per_clip, splits, config)

    clip_queries = rows_per_clip * heads
    tiles = triton.cdiv(clip_queries, config.queries)
    width = triton.cdiv(clip_queries, tiles)
    tiles = triton.cdiv(clip_queries, width)
    programs = rows // rows_per_clip * tiles
    arguments: dict[str, Any] = {
        "queries": queries,
        "partial_out": partial_out,
        "partial_stats": partial_stats,
        "finished": queries if finished is None else finished,
        "n_keys": states.shape[1],
        "n_queries": rows * heads,
        "CLIP_QUERIES": clip_queries,
        "HEADS": heads,
        "TOKENS": tokens_per_slot,
        "TILES": tiles,
        "WIDTH": width,
        "KEYS": config.keys,
        "STAGES": config.stages,
        "FINISHED": finished is not None,
        "BACKWARDS": backwards,
        "num_warps": config.warps,
        **pdl(device),
    }
    if config.formulation == "blocks":
        block = 128 if d % 128 == 0 else 64
        arguments |= {"states": states, "M": 16, "D": d, "BLOCK": block, "CHUNK": 32}
        launch(blocks_kernel, (programs * (d // block), splits))(**arguments)
        return

    d0, d1 = split_columns(d) or (d, 0)
    arguments |= {"D0": d0, "D1": d1}
    grid = (programs, splits)
    if config.formulation == "rows":
        launch(rows_kernel, grid)(states=states, M=_padded(width, 16), **arguments)
        return
    arguments |= _descriptors(states, config.keys, d0, d1)
    launch(wgmma_kernel, grid)(M=_padded(width, 8), **arguments)


def _padded(width: int, least: int) -> int:
    return max(least, 1 << (width - 1).bit_length())


def _descriptors(states: torch.Tensor, keys: int, d0: int, d1: int) -> dict[str, TensorDescriptor]:
    """Boxes of `keys` keys of one clip, per block of columns; zeros beyond the clip."""
    first = TensorDescriptor.from_tensor(states, [1, keys, d0])
    second = TensorDescriptor.from_tensor(states, [1, keys, d1]) if d1 else first
    return {"states0": first, "states1": second}


def _check(
    queries: torch.Tensor,
    states: torch.Tensor,
    partial_out: torch.Tensor,
    partial_stats: torch.Tensor,
    rows_per_clip: int,
    splits: int,
    config: AttentionConfig,
) -> None:
    rows, heads, d = queries.shape
    reasons = []
    if rows % rows_per_clip or states.shape[0] * rows_per_clip < rows or states.shape[2] != d:
        reasons.append(f"states {tuple(states.shape)} do not serve {rows_per_clip} rows per clip")
    if queries.dtype != states.dtype:
        reasons.append(f"queries are {queries.dtype}, states {states.dtype}")
    shapes = tuple(partial_out.shape), tuple(partial_stats.shape)
    if shapes != workspace_shapes(rows, heads, d, splits) or partial_stats.dtype != torch.float32:
        reasons.append(f"workspaces are {shapes} for {splits} splits")
    if not all(t.is_contiguous() for t in (queries, states, partial_out, partial_stats)):
        reasons.append("a tensor is not contiguous")
    if d % 64:
        reasons.append("the width is not a multiple of 64")
    reasons += _misfits(states, d, config)
    if reasons:
        raise UnsupportedAttention(
            f"absorbed attention of queries {tuple(queries.shape)} cannot run: {'; '.join(reasons)}"
        )


def _misfits(states: torch.Tensor, d: int, config: AttentionConfig) -> list[str]:
    """Why the formulation cannot run: only `blocks` takes float32 and any multiple of 64."""
    name = config.formulation
    if name == "blocks":
        return [] if config.queries <= 16 else ["blocks takes at most 16 queries a program"]
    reasons = []
    if states.dtype == torch.float32:
        reasons.append(f"{name} is for float16 and bfloat16, not float32: use blocks")
    if split_columns(d) is None:
        reasons.append(f"{name} needs a width of one or two powers of two: use blocks")
    if name == "wgmma" and not interpreted() and not states.is_cuda:
        reasons.append(f"{name} needs a CUDA device")
    return reasons
