"""Whisper's weights as the engine reads them: tensors in plain dataclasses, and a watch on them.

Nothing is copied or fused: every tensor here is a parameter of the model, so there is never a
second copy in memory, and a change of values in place (an optimiser's step, `load_state_dict`) is
seen at once. A change of place (`.to()`, `.half()`, a replaced module or parameter) is seen by
`Watch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import nn

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Linear:
    """y = x weight^T + bias; weight [N, K], bias [N] or none."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Norm:
    """A layer norm over the last axis; weight and bias [D]."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Attention:
    """The four projections of multi-head attention, each [D, D]; k has no bias."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear


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
    """embedding and projection [V, D] (one tensor where they are tied); positions [448, D]."""

    embedding: torch.Tensor
    positions: torch.Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    projection: torch.Tensor
    heads: int

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.embedding.shape[1]


@dataclass(frozen=True)
class Weights:
    """All of a model's weights on one device, in one dtype."""

    encoder: EncoderWeights
    decoder: DecoderWeights

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embedding.dtype


class Watch:
    """Remembers where a model's parameters lie and of which modules it is built.

    The parameters' storage must be kept alive meanwhile (`Weights` does): then nothing new can come
    to lie at a remembered address.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        self._tables = [part._modules for part in parts]
        self._children = self._current_children()
        self._owners = [
            (part._parameters, name)
            for part in parts
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]
        self._parameters = self._current_parameters()
        self._places = _places(self._parameters)
        self._hooks = [hooks for part in parts for hooks in _hooks(part)]
        self._hook_ids = list(chain.from_iterable(self._hooks))

    def _current_children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(table.values() for table in self._tables))

    def _current_parameters(self) -> list[nn.Parameter | None]:
        return [table.get(name) for table, name in self._owners]

    def unchanged(self) -> bool:
        """Whether no module or parameter was replaced, moved or cast, and no hook was added."""
        children = self._current_children()
        if len(children) != len(self._children) or any(map(is_not, children, self._children)):
            return False
        parameters = self._current_parameters()
        if any(map(is_not, parameters, self._parameters)):
            return False
        same_hooks = list(chain.from_iterable(self._hooks)) == self._hook_ids
        return same_hooks and _places(parameters) == self._places


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Hooks by their numbers, which are never given twice."""
    return module._forward_hooks, module._forward_pre_hooks


def _places(parameters: list[nn.Parameter | None]) -> list[int]:
    return [parameter.data_ptr() for parameter in parameters if parameter is not None]


def why_not(model: Any, *, without_data: bool = False) -> str | None:
    """Why the engine cannot run this model's weights; None if it can.

    `without_data` also allows weights on PyTorch's meta device, which have only shapes.

    The engine reads weights instead of calling modules, so that whatever someone put into or around
    a module (adapters, quantisation, hooks, off-loading) would be skipped.
    """
    config = model.config
    if config.activation_function != "gelu":
        return f"activation function {config.activation_function!r} instead of 'gelu'"
    if config.scale_embedding:
        return "scaled embeddings"
    for heads in (config.encoder_attention_heads, config.decoder_attention_heads):
        if config.d_model != heads * HEAD_WIDTH:
            return f"heads of {config.d_model / heads:g} values instead of {HEAD_WIDTH}"
    reason = _modules_reason(model)
    if reason is None:
        reason = _tensors_reason(model, without_data)
    return reason


# Transformers leaves hooks of this module behind when attentions or hidden states were asked for;
# they do nothing in other calls.
IDLE_HOOKS = "transformers.utils.output_capturing"
PLAIN = (nn.Linear, nn.LayerNorm, nn.Conv1d, nn.Embedding)


def _modules_reason(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        hooks = chain.from_iterable(each.values() for each in _hooks(module))
        if any(getattr(hook, "__module__", None) != IDLE_HOOKS for hook in hooks):
            return f"a hook on {name or 'the model'}"
        kind = type(module)
        leaf = not module._modules
        known = kind in PLAIN or issubclass(kind, nn.Embedding) or "Activation" in kind.__name__
        if leaf and module._parameters and not known:
            return f"{name} is a {kind.__name__}"
        if not leaf and issubclass(kind, PLAIN):
            return f"{name} holds further modules"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward of its own"
    wanted = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "proj_out")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wanted and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__} instead of a Linear"
    return None


def _tensors_reason(model: nn.Module, without_data: bool) -> str | None:
    first = next(model.parameters())
    if not first.dtype.is_floating_point:
        return f"weights of type {first.dtype}"
    for name, parameter in model.named_parameters():
        if parameter.device != first.device or parameter.dtype != first.dtype:
            return f"{name} is {parameter.dtype} on {parameter.device}, others are not"
        if parameter.device.type == "meta" and not without_data:
            return f"{name} has no data"
        if not parameter.is_contiguous():
            return f"{name} is not contiguous"
    return None


def collect(model: Any) -> Weights:
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
            projection=model.proj_out.weight.detach(),
            heads=model.config.decoder_attention_heads,
        ),
    )


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
