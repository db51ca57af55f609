"""Ways in which people modify a Whisper, each applied to one model in place.

Every function takes a `WhisperForConditionalGeneration` and a `MonkeyPatch`, for what is not the
model's own (classes, tables of global hooks). `FALLS_BACK` holds those that the engine must not
run, `RUN` those that change nothing it does not know.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperForConditionalGeneration as Stock
from transformers.models.whisper import modeling_whisper as whisper

Patch = pytest.MonkeyPatch
Modification = Callable[[Any, Patch], None]

FALLS_BACK: dict[str, Modification] = {}
RUN: dict[str, Modification] = {}


def falls_back(modification: Modification) -> Modification:
    FALLS_BACK[modification.__name__] = modification
    return modification


def run(modification: Modification) -> Modification:
    RUN[modification.__name__] = modification
    return modification


def encoder_layer(model: Any) -> Any:
    return model.model.encoder.layers[1]


def decoder_layer(model: Any) -> Any:
    return model.model.decoder.layers[1]


class Roll(nn.Module):
    """Moves all channels by one: unlike a scale, no norm that follows takes it back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1)


def altered(output: Any) -> Any:
    """A module's output, rolled; its tensor may be the first of a tuple, or in a dictionary."""
    if isinstance(output, torch.Tensor):
        return output.roll(1, -1)
    if isinstance(output, tuple):
        return (output[0].roll(1, -1), *output[1:])
    name = "last_hidden_state" if "last_hidden_state" in output else "logits"
    output[name] = output[name].roll(1, -1)
    return output


def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return altered(forward(*args, **kwargs))

    return wrapper


