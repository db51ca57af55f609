"""Self-attention of whole sequences: every query attends to every key, in one pass over the keys.

A program owns `block_m` queries of one head and reads the keys and values in blocks of `block_n`.
Two ways of loading share the same body:

    "pointers"     asynchronous copies of what each thread addresses itself; any strides
    "descriptors"  the tensor memory accelerator of CUDA capability 9.0 and above; strides and
                   addresses that are multiples of 16 bytes

Keys beyond the end are masked in the last block only, which is therefore outside the loop.

Numbers: products accumulate in float32, softmax in float32 and in base 2 with the scale folded into
the exponent; probabilities are rounded to the inputs' dtype before the product with the values.
Sources: Milakov and Gimelshein, 2018 (arXiv:1805.02867), for the online softmax; Dao,
"FlashAttention-2", 2023 (arXiv:2307.08691), for the order of the work.
"""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from whisper_flash_attention.errors import KernelShapeError
from whisper_flash_attention.kernels._checks import (
    DESCRIPTOR_ALIGNMENT,
    HEAD_WIDTH,
    check_encoder_attention,
    is_aligned,
)
from whisper_flash_attention.kernels.launch import (
    interpreted,
    launch,
    pdl,
    release,
    release_late,
    wait,
)

# Softmax is in units of log 2, because the hardware's exponential is 2 to the x.
LOG2_E = 1.4426950408889634

# Below this number of tiles of 128 queries, smaller tiles use about 132 processors better.
_PROCESSORS = 132


@dataclass(frozen=True)
class Config:
    """How a program works.

    Args:
        block_m: queries of a program, a power of two of at least 16 (64 for warp-group products).
        block_n: keys per step, likewise.
        warps, stages: of a program, and of its pipeline of keys and values.
        loads: "pointers" or "descriptors".
        registers: maximum per thread, so that more programs fit a processor; None: the compiler's
            choice.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    loads: Literal["pointers", "descriptors"] = "descriptors"
    registers: int | None = None


def choose(batch: int, heads: int, length: int) -> Config:
    """The default configuration for `batch` sequences of `length` with `heads` heads.

    Tuned for GPUs of about 132 processors and capability 9.0; others need `loads="pointers"`.
    """
    tiles = batch * heads * triton.cdiv(length, 64)
    # Three programs of 64 queries fit a processor with two stages, and two with three stages.
    if tiles <= 2 * _PROCESSORS:
        return Config(64, 128, warps=4, stages=3)
    if tiles <= 3 * _PROCESSORS:
        return Config(64, 128, warps=4, stages=2)
    if tiles <= 8 * _PROCESSORS:
        return Config(128, 64, warps=4, stages=3)
    # With 128 registers two programs fit a processor: one's softmax overlaps the other's products.
    return Config(128, 128, warps=8, stages=2, registers=128)


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, scale: float, config: Config | None = None
) -> None:
    """out = softmax(scale * q k^T) v, per sequence and head.

    Args:
        q, k, v: [B, L, H, 64] in float16, bfloat16 or float32, adjacent values within a head;
            otherwise any strides, as slices of one fused [B, L, 3 * H * 64] have.
        out: likewise, written; no alias of the others.
        scale: positive factor of the scores.
        config: overrides `choose`, with which inputs that are not aligned to 16 bytes are loaded
            through pointers.

    Raises:
        KernelShapeError: shapes, strides, dtypes, devices or the configuration do not fit.
    """
    tensors = {"q": q, "k": k, "v": v, "out": out}
    misaligned = [name for name, tensor in tensors.items() if not is_aligned(tensor)]
    check_encoder_attention(tensors, scale, runs_here=q.is_cuda or interpreted())
    batch, length, heads, _ = q.shape
    if config is None:
        config = choose(batch, heads, length)
        if misaligned:
            config = replace(config, loads="pointers")
    if not (config.loads == "pointers" or not misaligned):
        raise KernelShapeError(
            f"descriptors need addresses and strides in multiples of {DESCRIPTOR_ALIGNMENT} bytes, "
            f'but {", ".join(misaligned)} have others: use loads="pointers"'
        )
    if q.numel() == 0:
        return
    tiles = triton.cdiv(length, config.block_m)
    launch(attention_kernel, (batch * heads * tiles,))(
        *_operands(tensors, config),
        *(stride for tensor in tensors.values() for stride in tensor.stride()[:3]),
        length,
        heads,
        scale * LOG2_E,
        TAIL=length % config.block_n != 0,
        HEAD=HEAD_WIDTH,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        DESCRIPTORS=config.loads == "descriptors",
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        **pdl(q.device),
    )


def _operands(tensors: dict[str, Tensor], config: Config) -> list[Any]:
    """The tensors, or descriptors of boxes of one head's rows, zeros beyond the sequence."""
    if config.loads == "pointers":
        return list(tensors.values())
    rows = {"q": config.block_m, "k": config.block_n, "v": config.block_n, "out": config.block_m}
    return [
        TensorDescriptor.from_tensor(tensor.transpose(1, 2), [1, 1, rows[name], HEAD_WIDTH])
        for name, tensor in tensors.items()
    ]


