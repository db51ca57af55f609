"""Weights laid out once for a CPU: fused where inputs are shared, narrow where that loses nothing.

A decode step of one row reads every weight of the decoder once, and takes as long as that. In
float32, FBGEMM keeps weights in float16 and converts them in registers: half of the bytes, and the
same products, if float16 holds the weights exactly, as it does for all that OpenAI published. In
"int8", weights are 8-bit integers with a scale per output channel, and FBGEMM or oneDNN quantises
each row of the input.

FBGEMM lays out a matrix in one thread, from a float32 copy. So several are laid out at a time; the
largest, the projection to the vocabulary, in a few parts, and before all others, when there is
little else in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import repeat

import torch
from torch import Tensor

from whisper_flash_attention.engine.weights import (
    Attention,
    DecoderLayer,
    DecoderWeights,
    EncoderLayer,
    EncoderWeights,
    Linear,
    Norm,
    PackedLinear,
    Weights,
)
from whisper_flash_attention.errors import OptionError

PRECISIONS = ("float32", "int8")
Layer = Callable[[Linear], Linear]
# Values of a part of the projection. In float32 they take more than 32 MiB, which the C library
# gives back to the system at once when they are freed.
PART_VALUES = 9 << 20
# Threads that lay out matrices; each holds one in float32.
MOST_THREADS = 4
# Least scale of a row, so that rows of zeros stay zeros.
TINY = 1e-12


def pack(weights: Weights, precision: str) -> Weights:
    """Lay out the weights of a CPU, of any floating dtype, for float32 arithmetic or int8 products.

    The tensors of `weights` are not referenced afterwards, except the embedding; results of
    "float32" are those of float32 weights.

    Raises:
        OptionError: PyTorch cannot multiply 8-bit weights on this processor.
    """
    encoder, decoder = weights.encoder, weights.decoder
    if precision == "int8" and not has_int8():
        raise OptionError(
            "compute_type='int8' needs PyTorch's quantised products, which this build lacks for "
            "this processor: give float32"
        )
    pack_layer = quantised if precision == "int8" else exact
    workers = min(torch.get_num_threads(), MOST_THREADS)
    with _without_announcements(), ThreadPoolExecutor(workers) as pool:
        decoder = replace(decoder, projection=_in_parts(decoder.projection, pack_layer, pool))
        return Weights(
            _encoder(encoder, pack_layer, pool), _decoder(decoder, pack_layer, pool), precision
        )


def _encoder(
    weights: EncoderWeights, pack_layer: Layer, pool: ThreadPoolExecutor
) -> EncoderWeights:
    return replace(
        weights,
        conv1=_plain(weights.conv1),
        conv2=_plain(weights.conv2),
        positions=weights.positions.float(),
        layers=tuple(pool.map(partial(_encoder_layer, pack_layer=pack_layer), weights.layers)),
        final_norm=_norm(weights.final_norm),
    )


def _encoder_layer(layer: EncoderLayer, pack_layer: Layer) -> EncoderLayer:
    return EncoderLayer(
        self_norm=_norm(layer.self_norm),
        attention=_self_attention(layer.attention, pack_layer),
        ffn_norm=_norm(layer.ffn_norm),
        fc1=pack_layer(layer.fc1),
        fc2=pack_layer(layer.fc2),
    )


def _decoder(
    weights: DecoderWeights, pack_layer: Layer, pool: ThreadPoolExecutor
) -> DecoderWeights:
    return replace(
        weights,
        positions=weights.positions.float(),
        layers=tuple(pool.map(partial(_decoder_layer, pack_layer=pack_layer), weights.layers)),
        final_norm=_norm(weights.final_norm),
    )


def _in_parts(layer: Linear, pack_layer: Layer, pool: ThreadPoolExecutor) -> Linear:
    """A large layer as several, each of some of the outputs."""
    size = max(1, PART_VALUES // layer.weight.shape[1])
    weights = torch.split(layer.weight, size)
    biases: Iterable[Tensor | None] = repeat(None)
    if layer.bias is not None:
        biases = torch.split(layer.bias, size)
    packed = list(pool.map(pack_layer, map(Linear, weights, biases)))
    parts = [part for part in packed if isinstance(part, PackedLinear)]
    if len(parts) < len(packed):
        return _plain(layer)
    if len(parts) == 1:
        return parts[0]

    def multiply(x: Tensor) -> Tensor:
        return torch.cat([part.multiply(x) for part in parts], dim=-1)

    shape = _shape(layer)
    return PackedLinear(shape.weight, shape.bias, multiply, sum(part.nbytes for part in parts))


def _decoder_layer(layer: DecoderLayer, pack_layer: Layer) -> DecoderLayer:
    cross = layer.cross_attention
    return DecoderLayer(
        self_norm=_norm(layer.self_norm),
        self_attention=_self_attention(layer.self_attention, pack_layer),
        cross_norm=_norm(layer.cross_norm),
        # Keys and values are projected once a window, for 1500 rows: like the encoder's.
        cross_attention=Attention(
            q=pack_layer(cross.q),
            k=_plain(cross.k),
            v=_plain(cross.v),
            out=pack_layer(cross.out),
        ),
        ffn_norm=_norm(layer.ffn_norm),
        fc1=pack_layer(layer.fc1),
        fc2=pack_layer(layer.fc2),
    )


def _self_attention(attention: Attention, pack_layer: Layer) -> Attention:
    q, k, v = attention.q, attention.k, attention.v
    return Attention(
        q=_shape(q),
        k=_shape(k),
        v=_shape(v),
        out=pack_layer(attention.out),
        fused=pack_layer(stacked(q, k, v)),
    )


def stacked(*layers: Linear) -> Linear:
    """One layer for several with the same input: their outputs one after the other."""
    biases = [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return Linear(torch.cat([layer.weight for layer in layers]), torch.cat(biases))


def _shape(layer: Linear) -> Linear:
    return Linear(layer.weight.to("meta"), None if layer.bias is None else layer.bias.to("meta"))


def _norm(norm: Norm) -> Norm:
    return Norm(norm.weight.float(), norm.bias.float(), norm.eps)


def _plain(layer: Linear) -> Linear:
    return Linear(layer.weight.float(), None if layer.bias is None else layer.bias.float())


def exact(layer: Linear) -> Linear:
    """A layer on float16 weights where those are exact and FBGEMM is there, else as it is."""
    weight, bias = layer.weight, None if layer.bias is None else layer.bias.float()
    if not has_fbgemm() or not _is_exact_in_half(weight):
        return _plain(layer)
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
    size = 2 * weight.numel()

    def multiply(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
        return result

    return PackedLinear(weight.to("meta"), bias, multiply, size)


@cache
def has_fbgemm() -> bool:
    """Whether PyTorch was built with FBGEMM, and FBGEMM runs on this processor."""
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.ones(1, 1), None)
    except (AttributeError, RuntimeError):
        return False
    return True


@cache
def has_int8() -> bool:
    """Whether this build of PyTorch multiplies 8-bit weights on this processor."""
    try:
        with _without_announcements():
            quantised(Linear(torch.ones(1, 1), None))
    except (AttributeError, RuntimeError):
        return False
    return True


@contextmanager
def _without_announcements() -> Iterator[None]:
    """Ignore what PyTorch says of quantised tensors, of which packed ones need one each, once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized", category=UserWarning)
        yield


