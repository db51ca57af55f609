"""Whisper's encoder: log-mel features in, the states that the decoder attends to out.

The architecture is that of "Robust Speech Recognition via Large-Scale Weak Supervision" (Radford et
al., 2022), section 2.2: two convolutions with GELU, fixed positions, then pre-norm transformer
layers. The numbers are those of Transformers' `WhisperEncoder`, rounded at the same points in half
precision; only the order of sums differs.

The residual stream lives in the caller's tensor. Everything else is temporary, and a large batch is
cut into parts so that the temporaries of one part fit a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_flash_attention.engine.cuda_graphs import GraphRecorder
from whisper_flash_attention.engine.weights import (
    HEAD_WIDTH,
    Attention,
    EncoderLayer,
    EncoderWeights,
    Linear,
    linear,
    normalize,
    queries_keys_values,
)
from whisper_flash_attention.flash_attention import attend

# A GPU is saturated by the clips that fit here; a CPU is by one clip, and likes its caches.
GPU_BUDGET = 256 * 2**20
CPU_BUDGET = 16 * 2**20
CPU_ROWS = 500

# Beyond this number of clips PyTorch's operations keep a GPU busy while the host launches.
MOST_GRAPH_CLIPS = 4

# Beyond this, Transformers' layers clamp float16.
HALF_LIMIT = torch.finfo(torch.float16).max - 1000


@torch.no_grad()
def encode(
    weights: EncoderWeights,
    features: Tensor,
    out: Tensor | None = None,
    *,
    budget_bytes: int | None = None,
) -> Tensor:
    """Encode log-mel features; no gradients. Nothing waits for the device: CUDA graphs can hold it.

    Args:
        weights: on the device and in the dtype of `features`.
        features: [B, mel bins, 2 T], where T is the number of positions (1500).
        out: [B, T, D], filled and returned if given; each clip's [T, D] dense.
        budget_bytes: bound of the temporaries beside `out`; one clip at a time where even that
            needs more. None is `GPU_BUDGET` or `CPU_BUDGET`.

    Returns:
        [B, T, D] in the dtype of `features`.
    """
    batch = features.shape[0]
    if out is None:
        out = features.new_empty(batch, *weights.positions.shape)
    if budget_bytes is None:
        budget_bytes = CPU_BUDGET if features.device.type == "cpu" else GPU_BUDGET
    clips = max(1, budget_bytes // temporary_bytes(weights))
    for part, states in zip(torch.split(features, clips), torch.split(out, clips), strict=True):
        _encode_part(weights, part, states)
    return out


def temporary_bytes(weights: EncoderWeights) -> int:
    """Bytes that one clip takes at the peak of `encode`, beside `out`, what kernels need aside."""
    length, width = weights.positions.shape
    bins = weights.conv1.weight.shape[1]
    padded = 2 * length + 3
    first = padded * 3 * bins + padded * max(bins, width)
    second = padded * width + length * 3 * width
    feed_forward = max(
        (length * (width + layer.fc1.weight.shape[0]) for layer in weights.layers), default=0
    )
    attention = 5 * length * width
    return max(first, second, feed_forward, attention) * weights.positions.element_size()


def _encode_part(weights: EncoderWeights, features: Tensor, out: Tensor) -> None:
    """Encode a few clips: [b, mel bins, 2 T] into `out` [b, T, D]."""
    torch.add(_convolve(weights, features), weights.positions, out=out)
    for layer in weights.layers:
        out.add_(_attend(layer.attention, normalize(out, layer.self_norm), weights.heads))
        for rows in _few_rows(out):
            rows.add_(_feed_forward(layer, rows))
        if out.dtype is torch.float16:
            out.clamp_(-HALF_LIMIT, HALF_LIMIT)
    out.copy_(normalize(out, weights.final_norm))


def _few_rows(x: Tensor) -> Iterator[Tensor]:
    """Rows of x [b, T, D] that go through a layer together; on a CPU, as its caches hold."""
    if x.device.type != "cpu":
        yield x
        return
    for clip in x:
        yield from torch.split(clip, CPU_ROWS)


def _convolve(weights: EncoderWeights, features: Tensor) -> Tensor:
    """Both convolutions with their GELUs: [b, mel bins, 2 T] to [b, T, D].

    As products of matrices: cuDNN's convolution reserves gigabytes of workspace.
    """
    # The first convolution also gets the position before the start. What it makes of that is set
    # to zero: the padding of the second one, already in place. That one, with stride 2, stops short
    # of the padding at the end.
    seen = _windows(F.pad(features.transpose(1, 2), (0, 0, 2, 1)), stride=1)
    seen = _gelu(linear(seen, _rows(weights.conv1)))
    seen[:, 0] = 0
    seen = _windows(seen, stride=2)
    return _gelu(linear(seen, _rows(weights.conv2)))


def _windows(x: Tensor, stride: int) -> Tensor:
    """What a kernel of 3 sees at each of its N steps over time: [b, T, C] to [b, N, 3 C], dense."""
    assert x.is_contiguous()
    batch, time, channels = x.shape
    shape = (batch, (time - 3) // stride + 1, 3 * channels)
    return x.as_strided(shape, (time * channels, stride * channels, 1)).contiguous()


def _rows(convolution: Linear) -> Linear:
    """A convolution's weight [D, C, 3] as [D, 3 C], in the order of `_windows`."""
    return Linear(convolution.weight.permute(0, 2, 1).flatten(1), convolution.bias)


