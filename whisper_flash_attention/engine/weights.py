"""Whisper's weights as tensors in plain dataclasses, and a snapshot to detect changes.

`collect_weights` copies and fuses nothing: every tensor is a parameter of the model, so there is
never a second copy in memory, and a change of values in place (an optimiser's step,
`load_state_dict`) is seen at once. A change of place (`.to()`, `.half()`, a replaced module or
parameter) is seen by `WeightsSnapshot`. `packing` lays out weights that no model has for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, takewhile
from operator import is_not, itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

HEAD_WIDTH = 64
# Of every layer norm of Whisper.
LAYER_NORM_EPS = 1e-5
# Up to this many rows, a tall weight is multiplied from the left.
FEW_ROWS = 4


@dataclass(frozen=True)
class Linear:
    """y = x weight^T + bias; weight [N, K], bias [N] or none."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class PackedLinear(Linear):
    """A layer whose weight is laid out for one routine.

    Args:
        weight: on the meta device: a shape without values.
        multiply: x [..., K] float32 to [..., N], with the bias.
        nbytes: memory of the layout.
    """

    multiply: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int


@dataclass(frozen=True)
class Norm:
    """A layer norm over the last axis; weight and bias [D]."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Attention:
    """The four projections of multi-head attention, each [D, D]; k has no bias.

    `fused`, where it is there, is one layer for those with the same input, and replaces them:
    [3 D, D] of q, k and v in self-attention, [2 D, D] of k and v in cross-attention.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    fused: Linear | None = None


@dataclass(frozen=True)
class EncoderLayer:
    """Pre-norm self-attention and feed-forward."""

    self_norm: Norm
    attention: Attention
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm causal self-attention, cross-attention and feed-forward."""

    self_norm: Norm
    self_attention: Attention
    cross_norm: Norm
    cross_attention: Attention
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class EncoderWeights:
    """conv1, conv2: weight [D, C, 3] and bias [D]; positions [1500, D]."""

    conv1: Linear
    conv2: Linear
    positions: torch.Tensor
    layers: tuple[EncoderLayer, ...]
    final_norm: Norm
    heads: int


@dataclass(frozen=True)
class DecoderWeights:
    """Embedding and projection [V, D] (one tensor where they are tied); positions [448, D].

    The embedding may have a narrower dtype than the others.
    """

    embedding: torch.Tensor
    positions: torch.Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    projection: Linear
    heads: int

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.embedding.shape[1]


@dataclass(frozen=True)
class Weights:
    """All of a model's weights on one device, in one dtype.

    `precision` is that in which `packing` laid them out for a CPU; None where it did not.
    """

    encoder: EncoderWeights
    decoder: DecoderWeights
    precision: str | None = None

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.positions.dtype


class WeightsSnapshot:
    """Detect replaced modules and parameters, and moved parameter storage.

    The parameters' storage must be kept alive meanwhile (`Weights` does): then nothing new can come
    to lie at a remembered address. The model itself is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._attributes = list(map(vars, modules))
        self._norms = [module for module in modules if type(module) is nn.LayerNorm]
        self._children, self._parameters = self._current_parts()
        self._layouts = _layouts(self._parameters)
        self._eps = [norm.eps for norm in self._norms]

    def _current_parts(self) -> tuple[list[Any], list[nn.Parameter | None]]:
        """All children and all parameters, module by module."""
        tables = list(map(_TABLES, self._attributes))
        children = chain.from_iterable(modules.values() for modules, _ in tables)
        parameters = chain.from_iterable(parameters.values() for _, parameters in tables)
        return list(children), list(parameters)

    def unchanged(self) -> bool:
        """Whether nothing that `collect_weights` reads was replaced, moved, cast or reshaped."""
        children, parameters = self._current_parts()
        return (
            _same_objects(children, self._children)
            and _same_objects(parameters, self._parameters)
            and [norm.eps for norm in self._norms] == self._eps
            and _layouts(parameters) == self._layouts
        )


_TABLES = itemgetter("_modules", "_parameters")