def subclass(module: nn.Module) -> None:
    """Give a module a class of its own, with another `forward`, by the same name."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": wrap(kind.forward)})


# Containers and replaced modules.


@falls_back
def linear_in_a_container(model: Any, patch: Patch) -> None:
    decoder_layer(model).fc1 = nn.Sequential(decoder_layer(model).fc1, Roll())


@falls_back
def norm_in_a_container(model: Any, patch: Patch) -> None:
    layer = decoder_layer(model)
    layer.final_layer_norm = nn.Sequential(layer.final_layer_norm, Roll())


@falls_back
def projection_in_a_container(model: Any, patch: Patch) -> None:
    attention = encoder_layer(model).self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, Roll())


@falls_back
def layer_in_a_container(model: Any, patch: Patch) -> None:
    class Passing(nn.Sequential):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return altered(self[0](*args, **kwargs))

    model.model.encoder.layers[1] = Passing(model.model.encoder.layers[1])


@falls_back
def norm_removed(model: Any, patch: Patch) -> None:
    encoder_layer(model).final_layer_norm = nn.Identity()


@falls_back
def norm_of_another_kind(model: Any, patch: Patch) -> None:
    decoder_layer(model).self_attn_layer_norm = nn.RMSNorm(128)


@falls_back
def norm_without_bias(model: Any, patch: Patch) -> None:
    model.model.decoder.layer_norm = nn.LayerNorm(128, bias=False)


@falls_back
def norm_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.decoder.layer_norm)


@falls_back
def linear_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(encoder_layer(model).fc2)


@falls_back
def convolution_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.encoder.conv2)


@falls_back
def layers_in_reverse(model: Any, patch: Patch) -> None:
    class Reversed(nn.ModuleList):
        def __iter__(self) -> Any:
            return reversed(list(super().__iter__()))

    model.model.encoder.layers.__class__ = Reversed


@falls_back
def layers_dropped(model: Any, patch: Patch) -> None:
    model.model.decoder.layers = model.model.decoder.layers[:1]


@falls_back
def module_added_to_a_layer(model: Any, patch: Patch) -> None:
    encoder_layer(model).adapter = Roll()
    encoder_layer(model).register_forward_hook(lambda module, _, out: module.adapter(out))


# Subclasses with a `forward` of their own.


@falls_back
def encoder_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.encoder)


@falls_back
def decoder_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.decoder)


@falls_back
def body_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model)


@falls_back
def model_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model)


@falls_back
def encoder_layer_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(encoder_layer(model))


@falls_back
def decoder_layer_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(decoder_layer(model))


@falls_back
def attention_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(decoder_layer(model).encoder_attn)


@falls_back
def embedding_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.decoder.embed_tokens)


@falls_back
def decoder_positions_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.decoder.embed_positions)


@falls_back
def encoder_positions_of_a_subclass(model: Any, patch: Patch) -> None:
    subclass(model.model.encoder.embed_positions)


@falls_back
def output_projection_of_a_subclass(model: Any, patch: Patch) -> None:
    class Tilted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).roll(1, dims=-1)

    model.proj_out.__class__ = Tilted


# Methods that were patched, on classes and on instances.


def patch_class(kind: type, name: str = "forward") -> Modification:
    def modification(model: Any, patch: Patch) -> None:
        patch.setattr(kind, name, wrap(getattr(kind, name)))

    return modification


for _kind in (
    whisper.WhisperAttention,
    whisper.WhisperEncoderLayer,
    whisper.WhisperDecoderLayer,
    whisper.WhisperEncoder,
    whisper.WhisperDecoder,
    whisper.WhisperPositionalEmbedding,
    Stock,
    nn.Linear,
    nn.LayerNorm,
    nn.Embedding,
):
    FALLS_BACK[f"class_{_kind.__name__}_patched"] = patch_class(_kind)
FALLS_BACK["conv_forward_patched"] = patch_class(nn.Conv1d, "_conv_forward")


@falls_back
def code_of_a_forward_replaced(model: Any, patch: Patch) -> None:
    def forward(self, input):
        return self.__dict__["_parameters"]["weight"][input].roll(1, -1)

    patch.setattr(nn.Embedding.forward, "__code__", forward.__code__)


@falls_back
def functional_patched(model: Any, patch: Patch) -> None:
    patch.setattr(F, "linear", wrap(F.linear))


@falls_back
def inputs_of_steps_patched_on_the_class(model: Any, patch: Patch) -> None:
    prepare = Stock.prepare_inputs_for_generation

    def odd(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"] // 2
        return inputs

    patch.setattr(Stock, "prepare_inputs_for_generation", odd)


@falls_back
def inputs_of_steps_patched_on_the_model(model: Any, patch: Patch) -> None:
    prepare = model.prepare_inputs_for_generation

    def odd(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"] // 2
        return inputs

    model.prepare_inputs_for_generation = odd


def patch_instance(find: Callable[[Any], nn.Module], name: str = "forward") -> Modification:
    def modification(model: Any, patch: Patch) -> None:
        setattr(find(model), name, wrap(getattr(find(model), name)))

    return modification


FALLS_BACK["forward_of_the_model_patched"] = patch_instance(lambda model: model)
FALLS_BACK["forward_of_the_encoder_patched"] = patch_instance(lambda model: model.model.encoder)
FALLS_BACK["forward_of_a_layer_patched"] = patch_instance(decoder_layer)
FALLS_BACK["forward_of_attention_patched"] = patch_instance(lambda m: encoder_layer(m).self_attn)
FALLS_BACK["forward_of_a_norm_patched"] = patch_instance(lambda m: m.model.encoder.layer_norm)
FALLS_BACK["call_of_a_layer_patched"] = patch_instance(encoder_layer, "_call_impl")


@falls_back
def convolution_patched_on_the_instance(model: Any, patch: Patch) -> None:
    conv = model.model.encoder.conv1
    conv._conv_forward = wrap(conv._conv_forward)


@falls_back
def encoder_getter_patched(model: Any, patch: Patch) -> None:
    encoder = copy.deepcopy(model.model.encoder)
    with torch.no_grad():
        encoder.layer_norm.weight.copy_(encoder.layer_norm.weight.flip(0))
    model.get_encoder = lambda *args, **kwargs: encoder


# Attributes.


@falls_back
def activation_replaced(model: Any, patch: Patch) -> None:
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.ReLU()


@falls_back
def activation_of_the_same_name(model: Any, patch: Patch) -> None:
    class GELUActivation(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x)

    encoder_layer(model).activation_fn = GELUActivation()


@falls_back
def activation_function_replaced(model: Any, patch: Patch) -> None:
    encoder_layer(model).activation_fn.act = F.silu


@falls_back
def output_projection_with_bias(model: Any, patch: Patch) -> None:
    model.proj_out.bias = nn.Parameter(torch.linspace(-9, 9, 510))


@falls_back
def scaling_changed(model: Any, patch: Patch) -> None:
    decoder_layer(model).encoder_attn.scaling = 0.9


@falls_back
def heads_of_other_width(model: Any, patch: Patch) -> None:
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.self_attn.num_heads, layer.self_attn.head_dim = 4, 32


@falls_back
def encoder_made_causal(model: Any, patch: Patch) -> None:
    if type(model) is Stock:
        # Eager attention leaves the mask to the model, which has none here.
        model.set_attn_implementation("sdpa")
    encoder_layer(model).self_attn.is_causal = True


@falls_back
def attention_with_a_configuration_of_its_own(model: Any, patch: Patch) -> None:
    attention = decoder_layer(model).self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"


@falls_back
def circular_convolution(model: Any, patch: Patch) -> None:
    model.model.encoder.conv1.padding_mode = "circular"


@falls_back
def embedding_with_a_largest_norm(model: Any, patch: Patch) -> None:
    model.model.decoder.embed_tokens.max_norm = 0.5


@falls_back
def heads_of_the_configuration_changed(model: Any, patch: Patch) -> None:
    model.config.encoder_attention_heads = 4


@falls_back
def activation_of_the_configuration_changed(model: Any, patch: Patch) -> None:
    model.config.activation_function = "relu"


@falls_back
def positions_of_the_configuration_changed(model: Any, patch: Patch) -> None:
    model.config.max_target_positions = 60


@falls_back
def module_as_dropout(model: Any, patch: Patch) -> None:
    layer = decoder_layer(model)
    del layer.dropout
    layer.dropout = nn.Dropout(0.5)
    layer.__class__ = type(
        "Layer", (type(layer),), {"dropout": property(lambda self: self._modules["dropout"].p)}
    )


@run
def other_eps(model: Any, patch: Patch) -> None:
    for norm in (decoder_layer(model).final_layer_norm, encoder_layer(model).final_layer_norm):
        norm.eps = 4.0


@run
def untied_embeddings(model: Any, patch: Patch) -> None:
    model.config.tie_word_embeddings = False
    model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().flip(1) * 1.7)


@run
def an_attribute_that_nobody_reads(model: Any, patch: Patch) -> None:
    model.note = encoder_layer(model).note = "mine"


@run
def generate_wrapped_on_the_instance(model: Any, patch: Patch) -> None:
    model.generate = functools.partial(model.generate, suppress_tokens=[*range(150, 510)])


@run
def resized_vocabulary(model: Any, patch: Patch) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(520, mean_resizing=False)


# Hooks.


@falls_back
def forward_hook(model: Any, patch: Patch) -> None:
    decoder_layer(model).register_forward_hook(lambda *args: altered(args[-1]))


@falls_back
def hook_that_is_always_called(model: Any, patch: Patch) -> None:
    model.proj_out.register_forward_hook(lambda *args: args[-1].roll(1, -1), always_call=True)


@falls_back
def forward_pre_hook(model: Any, patch: Patch) -> None:
    encoder_layer(model).fc1.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.7,))


@falls_back
def hook_with_keywords(model: Any, patch: Patch) -> None:
    encoder_layer(model).register_forward_hook(
        lambda _, args, kwargs, out: altered(out), with_kwargs=True
    )


@falls_back
def global_forward_hook(model: Any, patch: Patch) -> None:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output.roll(1, -1) if isinstance(module, nn.LayerNorm) else None

    patch.setitem(torch_module._global_forward_hooks, -1, hook)


@falls_back
def global_forward_pre_hook(model: Any, patch: Patch) -> None:
    def hook(module: nn.Module, inputs: Any) -> Any:
        return (inputs[0].roll(1, -1),) if isinstance(module, nn.Linear) else None

    patch.setitem(torch_module._global_forward_pre_hooks, -1, hook)


@run
def backward_hook(model: Any, patch: Patch) -> None:
    decoder_layer(model).register_full_backward_hook(lambda *_: None)


# Parameters.


class Dimmed(torch.Tensor):
    """A weight that is half of what it holds, as quantised weights compute theirs when used."""

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            halves = [
                each.as_subclass(torch.Tensor) / 2 if type(each) is cls else each for each in args
            ]
            return F.linear(*halves, **(kwargs or {}))
        return super().__torch_function__(function, kinds, args, kwargs or {})


@falls_back
def tensor_subclass_as_parameter(model: Any, patch: Patch) -> None:
    weight = decoder_layer(model).fc2.weight.detach()
    decoder_layer(model).fc2.weight = nn.Parameter(weight.as_subclass(Dimmed))


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 7)
        rounded = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.register_buffer("weight", rounded)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


@falls_back
def quantised_linear(model: Any, patch: Patch) -> None:
    decoder_layer(model).fc1 = Int8Linear(decoder_layer(model).fc1)


@falls_back
def quantised_output_projection(model: Any, patch: Patch) -> None:
    model.proj_out = Int8Linear(model.proj_out)


@falls_back
def weight_norm(model: Any, patch: Patch) -> None:
    parametrizations.weight_norm(decoder_layer(model).fc1)


@falls_back
def weight_norm_by_a_hook(model: Any, patch: Patch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(encoder_layer(model).fc1)


@falls_back
def spectral_norm(model: Any, patch: Patch) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(encoder_layer(model).fc2)


@falls_back
def parametrization(model: Any, patch: Patch) -> None:
    parametrize.register_parametrization(decoder_layer(model).fc2, "weight", Roll())


@falls_back
def pruning(model: Any, patch: Patch) -> None:
    prune.l1_unstructured(decoder_layer(model).fc2, "weight", amount=0.6)


@falls_back
def compiled_layer(model: Any, patch: Patch) -> None:
    model.model.encoder.layers[0] = torch.compile(model.model.encoder.layers[0], backend="eager")


@falls_back
def layer_compiled_in_place(model: Any, patch: Patch) -> None:
    model.model.decoder.layers[0].compile(backend="eager")


@falls_back
def positions_of_another_dtype(model: Any, patch: Patch) -> None:
    positions = model.model.decoder.embed_positions
    positions.weight = nn.Parameter(positions.weight.detach().bfloat16())


@falls_back
def expanded_weight(model: Any, patch: Patch) -> None:
    norm = decoder_layer(model).final_layer_norm
    norm.weight = nn.Parameter(norm.weight.detach()[:1].expand(128))


@falls_back
def strided_weight(model: Any, patch: Patch) -> None:
    weight = encoder_layer(model).fc1.weight
    weight.data = (weight.data * 1.7).t().contiguous().t()


@falls_back
def weight_transposed_in_place(model: Any, patch: Patch) -> None:
    weight = decoder_layer(model).self_attn.q_proj.weight
    weight.data = weight.data.t()


@run
def buffer_in_a_layer(model: Any, patch: Patch) -> None:
    encoder_layer(model).register_buffer("mask", torch.ones(1))


@falls_back
def gathered_parameters(model: Any, patch: Patch) -> None:
    """Parameters are empty, and there only while their module runs, as DeepSpeed does it."""
    linear = decoder_layer(model).fc1
    whole = {name: parameter.detach() * 1.7 for name, parameter in linear.named_parameters()}

    def gather(module: nn.Module, inputs: Any) -> None:
        for name, parameter in module.named_parameters():
            parameter.data = whole[name]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    release(linear)
    linear.register_forward_pre_hook(gather)
    linear.register_forward_hook(release)


@run
def frozen_parameters(model: Any, patch: Patch) -> None:
    model.requires_grad_(False)


@run
def inference_tensors(model: Any, patch: Patch) -> None:
    linear = decoder_layer(model).fc1
    with torch.inference_mode():
        linear.weight = nn.Parameter(linear.weight * 1.7, requires_grad=False)


@run
def plain_tensor_as_parameter(model: Any, patch: Patch) -> None:
    """What `torch.func.functional_call` does for the time of a call."""
    linear = encoder_layer(model).fc1
    linear._parameters["weight"] = linear.weight.detach() * 1.7


@run
def parameters_of_another_place(model: Any, patch: Patch) -> None:
    linear = encoder_layer(model).fc1
    linear.weight.data = linear.weight.data * 1.7


@run
def layers_that_share_their_weights(model: Any, patch: Patch) -> None:
    model.model.encoder.layers[1] = model.model.encoder.layers[0]


@run
def state_loaded_by_assignment(model: Any, patch: Patch) -> None:
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()


# Modes that intercept operations.


class Louder(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        return output.roll(1, -1) if function is F.layer_norm else output


class Observing(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {"function": Louder, "dispatch": Observing}
