"""Transpose features from channels first to time first, with zero padding around them."""

# Triton's decorators and kernels carry no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from whisper_flash_attention.kernels._checks import check_transpose
from whisper_flash_attention.kernels.launch import launch, pdl, release, release_late, wait

_TIMES = 64


def transpose(features: Tensor, out: Tensor) -> None:
    """out[:, 1 : 1 + T] = features transposed; out's other rows become zeros.

    Args:
        features: [B, C, T], the last axis dense.
        out: [B, N, C] with N > T, contiguous, written; of the dtype of `features`.

    Raises:
        KernelShapeError: shapes, dtypes or strides do not fit together.
    """
    clips, channels, times = features.shape
    length = out.shape[1]
    check_transpose(features, out)
    launch(transpose_kernel, (triton.cdiv(length, _TIMES), clips))(
        features,
        out,
        times,
        length,
        features.stride(0),
        features.stride(1),
        CHANNELS=channels,
        PADDED=triton.next_power_of_2(channels),
        TIMES=_TIMES,
        **pdl(features.device),
    )


@triton.jit
def transpose_kernel(
    features,
    out,
    times,
    length,
    clip_stride,
    channel_stride,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    TIMES: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    clip = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TIMES + tl.arange(0, TIMES)
    channel = tl.arange(0, PADDED)
    known = channel < CHANNELS
    inside = (row >= 1) & (row <= times)
    at = features + clip * clip_stride + channel[:, None] * channel_stride + row[None, :] - 1
    tile = tl.load(at, mask=known[:, None] & inside[None, :], other=0.0)
    release_late(PDL)
    to = out + (clip * length + row[:, None]) * CHANNELS + channel[None, :]
    tl.store(to, tl.trans(tile), mask=(row < length)[:, None] & known[None, :])