def _same_objects(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and not any(map(is_not, now, before))


def _layouts(
    parameters: list[nn.Parameter | None],
) -> list[tuple[int, torch.Size, tuple[int, ...]]]:
    """Address, shape and strides of every parameter: assigning to `data` may change any alone."""
    return [(each.data_ptr(), each.shape, each.stride()) for each in parameters if each is not None]


def collect_weights(model: Any) -> Weights:
    """Read the weights of a Whisper model (Transformers' module names), without a copy."""
    encoder, decoder = model.model.encoder, model.model.decoder
    return Weights(
        EncoderWeights(
            conv1=_linear(encoder.conv1),
            conv2=_linear(encoder.conv2),
            positions=encoder.embed_positions.weight.detach(),
            layers=tuple(_encoder_layer(layer) for layer in encoder.layers),
            final_norm=_norm(encoder.layer_norm),
            heads=model.config.encoder_attention_heads,
        ),
        DecoderWeights(
            embedding=decoder.embed_tokens.weight.detach(),
            positions=decoder.embed_positions.weight.detach(),
            layers=tuple(_decoder_layer(layer) for layer in decoder.layers),
            final_norm=_norm(decoder.layer_norm),
            projection=Linear(model.proj_out.weight.detach(), None),
            heads=model.config.decoder_attention_heads,
        ),
    )


def weights_of(
    tensors: Mapping[str, torch.Tensor], *, encoder_heads: int, decoder_heads: int
) -> Weights:
    """The weights of tensors by the names of a Whisper model's parameters, without a copy."""
    heads = SimpleNamespace(
        encoder_attention_heads=encoder_heads, decoder_attention_heads=decoder_heads
    )
    return collect_weights(_Named(tensors, "", heads))


class _Named:
    """Tensors by dotted names, read like the modules that have them as parameters."""

    eps = LAYER_NORM_EPS

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], prefix: str, config: Any = None
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            return self._tensors.get(self._prefix + name)
        return _Named(self._tensors, f"{self._prefix}{name}.")

    def __iter__(self) -> Iterator[_Named]:
        first = f"{self._prefix}{{}}.fc1.weight"
        layers = takewhile(lambda index: first.format(index) in self._tensors, count())
        return (_Named(self._tensors, f"{self._prefix}{index}.") for index in layers)


def _linear(module: Any) -> Linear:
    bias = module.bias
    return Linear(module.weight.detach(), None if bias is None else bias.detach())


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), float(module.eps))


def _attention(module: Any) -> Attention:
    return Attention(
        _linear(module.q_proj),
        _linear(module.k_proj),
        _linear(module.v_proj),
        _linear(module.out_proj),
    )


def _encoder_layer(module: Any) -> EncoderLayer:
    return EncoderLayer(
        self_norm=_norm(module.self_attn_layer_norm),
        attention=_attention(module.self_attn),
        ffn_norm=_norm(module.final_layer_norm),
        fc1=_linear(module.fc1),
        fc2=_linear(module.fc2),
    )


def _decoder_layer(module: Any) -> DecoderLayer:
    return DecoderLayer(
        self_norm=_norm(module.self_attn_layer_norm),
        self_attention=_attention(module.self_attn),
        cross_norm=_norm(module.encoder_attn_layer_norm),
        cross_attention=_attention(module.encoder_attn),
        ffn_norm=_norm(module.final_layer_norm),
        fc1=_linear(module.fc1),
        fc2=_linear(module.fc2),
    )


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """x weight^T + bias: [..., K] to [..., N]."""
    if isinstance(layer, PackedLinear):
        return layer.multiply(x)
    if not _by_onednn(x):
        return F.linear(x, layer.weight, layer.bias)
    n, k = layer.weight.shape
    if n >= k and x.numel() <= FEW_ROWS * k:
        return _few_rows(x.reshape(-1, k), layer).view(*x.shape[:-1], n)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, layer.weight, layer.bias, "none", [], ""
    )
    return result


def _by_onednn(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def _few_rows(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """weight x^T for x [R, K], transposed; a lone row is doubled, for MKL then uses all threads."""
    rows = len(x)
    columns = x if rows > 1 else x.expand(2, -1).contiguous()
    out = torch.mm(layer.weight, columns.t())[:, :rows].t()
    return out if layer.bias is None else out + layer.bias


def queries_keys_values(
    x: torch.Tensor, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project x [..., D] for self-attention; each [..., D]."""
    if attention.fused is None:
        return linear(x, attention.q), linear(x, attention.k), linear(x, attention.v)
    q, k, v = linear(x, attention.fused).chunk(3, dim=-1)
    return q, k, v


def keys_values(x: torch.Tensor, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Project x [..., D] for cross-attention; each [..., D]."""
    if attention.fused is None:
        return linear(x, attention.k), linear(x, attention.v)
    k, v = linear(x, attention.fused).chunk(2, dim=-1)
    return k, v


def embed(tokens: torch.Tensor, weights: DecoderWeights) -> torch.Tensor:
    """Embeddings of tokens [B, P], without their positions: [B, P, D] in the weights' dtype."""
    return F.embedding(tokens, weights.embedding).to(weights.positions.dtype)


def normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Layer norm over the last axis of x [..., D]."""
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