def describe_layouts() -> str:
    """What `pack` does with weights on this machine, in words."""
    exact_ones = "float16 where that is exact" if has_fbgemm() else "as they are (no FBGEMM)"
    return f"{exact_ones}; int8 {'on request' if has_int8() else 'cannot run here'}"


def _is_exact_in_half(weight: Tensor) -> bool:
    return weight.dtype is torch.float16 or torch.equal(weight.half().float(), weight.float())


def integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to int8 with a scale per row [N]: weight is about numbers x scale.

    Weights that were rounded so before give the same integers again: the largest of every row is
    127 or -127.
    """
    scales = weight.abs().amax(dim=1).clamp(min=TINY) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def quantised(layer: Linear) -> PackedLinear:
    """A layer on 8-bit weights with a scale per output channel."""
    weight = layer.weight.float()
    numbers, scales = integers(weight)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    whole = torch._make_per_channel_quantized_tensor(numbers, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(whole, None)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.float()
    # Without such instructions FBGEMM adds pairs of products in 16 bits, which 8 bits overflow.
    narrow = not torch.cpu._is_vnni_supported()

    def multiply(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            alone: Tensor = torch.ops.quantized.linear_dynamic(x, packed, narrow)
            return alone.add_(bias)
        # PyTorch has one scale for all rows: rows of one size make it a scale per row.
        size = x.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
        found = torch.ops.quantized.linear_dynamic(x / size, packed, narrow)
        return torch.addcmul(bias, found, size)

    return PackedLinear(weight.to("meta"), bias, multiply, weight.numel() + 4 * len(weight))
