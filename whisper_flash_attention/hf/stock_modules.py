"""The modules of stock Whisper, and how a model differs from them.

The engine reads weights and calls no module. It may run a model only if every module is exactly
what stock Whisper builds from the configuration: its type, its children, its parameters, and the
attributes that its `forward` reads. Anything else (adapters, quantization, hooks, replaced methods)
is ignored by the engine, so every difference is a reason not to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from whisper_flash_attention.engine.weights import HEAD_WIDTH
from whisper_flash_attention.hf.compat import (
    ACT2FN,
    StockWhisper,
    WhisperAttention,
    WhisperDecoder,
    WhisperDecoderLayer,
    WhisperEncoder,
    WhisperEncoderLayer,
    WhisperModel,
    WhisperPositionalEmbedding,
)

# Transformers leaves hooks of this module on layers when attentions or hidden states were
# requested; they do nothing in other calls.
IDLE_HOOKS = "transformers.utils.output_capturing"
# Backward hooks need a gradient, which `generate` does not compute.
HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks")
GLOBAL_HOOKS = tuple(
    table
    for name, table in vars(torch_module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(table, dict)
)
# Attributes through which an instance replaces what its class does when it is called.
CALL_METHODS = (
    "forward",
    "_call_impl",
    "_wrapped_call_impl",
    "_compiled_call_impl",
    "_conv_forward",
)
# Further methods of the model that the engine bypasses.
BYPASSED_METHODS = (
    "get_decoder",
    "get_encoder",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
)
GELU = ACT2FN["gelu"]
CLASSES: tuple[type[nn.Module], ...] = (
    StockWhisper,
    WhisperModel,
    WhisperEncoder,
    WhisperEncoderLayer,
    WhisperDecoder,
    WhisperDecoderLayer,
    WhisperAttention,
    WhisperPositionalEmbedding,
    type(GELU),
    nn.ModuleList,
    nn.Linear,
    nn.LayerNorm,
    nn.Conv1d,
    nn.Embedding,
)
# All functions that a call of these classes runs.
FUNCTIONS: tuple[tuple[Any, str], ...] = (
    *(
        (owner, name)
        for owner in CLASSES
        for name in ("__call__", "__getattr__", *CALL_METHODS)
        if hasattr(owner, name)
    ),
    *((StockWhisper, name) for name in BYPASSED_METHODS),
    (nn.ModuleList, "__iter__"),
    *(
        (F, name)
        for name in ("conv1d", "dropout", "embedding", "gelu", "layer_norm", "linear", "softmax")
    ),
)
# Fields of the configuration that determine the modules.
CONFIG_SIZES = (
    "activation_function",
    "d_model",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layers",
    "max_source_positions",
    "max_target_positions",
    "num_mel_bins",
    "scale_embedding",
    "vocab_size",
)


_OWNERS, _NAMES = zip(*FUNCTIONS, strict=True)


def current_functions() -> list[Any]:
    """The functions that `FUNCTIONS` names at present, then the code of each, or None."""
    functions = list(map(getattr, _OWNERS, _NAMES))
    return functions + list(map(getattr, functions, repeat("__code__"), repeat(None)))


_ORIGINAL = current_functions()
# The folders of PyTorch and Transformers, as code objects name them.
_PACKAGE_FOLDERS = tuple(
    Path(function.__code__.co_filename).parents[2]
    for function in (nn.Module.add_module, StockWhisper.__init__)
)


def patched_function() -> str | None:
    """The name of a function of `FUNCTIONS` that is not PyTorch's or Transformers' own.

    Those replaced before this module was imported are recognised by the file of their code.
    """
    for index, (now, original) in enumerate(zip(current_functions(), _ORIGINAL, strict=True)):
        is_foreign = isinstance(now, CodeType) and not _is_original_code(now)
        if is_foreign or now is not original:
            owner, name = FUNCTIONS[index % len(FUNCTIONS)]
            return f"{owner.__name__}.{name}"
    return None


@cache
def _is_original_code(code: CodeType) -> bool:
    return any(folder in Path(code.co_filename).parents for folder in _PACKAGE_FOLDERS)


@dataclass(frozen=True)
class ModuleSpec:
    """The expected state of a module.

    Args:
        type: its exact class.
        parameters: shapes by name; None is a parameter that is None.
        attributes: values of the attributes that its `forward` reads; a class means any value of
            this type, which the engine reads, too.
        children: by name, in order where the class is a list.
    """

    type: type[nn.Module]
    parameters: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    children: dict[str, ModuleSpec] = field(default_factory=dict)


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> ModuleSpec:
    shapes: dict[str, tuple[int, ...] | None] = {"weight": (outputs, inputs)}
    shapes["bias"] = (outputs,) if bias else None
    return ModuleSpec(nn.Linear, shapes)


def _norm(width: int) -> ModuleSpec:
    shapes: dict[str, tuple[int, ...] | None] = {"weight": (width,), "bias": (width,)}
    return ModuleSpec(nn.LayerNorm, shapes, {"normalized_shape": (width,), "eps": float})


def _convolution(inputs: int, outputs: int, *, stride: int) -> ModuleSpec:
    attributes = {
        "kernel_size": (3,),
        "stride": (stride,),
        "padding": (1,),
        "dilation": (1,),
        "groups": 1,
        "padding_mode": "zeros",
        "transposed": False,
    }
    return ModuleSpec(nn.Conv1d, {"weight": (outputs, inputs, 3), "bias": (outputs,)}, attributes)


def _embedding(rows: int, width: int, kind: type[nn.Module] = nn.Embedding) -> ModuleSpec:
    return ModuleSpec(kind, {"weight": (rows, width)}, {"num_embeddings": rows, "max_norm": None})


def _list(specs: list[ModuleSpec]) -> ModuleSpec:
    return ModuleSpec(
        nn.ModuleList, children={str(index): spec for index, spec in enumerate(specs)}
    )


def _attention(config: Any, heads: int, layer: int | None, *, causal: bool) -> ModuleSpec:
    width = config.d_model
    attributes = {
        "num_heads": heads,
        "head_dim": HEAD_WIDTH,
        "scaling": HEAD_WIDTH**-0.5,
        "is_causal": causal,
        "layer_idx": layer,
        "config": config,
    }
    projections = {
        name: _linear(width, width, bias=name != "k_proj")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    return ModuleSpec(WhisperAttention, attributes=attributes, children=projections)


def _feed_forward(config: Any, width: int) -> dict[str, ModuleSpec]:
    return {
        "activation_fn": ModuleSpec(type(GELU), attributes={"act": vars(GELU).get("act")}),
        "fc1": _linear(config.d_model, width),
        "fc2": _linear(width, config.d_model),
        "final_layer_norm": _norm(config.d_model),
    }


def _encoder(config: Any) -> ModuleSpec:
    width = config.d_model
    layer = ModuleSpec(
        WhisperEncoderLayer,
        children={
            "self_attn": _attention(config, config.encoder_attention_heads, None, causal=False),
            "self_attn_layer_norm": _norm(width),
            **_feed_forward(config, config.encoder_ffn_dim),
        },
    )
    return ModuleSpec(
        WhisperEncoder,
        attributes={"config": config, "embed_scale": 1.0},
        children={
            "conv1": _convolution(config.num_mel_bins, width, stride=1),
            "conv2": _convolution(width, width, stride=2),
            "embed_positions": _embedding(config.max_source_positions, width),
            "layers": _list([layer] * config.encoder_layers),
            "layer_norm": _norm(width),
        },
    )


def _decoder(config: Any) -> ModuleSpec:
    width, heads = config.d_model, config.decoder_attention_heads
    layers = [
        ModuleSpec(
            WhisperDecoderLayer,
            children={
                "self_attn": _attention(config, heads, index, causal=True),
                "self_attn_layer_norm": _norm(width),
                "encoder_attn": _attention(config, heads, index, causal=False),
                "encoder_attn_layer_norm": _norm(width),
                **_feed_forward(config, config.decoder_ffn_dim),
            },
        )
        for index in range(config.decoder_layers)
    ]
    return ModuleSpec(
        WhisperDecoder,
        attributes={"config": config, "embed_scale": 1.0},
        children={
            "embed_tokens": _embedding(config.vocab_size, width),
            "embed_positions": _embedding(
                config.max_target_positions, width, WhisperPositionalEmbedding
            ),
            "layers": _list(layers),
            "layer_norm": _norm(width),
        },
    )


def expected_spec(model: nn.Module) -> ModuleSpec:
    """The modules of stock Whisper with the model's configuration and the model's own class."""
    config: Any = model.config
    body = ModuleSpec(
        WhisperModel,
        attributes={"config": config},
        children={"encoder": _encoder(config), "decoder": _decoder(config)},
    )
    projection = _linear(config.d_model, config.vocab_size, bias=False)
    return ModuleSpec(type(model), children={"model": body, "proj_out": projection})


def walk_specs(module: nn.Module, spec: ModuleSpec) -> Iterator[tuple[nn.Module, ModuleSpec]]:
    """Every module of a model that matches `spec`, with its own spec."""
    yield module, spec
    for name, child in spec.children.items():
        yield from walk_specs(cast(nn.Module, module._modules[name]), child)


def mismatch(model: Any, *, without_data: bool = False) -> str | None:
    """Why the engine cannot run this model; None if it can.

    Args:
        model: a `WhisperForConditionalGeneration`, or an instance of a subclass.
        without_data: also allow weights on PyTorch's meta device, which have only shapes.
    """
    return (
        _config_reason(model.config)
        or _functions_reason(type(model))
        or _module_reason("", model, expected_spec(model))
        or _tensors_reason(model, without_data)
    )


def _config_reason(config: Any) -> str | None:
    if config.activation_function != "gelu":
        return f"activation function {config.activation_function!r} instead of 'gelu'"
    if config.scale_embedding:
        return "scaled embeddings"
    for heads in (config.encoder_attention_heads, config.decoder_attention_heads):
        if config.d_model != heads * HEAD_WIDTH:
            return f"heads of {config.d_model / heads:g} values instead of {HEAD_WIDTH}"
    return None


def _functions_reason(model_class: type) -> str | None:
    if any(GLOBAL_HOOKS):
        return "a hook on all modules"
    patched = patched_function()
    if patched is not None:
        return f"{patched} was replaced"
    for name in (*CALL_METHODS, *BYPASSED_METHODS):
        if getattr(model_class, name, None) is not getattr(StockWhisper, name, None):
            return f"{model_class.__name__} has a {name} of its own"
    return None


def _module_reason(path: str, module: nn.Module, spec: ModuleSpec) -> str | None:
    name = path or "the model"
    found = vars(module)
    hooks = chain.from_iterable(found[table].values() for table in HOOK_TABLES)
    if any(getattr(hook, "__module__", None) != IDLE_HOOKS for hook in hooks):
        return f"a hook on {name}"
    for method in (*CALL_METHODS, *(() if path else BYPASSED_METHODS)):
        if method in found:
            return f"{name} has a {method} of its own"
    if type(module) is not spec.type:
        return f"{name} is a {type(module).__name__} instead of a {spec.type.__name__}"
    for attribute, value in spec.attributes.items():
        if attribute not in found or not _matches_value(found[attribute], value):
            return f"{name} has another {attribute}"
    return _parameters_reason(name, module, spec) or _children_reason(path, name, module, spec)


def _matches_value(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return type(found) is wanted
    plain = isinstance(wanted, bool | int | float | str | tuple)
    return found is wanted or (plain and type(found) is type(wanted) and bool(found == wanted))


def _parameters_reason(name: str, module: nn.Module, spec: ModuleSpec) -> str | None:
    parameters = module._parameters
    if parameters.keys() != spec.parameters.keys():
        return f"{name} has parameters {', '.join(parameters) or 'of none'}"
    for each, shape in spec.parameters.items():
        found = parameters[each]
        if found is not None and type(found) not in (nn.Parameter, torch.Tensor):
            return f"{name}.{each} is a {type(found).__name__}"
        if (None if found is None else tuple(found.shape)) != shape:
            now = "nothing" if found is None else f"of shape {tuple(found.shape)}"
            return f"{name}.{each} is {now} instead of {shape or 'nothing'}"
    return None


def _children_reason(path: str, name: str, module: nn.Module, spec: ModuleSpec) -> str | None:
    children = module._modules
    if spec.type is nn.ModuleList and len(children) != len(spec.children):
        return f"{name} has {len(children)} modules instead of {len(spec.children)}"
    if spec.type is nn.ModuleList and list(children) != list(spec.children):
        return f"{name} has its modules in another order"
    if children.keys() != spec.children.keys():
        differing = ", ".join(sorted(children.keys() ^ spec.children.keys()))
        return f"{name} has other modules inside ({differing})"
    for each, wanted in spec.children.items():
        child = children[each]
        inside = f"{path}.{each}" if path else each
        if child is None:
            return f"{inside} is missing"
        reason = _module_reason(inside, child, wanted)
        if reason is not None:
            return reason
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
        if parameter.layout is not torch.strided or not parameter.is_contiguous():
            return f"{name} is not contiguous"
        if parameter.is_neg():
            return f"{name} is a negated view"
    return None