@triton.jit
def load_rows(
    rows, batch, head, first, length, batch_stride, row_stride, head_stride,
    BLOCK: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK, HEAD] rows of one head from `first` on; zeros beyond `length` (if MASKED)."""
    if DESCRIPTORS:
        box = tl.reshape(rows.load([batch, head, first, 0]), (BLOCK, HEAD))
    else:
        row = first + tl.arange(0, BLOCK)
        start = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
        at = rows + start + row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
        box = tl.load(at, mask=(row < length)[:, None], other=0.0) if MASKED else tl.load(at)
    return box


@triton.jit
def attend_block(
    q, k, v, mean, highest, total, scale, first, length, MASKED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One step of the online softmax, over the keys from `first` on."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = first + tl.arange(0, BLOCK_N) < length
        scores = tl.where(seen[None, :], scores, -float("inf"))
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    decay = tl.exp2(highest - new)
    total = total * decay + tl.sum(weights, 1)
    mean = tl.dot(weights.to(v.dtype), v, mean * decay[:, None], input_precision="ieee")
    return mean, new, total


@triton.jit(do_not_specialize=["length", "heads"])
def attention_kernel(
    q, k, v, out,
    q_batch, q_row, q_head,
    k_batch, k_row, k_head,
    v_batch, v_row, v_head,
    out_batch, out_row, out_head,
    length,
    heads,
    scale,
    TAIL: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head; neighbouring programs share the head, hence its keys."""
    tiles = tl.cdiv(length, BLOCK_M)
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles // heads
    head = tl.program_id(0) // tiles % heads
    release(PDL)
    wait(PDL)
    query = tile * BLOCK_M
    queries = load_rows(
        q, batch, head, query, length, q_batch, q_row, q_head, BLOCK_M, HEAD, True, DESCRIPTORS
    )
    mean = tl.zeros((BLOCK_M, HEAD), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for key in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        keys = load_rows(
            k, batch, head, key, length, k_batch, k_row, k_head, BLOCK_N, HEAD, False, DESCRIPTORS
        )
        values = load_rows(
            v, batch, head, key, length, v_batch, v_row, v_head, BLOCK_N, HEAD, False, DESCRIPTORS
        )
        mean, highest, total = attend_block(
            queries, keys, values, mean, highest, total, scale, key, length, False, BLOCK_N
        )
    if TAIL:
        keys = load_rows(
            k, batch, head, whole, length, k_batch, k_row, k_head, BLOCK_N, HEAD, True, DESCRIPTORS
        )
        values = load_rows(
            v, batch, head, whole, length, v_batch, v_row, v_head, BLOCK_N, HEAD, True, DESCRIPTORS
        )
        mean, highest, total = attend_block(
            queries, keys, values, mean, highest, total, scale, whole, length, True, BLOCK_N
        )
    release_late(PDL)
    mean = mean / total[:, None]
    if DESCRIPTORS:
        result = tl.reshape(mean.to(out.dtype), (1, 1, BLOCK_M, HEAD))
        out.store([batch, head, query, 0], result)
    else:
        row = query + tl.arange(0, BLOCK_M)
        start = batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
        at = out + start + row.to(tl.int64)[:, None] * out_row + tl.arange(0, HEAD)[None, :]
        tl.store(at, mean.to(out.dtype.element_ty), mask=(row < length)[:, None])
