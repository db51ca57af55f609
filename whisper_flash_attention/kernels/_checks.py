"""Checks of kernel arguments: shapes, dtypes, devices, strides and launch configurations.

Every function raises `KernelShapeError`, whose message has what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whisper_flash_attention.errors import KernelShapeError

HEAD_WIDTH = 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Addresses and strides of operands that are loaded through tensor descriptors, in bytes.
DESCRIPTOR_ALIGNMENT = 16


def check_kind(name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that a tensor has a kernel's dtype, and the dtype and device of another one."""
    if not (tensor.dtype in DTYPES and (tensor.dtype, tensor.device) == (like.dtype, like.device)):
        raise KernelShapeError(
            f"{name} must be float16, bfloat16 or float32 like x ({like.dtype} on {like.device}), "
            f"but is {tensor.dtype} on {tensor.device}"
        )


def check_contiguous(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Check shape, contiguity, dtype and device."""
    kind = "" if tensor.is_contiguous() else " and is not contiguous"
    if tensor.shape != shape or kind:
        raise KernelShapeError(
            f"{name} must be contiguous {list(shape)}, but has shape {list(tensor.shape)}{kind}"
        )
    check_kind(name, tensor, like)


def check_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    limit: float | None,
    shift: Tensor | None,
) -> None:
    """Check the arguments of `layer_norm`."""
    if not (x.ndim == 2 and x.dtype in DTYPES and x.shape[1] > 0):
        raise KernelShapeError(
            f"x must be [R, D] in float16, bfloat16 or float32, but is {list(x.shape)} in {x.dtype}"
        )
    for name, rows in (("x", x), ("out", out)):
        dense = rows.ndim == 2 and rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]
        if not (rows.shape == x.shape and (dense or rows.numel() == 0)):
            raise KernelShapeError(
                f"{name} must be {list(x.shape)} with adjacent values and rows apart, but is "
                f"{list(rows.shape)} with strides {rows.stride()}"
            )
    vectors = {"weight": weight, "bias": bias}
    shifts = {} if shift is None else {"shift": shift}
    for name, vector in (vectors | shifts).items():
        if not (vector.shape == x.shape[1:] and vector.is_contiguous()):
            raise KernelShapeError(
                f"{name} must be contiguous [{x.shape[1]}], but is {list(vector.shape)} with "
                f"strides {vector.stride()}"
            )
    for name, tensor in (vectors | {"out": out} | shifts).items():
        dtype = torch.float32 if name == "shift" else x.dtype
        if (tensor.dtype, tensor.device) != (dtype, x.device):
            raise KernelShapeError(
                f"{name} must be {dtype} on {x.device}, but is {tensor.dtype} on {tensor.device}"
            )
    if limit is not None and not limit > 0:
        raise KernelShapeError(f"limit must be positive, but is {limit}")


def _check_norm(norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    if (norm_weight is None) != (norm_bias is None):
        raise KernelShapeError("norm_weight and norm_bias go together, but only one was given")


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Check the arguments of `linear`."""
    rows, k, n = x.shape[0], x.shape[-1], weight.shape[0]
    _check_norm(norm_weight, norm_bias)
    for name, tensor, shape in (
        ("x", x, (rows, k)),
        ("weight", weight, (n, k)),
        ("out", out, (rows, n)),
        ("bias", bias, (n,)),
        ("residual", residual, (rows, n)),
        ("norm_weight", norm_weight, (k,)),
        ("norm_bias", norm_bias, (k,)),
    ):
        if tensor is not None:
            check_contiguous(name, tensor, shape, x)


def check_qkv(
    x: Tensor,
    vectors: dict[str, Tensor | None],
    matrices: dict[str, Tensor],
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    tokens_per_slot: int,
) -> None:
    """Check the arguments of `qkv`; `vectors` are [D] and `matrices` [D, D]."""
    rows, d = x.shape[0], x.shape[-1]
    _check_norm(vectors["norm_weight"], vectors["norm_bias"])
    check_contiguous("x", x, (rows, d), x)
    check_contiguous("q_out", q_out, (rows, d), x)
    for name, vector in vectors.items():
        if vector is not None:
            check_contiguous(name, vector, (d,), x)
    for name, matrix in matrices.items():
        check_contiguous(name, matrix, (d, d), x)
    if not (tokens_per_slot >= 1 and rows % tokens_per_slot == 0 and d % HEAD_WIDTH == 0):
        raise KernelShapeError(
            f"x must be [slots * tokens_per_slot, {HEAD_WIDTH} * heads], but is {list(x.shape)} "
            f"with tokens_per_slot {tokens_per_slot}"
        )
    slots, heads = rows // tokens_per_slot, d // HEAD_WIDTH
    for name, cache in (("keys", keys), ("values", values)):
        if not (
            cache.ndim == 4
            and cache.shape[0] >= slots
            and cache.shape[2] >= 1
            and (cache.shape[1], cache.shape[3]) == (heads, HEAD_WIDTH)
            and cache.stride() == keys.stride()
            and cache.shape[2] == keys.shape[2]
            and cache.stride(3) == 1
            and (cache.dtype, cache.device) == (x.dtype, x.device)
        ):
            raise KernelShapeError(
                f"{name} must be [{slots} or more, {heads}, T, {HEAD_WIDTH}] in {x.dtype} on "
                f"{x.device} with the same strides as keys and the last 1, but is "
                f"{list(cache.shape)} in {cache.dtype} on {cache.device}, strides {cache.stride()}"
            )
    if not (positions.dtype == torch.int32 and positions.ndim == 1 and positions.shape[0] >= slots):
        raise KernelShapeError(
            f"positions must be int32 [{slots}], but is {positions.dtype} {list(positions.shape)}"
        )


def check_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out: Tensor,
    residual: Tensor | None,
    most_parts: int,
) -> None:
    """Check the arguments of `matmul`."""
    parts = len(weights)
    if not (1 <= parts <= most_parts and len(biases) == parts):
        raise KernelShapeError(
            f"{parts} weights and {len(biases)} biases: give one to three of both"
        )
    clips, rows, k = x.shape
    n = weights[0].shape[0]
    result = (clips, rows, n * parts)
    by_heads = out.ndim == 4 and parts == 1 and residual is None and n % out.shape[1] == 0
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("x", x, (clips, rows, k)),
        ("out", out, (clips, out.shape[1], rows, n // out.shape[1]) if by_heads else result),
        *(("a weight", weight, (n, k)) for weight in weights),
        *(("a bias", bias, (n,)) for bias in biases),
        ("residual", residual, result),
    ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.stride(-1) != 1:
            raise KernelShapeError(
                f"{name} must be {list(shape)} with a dense last axis, but is "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        check_kind(name, tensor, x)
    for name, tensor in [("x", x), *(("a weight", weight) for weight in weights)]:
        steps = [tensor.storage_offset(), *tensor.stride()[:-1]]
        if any(step * tensor.element_size() % DESCRIPTOR_ALIGNMENT for step in steps):
            raise KernelShapeError(
                f"{name} must start, and step from row to row, by multiples of "
                f"{DESCRIPTOR_ALIGNMENT} bytes, but has strides {list(tensor.stride())} of "
                f"{tensor.element_size()} bytes"
            )


def check_cache_attention(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """Check that heads, dtypes and last dimensions of `self_attention` or `cross_attention` agree.

    q, out: [R, H * 64]; keys, values: [B, H, T, 64]; one dtype; last dimensions contiguous.
    """
    heads = keys.shape[1] if keys.ndim == 4 else 0
    if keys.shape != values.shape or keys.ndim != 4 or keys.shape[3] != HEAD_WIDTH:
        problem = f"keys and values must both be [B, H, T, {HEAD_WIDTH}]"
    elif q.shape != out.shape or q.ndim != 2 or q.shape[1] != heads * HEAD_WIDTH:
        problem = f"q and out must both be [R, {heads * HEAD_WIDTH}]"
    elif len({tensor.dtype for tensor in (q, keys, values, out)}) > 1:
        problem = "q, keys, values and out must have one dtype"
    elif any(tensor.stride(-1) != 1 for tensor in (q, keys, values, out)):
        problem = "the last dimension of q, keys, values and out must be contiguous"
    else:
        return
    found = ", ".join(
        f"{name} {list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
        for name, tensor in (("q", q), ("keys", keys), ("values", values), ("out", out))
    )
    raise KernelShapeError(f"{problem}; found {found}")


def check_slots(
    q: Tensor,
    slots: int,
    capacity: int,
    positions: Tensor,
    tokens_per_slot: int,
    finished: Tensor | None,
    ancestors: Tensor | None,
) -> None:
    """Check the rows and the per-slot tensors of `self_attention`."""
    expected = {
        "q": q.shape[0] == slots * tokens_per_slot,
        "positions": positions.shape == (slots,),
        "finished": finished is None or finished.shape == (slots,),
        "ancestors": ancestors is None
        or (ancestors.shape == (slots, capacity) and ancestors.stride(1) == 1),
    }
    wrong = [name for name, fits in expected.items() if not fits]
    if wrong:
        raise KernelShapeError(
            f"{', '.join(wrong)} must fit {slots} slots of {tokens_per_slot} tokens each "
            f"and a cache of {capacity} positions; q has {q.shape[0]} rows"
        )


def check_clip_rows(
    rows: int, clips: int, rows_per_clip: int, tokens_per_slot: int, finished: Tensor | None
) -> None:
    """Check that the rows of `cross_attention` are those of whole clips and whole slots."""
    if rows != clips * rows_per_clip or rows_per_clip % tokens_per_slot:
        raise KernelShapeError(
            f"{clips} clips of {rows_per_clip} rows each with slots of {tokens_per_slot} tokens "
            f"do not fit q, which has {rows} rows"
        )
    if finished is not None and finished.shape != (rows // tokens_per_slot,):
        raise KernelShapeError(
            f"finished must be [{rows // tokens_per_slot}], one per slot; "
            f"found {list(finished.shape)}"
        )


def check_splits(
    splits: int,
    tiles: int,
    needed: tuple[int, int],
    partials: Tensor | None,
    counters: Tensor | None,
) -> None:
    """Check the number of splits, and that their workspaces have `needed` elements."""
    if not 1 <= splits <= tiles:
        raise KernelShapeError(f"splits must be 1 to {tiles}, a tile of keys each; got {splits}")
    for name, tensor, size, dtype in (
        ("partials", partials, needed[0], torch.float32),
        ("counters", counters, needed[1], torch.int32),
    ):
        if size == 0:
            continue
        found = "none" if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
        if not (tensor is not None and tensor.numel() >= size and tensor.dtype is dtype):
            raise KernelShapeError(
                f"{name} must hold {size} elements of {dtype} for {splits} splits; found {found}"
            )
        if tensor is not None and not tensor.is_contiguous():
            raise KernelShapeError(f"{name} must be contiguous")


def is_aligned(tensor: Tensor) -> bool:
    """Whether tensor descriptors can address a tensor: its address and its outer strides."""
    strides = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
    return not any(number % DESCRIPTOR_ALIGNMENT for number in (tensor.data_ptr(), *strides))


def check_encoder_attention(tensors: dict[str, Tensor], scale: float, *, runs_here: bool) -> None:
    """Check q, k, v and out of `encoder_attention.attention`."""
    q = tensors["q"]
    reasons = []
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or tensor.shape != q.shape or tensor.shape[-1] != HEAD_WIDTH:
            reasons.append(f"{name} is {list(tensor.shape)}, not [B, L, H, {HEAD_WIDTH}] like q")
        elif tensor.stride(3) != 1:
            reasons.append(f"{name} has strides {tensor.stride()}, but its last must be 1")
        if tensor.dtype not in DTYPES or (tensor.dtype, tensor.device) != (q.dtype, q.device):
            reasons.append(
                f"{name} is {tensor.dtype} on {tensor.device}, not float16, bfloat16 or float32 "
                f"like q, which is {q.dtype} on {q.device}"
            )
    if not runs_here:
        reasons.append(f"it runs on CUDA devices, but q is on {q.device}")
    if not scale > 0:
        reasons.append(f"scale must be positive, but is {scale}")
    if reasons:
        raise KernelShapeError(f"this attention cannot run: {'; '.join(reasons)}")


def check_absorbed_attention(
    queries: Tensor,
    states: Tensor,
    partial_out: Tensor,
    partial_stats: Tensor,
    rows_per_clip: int,
    splits: int,
    formulation_reasons: list[str],
) -> None:
    """Check the arguments of `absorbed_attention`; the formulation has its own reasons."""
    rows, heads, d = queries.shape
    reasons = []
    if rows % rows_per_clip or states.shape[0] * rows_per_clip < rows or states.shape[2] != d:
        reasons.append(f"states {tuple(states.shape)} do not fit {rows_per_clip} rows per clip")
    if queries.dtype != states.dtype:
        reasons.append(f"queries are {queries.dtype}, states {states.dtype}")
    shapes = tuple(partial_out.shape), tuple(partial_stats.shape)
    if shapes != ((splits, rows, heads, d), (splits, rows, heads, 2)) or (
        partial_stats.dtype != torch.float32
    ):
        reasons.append(f"workspaces are {shapes} for {splits} splits")
    if not all(t.is_contiguous() for t in (queries, states, partial_out, partial_stats)):
        reasons.append("a tensor is not contiguous")
    if d % HEAD_WIDTH:
        reasons.append(f"the width is not a multiple of {HEAD_WIDTH}")
    reasons += formulation_reasons
    if reasons:
        raise KernelShapeError(
            f"absorbed attention of queries {tuple(queries.shape)} cannot run: {'; '.join(reasons)}"
        )


def check_absorbed_query(x: Tensor, out: Tensor, *weights: Tensor) -> None:
    """Check x [R, D], square weights and out [R, H, D] of `absorb_query` and `fold_queries`."""
    rows, d = x.shape
    result = (rows, d // HEAD_WIDTH, d)
    if not (
        d % HEAD_WIDTH == 0
        and out.shape == result
        and all(weight.shape == (d, d) for weight in weights)
    ):
        raise KernelShapeError(
            f"absorbed queries of {tuple(x.shape)} need out {result} and square weights; found "
            f"{tuple(out.shape)}, {', '.join(str(tuple(weight.shape)) for weight in weights)}"
        )


def check_absorbed_values(partial_out: Tensor, v_weight: Tensor, out: Tensor) -> None:
    """Check the arguments of `project_values`."""
    _, rows, heads, d = partial_out.shape
    if not (heads * HEAD_WIDTH == d and out.shape == (rows, d) and v_weight.shape == (d, d)):
        raise KernelShapeError(
            f"values of parts {tuple(partial_out.shape)} need D = {HEAD_WIDTH} H, a weight "
            f"{(d, d)} and out {(rows, d)}; found {tuple(v_weight.shape)} and {tuple(out.shape)}"
        )


def check_logits(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    embedding: Tensor,
    slots: int,
    blocks: tuple[int, int],
    tokens_per_slot: int,
    block_k: int,
) -> None:
    """Check the arguments of `logits`; `blocks` are those of the partials and those needed."""
    if embedding.shape[1] % block_k:
        raise KernelShapeError(f"block_k {block_k} does not divide the width {embedding.shape[1]}")
    if norm_weight is None and norm_bias is not None:
        raise KernelShapeError("norm_bias was given without norm_weight")
    if blocks[0] != blocks[1] or x.shape[0] != slots * tokens_per_slot:
        raise KernelShapeError(
            f"partials of {slots} slots and {blocks[0]} blocks do not fit x {tuple(x.shape)}, "
            f"embedding {tuple(embedding.shape)} and {tokens_per_slot} tokens per slot"
        )


def check_greedy_sample(x: Tensor, output: Tensor, embedding: Tensor, slots: int, pad: int) -> None:
    """Check the arguments of `greedy_sample`."""
    rows, width = embedding.shape
    if not (x.shape == (slots, width) and output.shape[0] == slots and 0 <= pad < rows):
        raise KernelShapeError(
            f"x {tuple(x.shape)}, output {tuple(output.shape)} and pad {pad} do not fit {slots} "
            f"slots and an embedding {tuple(embedding.shape)}"
        )


def check_transpose(features: Tensor, out: Tensor) -> None:
    """Check the arguments of `transpose`."""
    clips, channels, times = features.shape
    if not (out.shape == (clips, out.shape[1], channels) and out.shape[1] > times):
        raise KernelShapeError(
            f"out must be [{clips}, more than {times}, {channels}], but is {list(out.shape)}"
        )
    if features.stride(2) != 1 or not out.is_contiguous():
        raise KernelShapeError("features must be dense over time, and out contiguous")
    if (features.dtype, features.device) != (out.dtype, out.device):
        raise KernelShapeError(f"features are {features.dtype}, out is {out.dtype}")


def check_dtw(*tensors: Tensor) -> None:
    """Check that the operands of the alignment kernels are contiguous."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise KernelShapeError("the tensors of an alignment kernel must be contiguous")
