"""The encoder on Triton kernels and cuBLAS, in half precision on NVIDIA's GPUs from Hopper on.

The numbers are those of `encoder.encode`, rounded less often: a product is added to the residual
stream before it is rounded. cuBLAS does that without a bias: the biases of all layers so far are
then a vector of their own in float32, which the layer norms add to what they read of the stream.

All temporaries lie in one space, which the parts of a batch use one after another. A layer is

    LN · queries, keys, values · attention · x += out-projection
    LN · fc1 and GELU                      · x += fc2

and each convolution one product over windows of its input that overlap in memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor

from whisper_flash_attention.engine import layout
from whisper_flash_attention.engine.cuda_graphs import GraphCache, GraphRecorder, recording
from whisper_flash_attention.engine.encoder import HALF_LIMIT
from whisper_flash_attention.engine.layout import Arena, SharedArena, Spec, aligned_bytes
from whisper_flash_attention.engine.weights import HEAD_WIDTH, EncoderLayer, EncoderWeights, Norm
from whisper_flash_attention.kernels.encoder_attention import attention
from whisper_flash_attention.kernels.launch import Overlap, compiling, interpreted, set_pdl
from whisper_flash_attention.kernels.layer_norm import layer_norm
from whisper_flash_attention.kernels.matmul import matmul
from whisper_flash_attention.kernels.transpose import transpose

# Bound of a part's space; the clips that fit saturate a GPU.
BUDGET = 480 * 2**20
# Up to this width and number of rows, one product for queries, keys and values is faster than three
# of cuBLAS.
ONE_PRODUCT_WIDTH = 512
ONE_PRODUCT_ROWS = 6000
# Up to this number of clips launches dominate the time: kernels overlap with their predecessors
# (programmatic dependent launch), and the last norm is recorded, too, although its result must then
# be copied.
FEW_CLIPS = 4
# Number of part sizes whose graphs are kept; they share their space.
MOST_PARTS = 8


def clips_per_part(weights: EncoderWeights, batch: int, budget_bytes: int = BUDGET) -> int:
    """How many clips are encoded at a time: as many as the budget allows, in parts of one size."""
    parts = 1
    while parts < batch and space_bytes(weights, math.ceil(batch / parts)) > budget_bytes:
        parts += 1
    return math.ceil(batch / parts)


def space_bytes(weights: EncoderWeights, clips: int) -> int:
    """Bytes of the temporaries of encoding this number of clips at a time."""
    return sum(aligned_bytes(*spec) for spec in _buffers(weights, clips).values())


def _buffers(weights: EncoderWeights, clips: int) -> dict[str, Spec]:
    """Name, shape and dtype of the buffers of a pass.

    features: the features, at an address that graphs know.
    stream: the residual stream, [clips T, D].
    narrow: normalised rows and mixed values, as long as the stream; first, the padded features.
    wide: queries, keys and values, or the feed-forward's hidden values; first, the output of the
        first convolution.
    kernel: a convolution's weight in the order of its windows.
    shifts: sums of the biases that are not yet added to the stream.
    """
    (length, width), dtype = weights.positions.shape, weights.positions.dtype
    bins = weights.conv1.weight.shape[1]
    ffn = max((layer.fc1.weight.shape[0] for layer in weights.layers), default=0)
    narrow = max(length * width, (2 * length + 2) * bins)
    wide = max(length * max(3 * width, ffn), (2 * length + 1) * width)
    kernel = max(weights.conv1.weight.numel(), weights.conv2.weight.numel())
    return {
        "stream": ((clips * length, width), dtype),
        "narrow": ((clips * narrow,), dtype),
        "wide": ((clips * wide,), dtype),
        "kernel": ((kernel,), dtype),
        "shifts": ((2 * len(weights.layers) + 1, width), torch.float32),
        "features": ((clips, bins, 2 * length), dtype),
    }


def has_own_products(clips: int, width: int) -> bool:
    """Whether a pass over this number of clips does without cuBLAS."""
    is_few = clips <= layout.OWN_PRODUCT_CLIPS and width <= layout.OWN_PRODUCT_CLIPS_WIDTH
    return is_few or width <= layout.OWN_PRODUCT_WIDTH


class EncoderPass:
    """Encodes a fixed number of clips: `load`, `layers`, `store`; nothing waits for the device.

    `layers` and `run` use only the space, so that a CUDA graph of them serves all features.
    """

    def __init__(self, weights: EncoderWeights, clips: int, space: Arena) -> None:
        self._weights = weights
        self._clips = clips
        tensors = {name: space.take(*spec) for name, spec in _buffers(weights, clips).items()}
        self._x, self._narrow = tensors["stream"], tensors["narrow"]
        self._wide, self._kernel = tensors["wide"], tensors["kernel"]
        self._shifts, self._features = tensors["shifts"], tensors["features"]
        self._normed = self._narrow[: self._x.numel()].view_as(self._x)
        self._limit = HALF_LIMIT if self._x.dtype is torch.float16 else None

    def load(self, features: Tensor) -> None:
        """Copy log-mel features [clips, mel bins, 2 T] into the space."""
        self._features.copy_(features)

    def layers(self) -> None:
        """The convolutions and all layers, up to the last norm."""
        self._convolve()
        _sum_biases(self._weights, self._shifts)
        for index, layer in enumerate(self._weights.layers):
            self._attend(layer, 2 * index)
            self._feed_forward(layer, 2 * index + 1)

    def run(self) -> None:
        """Compute `states`."""
        self.layers()
        self.store(self.states)

    @property
    def states(self) -> Tensor:
        """The states [clips, T, D] that `run` computed, valid until the next pass."""
        return self._normed.view(self._clips, -1, self._x.shape[1])

    def store(self, states: Tensor) -> None:
        """Write the states [clips, T, D], contiguous."""
        products = 2 * len(self._weights.layers)
        self._normalize(self._weights.final_norm, states.view(self._x.shape), products)

    def compile(self) -> None:
        """Compile all kernels in parallel, before the first pass."""
        if interpreted():
            return
        with compiling():
            self.run()

    @property
    def _padded(self) -> Tensor:
        """The features with time first, zero-padded: [clips, 2 T + 2, mel bins]."""
        length, bins = self._weights.positions.shape[0], self._weights.conv1.weight.shape[1]
        return _cut(self._narrow, self._clips, 2 * length + 2, bins)

    def _convolve(self) -> None:
        """Both convolutions with their GELUs, plus the position embeddings."""
        conv1, conv2 = self._weights.conv1, self._weights.conv2
        length, width = self._weights.positions.shape
        transpose(self._features, self._padded)
        seen = _cut(self._wide, self._clips, 2 * length + 1, width)
        seen[:, 0].zero_()
        inside = self._rows(conv1.weight)
        matmul(_windows(self._padded, 1), [inside], [conv1.bias], seen[:, 1:], gelu=True)
        inside = self._rows(conv2.weight)
        positions = self._weights.positions.expand(self._clips, -1, -1)
        out = self._x.view(positions.shape)
        matmul(_windows(seen, 2), [inside], [conv2.bias], out, gelu=True, residual=positions)

    def _rows(self, weight: Tensor) -> Tensor:
        """A convolution's weight [D, C, 3] as [D, 3 C], in the order of `_windows`."""
        width, channels, taps = weight.shape
        rows = _cut(self._kernel, width, taps, channels)
        rows.copy_(weight.transpose(1, 2))
        return rows.view(width, taps * channels)

    def _attend(self, layer: EncoderLayer, products: int) -> None:
        part = layer.attention
        self._normalize(layer.self_norm, self._normed, products)
        weights = [part.q.weight, part.k.weight, part.v.weight]
        biases = [part.q.bias, part.k.bias, part.v.bias]
        rows, width = self._x.shape
        room = self._wide[: 3 * rows * width]
        heads = (self._weights.heads, HEAD_WIDTH)
        if width <= ONE_PRODUCT_WIDTH or rows <= ONE_PRODUCT_ROWS:
            matmul(self._normed[None], weights, biases, room.view(1, rows, 3 * width))
            q, k, v = room.view(self._clips, -1, 3, *heads).unbind(2)
        else:
            for each, weight, bias in zip(room.view(3, rows, width), weights, biases, strict=True):
                _product(self._normed, weight, bias, each)
            q, k, v = room.view(3, self._clips, -1, *heads).unbind()
        attention(q, k, v, self._normed.view(q.shape), scale=HEAD_WIDTH**-0.5)
        self._add(self._normed, part.out.weight)

    def _feed_forward(self, layer: EncoderLayer, products: int) -> None:
        self._normalize(layer.ffn_norm, self._normed, products)
        hidden = _cut(self._wide, 1, len(self._x), layer.fc1.weight.shape[0])
        matmul(self._normed[None], [layer.fc1.weight], [layer.fc1.bias], hidden, gelu=True)
        self._add(hidden[0], layer.fc2.weight)

    def _add(self, x: Tensor, weight: Tensor) -> None:
        """Add x weight^T to the stream."""
        if has_own_products(self._clips, self._x.shape[1]):
            matmul(x[None], [weight], [None], self._x[None], residual=self._x[None])
        else:
            self._x.addmm_(x, weight.t())

    def _normalize(self, norm: Norm, out: Tensor, products: int) -> None:
        """Normalise the stream, to which `count` products have been added without their biases."""
        # Transformers clamps float16 after whole layers.
        limit = self._limit if products and products % 2 == 0 else None
        shift = self._shifts[products]
        layer_norm(self._x, norm.weight, norm.bias, out, eps=norm.eps, limit=limit, shift=shift)