def _attend(attention: Attention, x: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention of [b, T, D] with its output projection."""
    shape = (*x.shape[:2], heads, HEAD_WIDTH)
    parts = queries_keys_values(x, attention)
    # Stock Whisper scales q before the product. The factor is a power of two: it is all one.
    mixed = attend(*(part.view(shape) for part in parts), scale=HEAD_WIDTH**-0.5)
    return linear(mixed.reshape(x.shape), attention.out)


def _feed_forward(layer: EncoderLayer, x: Tensor) -> Tensor:
    return linear(_gelu(linear(normalize(x, layer.ffn_norm), layer.fc1)), layer.fc2)


def _gelu(x: Tensor) -> Tensor:
    """The exact GELU, in place."""
    result: Tensor = torch.ops.aten.gelu_(x)
    return result


class Encoder(Protocol):
    """Encodes batches, on buffers that it keeps between calls."""

    def run(self, features: Tensor) -> Tensor:
        """Encoder states [B, T, D] of features [B, mel bins, 2 T]."""

    def space_bytes(self, clips: int) -> int:
        """Bytes that it uses at the beginning of the shared arena for a batch of this size."""

    def release(self) -> None:
        """Forget recordings, and give back their memory."""


@dataclass(frozen=True)
class _Recorded:
    features: Tensor
    states: Tensor
    graph: torch.cuda.CUDAGraph


class TorchEncoder:
    """PyTorch's operations; on an NVIDIA GPU recorded for few clips, once per number of clips."""

    def __init__(self, weights: EncoderWeights, recorder: GraphRecorder) -> None:
        self._weights = weights
        self._recorded: dict[torch.Size, _Recorded] = {}
        self._recorder = recorder

    def run(self, features: Tensor) -> Tensor:
        few = len(features) <= MOST_GRAPH_CLIPS
        if few and features.is_cuda and torch.version.hip is None:
            return self._replay(features)
        return encode(self._weights, features)

    def _replay(self, features: Tensor) -> Tensor:
        recorded = self._recorded.get(features.shape)
        if recorded is None:
            static = features.clone()
            states = static.new_empty(len(static), *self._weights.positions.shape)
            graph = self._recorder.record(lambda: encode(self._weights, static, states))
            self._recorded[features.shape] = _Recorded(static, states, graph)
            return states.clone()
        recorded.features.copy_(features)
        recorded.graph.replay()
        return recorded.states.clone()

    def space_bytes(self, clips: int) -> int:
        return 0

    def release(self) -> None:
        self._recorded.clear()