def _sum_biases(weights: EncoderWeights, out: Tensor) -> None:
    """out = sums of the first 0, 1, 2 ... biases of what is added to the stream, [2 L + 1, D]."""
    none = torch.zeros_like(weights.final_norm.bias)
    biases = [none]
    for layer in weights.layers:
        both = (layer.attention.out.bias, layer.fc2.bias)
        biases += [none if bias is None else bias for bias in both]
    torch.cumsum(torch.stack(biases), 0, dtype=torch.float32, out=out)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, by cuBLAS."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _cut(space: Tensor, *shape: int) -> Tensor:
    return space[: math.prod(shape)].view(shape)


def _windows(x: Tensor, stride: int) -> Tensor:
    """The windows of a convolution of width 3: [b, T, C] to [b, N, 3 C]; a view."""
    clips, times, channels = x.shape
    shape = (clips, (times - 3) // stride + 1, 3 * channels)
    return x.as_strided(shape, (x.stride(0), stride * channels, 1), x.storage_offset())


class TritonEncoder:
    """Encodes a batch in parts, by graphs that share one space, at the beginning of `memory`.

    The last norm of many clips is not recorded, and writes directly into the result.
    """

    def __init__(
        self, weights: EncoderWeights, recorder: GraphRecorder, memory: SharedArena
    ) -> None:
        self._weights = weights
        self._recorder = recorder
        self._memory = memory
        self._parts: OrderedDict[int, tuple[EncoderPass, GraphCache]] = OrderedDict()
        # Sizes of parts whose kernels were compiled and have run.
        self._warm: set[int] = set()
        memory.on_release(self.release)

    def run(self, features: Tensor) -> Tensor:
        states = features.new_empty(len(features), *self._weights.positions.shape)
        clips = clips_per_part(self._weights, len(features))
        for some, out in zip(torch.split(features, clips), torch.split(states, clips), strict=True):
            part, graphs = self._part(len(some))
            few = len(some) <= FEW_CLIPS
            part.load(some)
            set_pdl(Overlap.EARLY if few else Overlap.NONE)
            graphs.run("pass", part.run if few else part.layers)
            set_pdl(Overlap.NONE)
            if few:
                out.copy_(part.states)
            else:
                part.store(out)
        return states

    def space_bytes(self, clips: int) -> int:
        return space_bytes(self._weights, clips_per_part(self._weights, clips))

    def _part(self, clips: int) -> tuple[EncoderPass, GraphCache]:
        """A pass over this number of clips, and its graph."""
        size = space_bytes(self._weights, clips)
        arena = self._memory.of(size)
        self._memory.overwritten = max(self._memory.overwritten, size)
        found = self._parts.get(clips)
        if found is None:
            arena.restart()
            part = EncoderPass(self._weights, clips, arena)
            graphs = GraphCache(self._recorder, is_warm=clips in self._warm)
            if clips not in self._warm:
                set_pdl(Overlap.EARLY if clips <= FEW_CLIPS else Overlap.NONE)
                with recording(self._weights.positions.device):
                    part.compile()
                self._warm.add(clips)
            found = self._parts[clips] = part, graphs
            while len(self._parts) > MOST_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(clips)
        return found

    def release(self) -> None:
        self._parts.clear()
