"""Whether the engine may run a call of `generate`, and what Transformers' own loop runs instead.

Three questions, each with its reasons in words:

- May the engine stand in for the model as it is now? `stock_modules` compares every module with
  what stock Whisper has. That takes longer than a small model's whole decode, so the outcome is
  kept. Before each call it is checked that nothing which was compared has changed: types, children,
  parameters, hooks, attributes, the configuration, and the functions of all classes involved.
- Can it do exactly what the call requests? `plan_call` translates the call for the engine.
- Did a call fall back although nothing in it needs that? The engine is reached through methods of
  Transformers that carry no promise: a new release may call them with other arguments, or not at
  all. The text stays right and the speed is lost: a warning, which Python shows by default.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import chain, repeat
from operator import contains, is_not, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.errors import EngineBypassed
from whisper_flash_attention.hf import Handover, Reason, say, stock_modules
from whisper_flash_attention.hf.attention_registry import to_transformers_name
from whisper_flash_attention.hf.compat import (
    CACHE,
    CACHE_NAMES,
    DECODE_STEPS,
    SUPPORTED,
    BaseModelOutput,
    StockWhisper,
)
from whisper_flash_attention.hf.kv_cache import BucketedLayer
from whisper_flash_attention.hf.logits_processors import translate
from whisper_flash_attention.hf.stock_modules import BYPASSED, CALLS, HOOKS, SIZES

AUTOMATIC = to_transformers_name("auto")
# Probabilities of modules that drop values or whole layers in training mode.
RATES = ("dropout", "activation_dropout", "layerdrop")
_TRAINING = itemgetter("training")
_HOOKS: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*HOOKS)


class Inspected:
    """A model that was found plain, its engine, and all that was looked at.

    It does not keep the model alive, and so holds the modules within it only.
    """

    def __init__(self, model: Any, engine: Engine) -> None:
        self.engine = engine
        modules = list(model.modules())
        self._inner = modules[1:]
        self._types = list(map(type, modules))
        kinds = [
            (module, kind)
            for module, kind in stock_modules.walk(model, stock_modules.expected(model))
            if kind.attributes
        ]
        self._readers = [module for module, _ in kinds]
        # With the second name, `itemgetter` gives a tuple where there is one attribute, too.
        self._getters = [itemgetter(*kind.attributes, "training") for _, kind in kinds]
        self._read = self._currently_read()
        self._hooks = _hooks(map(vars, modules))
        self._config = model.config
        self._sizes = _sizes(model.config)
        self._methods = _methods(type(model))
        self._functions = stock_modules.current_functions()

    def _currently_read(self) -> list[Any]:
        """All attributes that the modules' `forward` reads."""
        values = (get(vars(each)) for get, each in zip(self._getters, self._readers, strict=True))
        return list(chain.from_iterable(each[:-1] for each in values))

    def unchanged(self, model: Any) -> bool:
        """Whether the model is still what was looked at; its engine watches the parameters."""
        modules = [model, *self._inner]
        attributes = list(map(vars, modules))
        return (
            model.config is self._config
            and _sizes(model.config) == self._sizes
            and not any(map(is_not, map(type, modules), self._types))
            and not any(any(map(contains, attributes, repeat(name))) for name in CALLS)
            and vars(model).keys().isdisjoint(BYPASSED)
            and _hooks(attributes) == self._hooks
            and not any(stock_modules.GLOBAL_HOOKS)
            and not any(map(is_not, self._currently_read(), self._read))
            and not any(map(is_not, _methods(type(model)), self._methods))
            and stock_modules.current_functions() == self._functions
        )

    def is_training(self, model: Any) -> bool:
        return any(map(_TRAINING, map(vars, (model, *self._inner))))

    def training_reason(self, model: Any) -> str | None:
        """What stock does in training mode and the engine does not."""
        if getattr(model.config, "apply_spec_augment", False):
            return "SpecAugment"
        for module in self._inner:
            rate = next((name for name in RATES if getattr(module, name, 0)), None)
            if module.training and rate is not None:
                return rate
            if module.training and getattr(module, "gradient_checkpointing", False):
                return "gradient checkpointing"
        return None


_inspected: WeakKeyDictionary[Any, Inspected] = WeakKeyDictionary()


def engine_for(model: Any) -> Engine | Handover:
    """The model's engine, or why the engine must not run this model as it is now."""
    if model.config._attn_implementation != AUTOMATIC:
        return Handover(Reason.ATTENTION, repr(model.attention_backend))
    found = _known(model) or _inspect(model)
    if isinstance(found, Handover):
        return found
    if torch.is_autocast_enabled(found.engine.weights.device.type):
        return Handover(Reason.AUTOCAST)
    if (mode := _mode()) is not None:
        return Handover(Reason.MODE, mode)
    if found.is_training(model) and (reason := found.training_reason(model)) is not None:
        return Handover(Reason.TRAINING, reason)
    return found.engine


class ModelChanged(Exception):
    """The engine that was taken on trust must not run the model any more."""


def trusted_engine(model: Any) -> Engine | None:
    """The engine that ran the model last, without a look at the model's modules.

    That look takes up to milliseconds, in which a GPU can work already: whoever runs this engine
    calls `confirm` meanwhile, and drops the result if that raises. Nothing of the model is called
    or changed by the engine, which holds the weights that it read. What would intercept the
    engine's own operations is looked at here.
    """
    if model.training or model.config._attn_implementation != AUTOMATIC:
        found = engine_for(model)
        return None if isinstance(found, Handover) else found
    known = _inspected.get(model)
    if known is None or _mode() is not None:
        return None
    if torch.is_autocast_enabled(known.engine.weights.device.type):
        return None
    return known.engine


def confirm(model: Any, engine: Engine) -> None:
    """Raise `ModelChanged` unless `engine` may run the model as it is now."""
    if engine_for(model) is not engine:
        raise ModelChanged


def _known(model: Any) -> Inspected | None:
    """What was found out about the model, if it is still as it was."""
    known = _inspected.get(model)
    if known is None:
        return None
    # What was replaced or deleted meanwhile may lack what is read here.
    with suppress(AttributeError, KeyError):
        if known.unchanged(model) and Engine.of(model) is known.engine:
            return known
    return None


def _inspect(model: Any) -> Inspected | Handover:
    found = stock_modules.why_not(model)
    if found is not None:
        _inspected.pop(model, None)
        Engine.forget(model)
        return Handover(Reason.MODULES, found)
    inspected = _inspected[model] = Inspected(model, Engine.of(model))
    return inspected


def _hooks(attributes: Iterable[Mapping[str, Any]]) -> list[int]:
    """Numbers of all hooks, which are never given twice."""
    return list(chain.from_iterable(chain.from_iterable(map(_HOOKS, attributes))))


def _sizes(config: Any) -> list[Any]:
    return [getattr(config, name) for name in SIZES]


def _methods(model_class: type) -> list[Any]:
    return [getattr(model_class, name, None) for name in (*CALLS, *BYPASSED)]


def _mode() -> str | None:
    """What intercepts PyTorch's operations: Transformers' own are the ones that it should see."""
    # A default device is a mode, too, and changes no operation on tensors that are there.
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if type(mode) is not DeviceContext]
    if modes:
        return type(modes[-1]).__name__
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return None


# What `_sample` may get that changes nothing here: Whisper's encoder ignores its mask, the engine
# computes the last logits only, in any case, and Transformers drops the labels that its trainer
# passes before each step.
HARMLESS = frozenset({"attention_mask", "labels", "logits_to_keep", "use_cache", CACHE})
LOOKED_AT = frozenset({"encoder_outputs", "decoder_attention_mask"})


@dataclass(frozen=True)
class Call:
    """The arguments of Transformers' `_sample` or, with `by_beams`, `_beam_search`."""

    input_ids: torch.Tensor
    processors: list[Any]
    criteria: list[Any]
    config: Any
    synced_gpus: bool
    streamer: Any
    model_kwargs: dict[str, Any]
    by_beams: bool = False


@dataclass(frozen=True)
class Plan:
    """A call that the engine can run."""

    engine: Engine
    request: Request
    states: torch.Tensor


def encoder_engine(model: Any, features: Any, kwargs: dict[str, Any], config: Any) -> Engine | None:
    """The engine, if it may run the encoder on these inputs; arguments as for `encode`."""
    if config.output_attentions or config.output_hidden_states or not takes(model, features):
        return None
    for name, value in kwargs.items():
        is_known = name in HARMLESS | LOOKED_AT or name.startswith("decoder_")
        if value is not None and not is_known:
            return None
    engine = engine_for(model)
    return None if isinstance(engine, Handover) else engine


def takes(model: Any, features: Any) -> bool:
    """Whether features are whole windows in the model's dtype, on its device."""
    if type(features) is not torch.Tensor or features.ndim != 3 or not features.shape[0]:
        return False
    weight = model.model.encoder.conv1.weight
    config = model.config
    return (
        features.dtype == weight.dtype
        and features.device == weight.device
        and features.shape[1:] == (config.num_mel_bins, 2 * config.max_source_positions)
    )


def plan_call(model: Any, call: Call) -> Plan | Handover:
    """What to ask the engine for, or why it cannot run this call."""
    found = _why_not(model, call)
    if found is not None:
        return found
    engine = engine_for(model)
    if isinstance(engine, Handover):
        return engine
    states = call.model_kwargs["encoder_outputs"].last_hidden_state
    if states.dtype != engine.weights.dtype or states.device != engine.weights.device:
        return Handover(Reason.ENCODER, f"{states.dtype} on {states.device}")
    if call.by_beams:
        # Transformers repeats the states for every beam; ours share them.
        states = states[:: call.config.num_beams].contiguous()
    streamer = call.streamer
    request = translate(
        call.processors,
        call.criteria,
        call.config,
        by_beams=call.by_beams,
        cross_attention=model.cross_attention,
        on_token=None if streamer is None else lambda tokens: streamer.put(tokens.cpu()),
    )
    if isinstance(request, Handover):
        return request
    if request.max_length > model.config.max_target_positions:
        return Handover(Reason.LENGTH)
    return Plan(engine, request, states)


def _why_not(model: Any, call: Call) -> Handover | None:
    """Why the engine cannot run a call, apart from rules and the model."""
    config, kwargs = call.config, call.model_kwargs
    if call.synced_gpus:
        return Handover(Reason.SYNCED)
    if config.is_assistant:
        return Handover(Reason.ASSISTANT)
    if config.output_attentions or config.output_hidden_states:
        return Handover(Reason.INTERNALS)
    if not kwargs.get("use_cache"):
        return Handover(Reason.NO_CACHE)
    if config.cache_implementation not in (None, "dynamic") or not _is_own(kwargs.get(CACHE)):
        return Handover(Reason.CACHE)
    for name, value in kwargs.items():
        if value is not None and name not in HARMLESS | LOOKED_AT:
            return Handover(Reason.INPUT, name)
    mask = kwargs.get("decoder_attention_mask")
    if mask is not None and not bool((mask != 0).all()):
        return Handover(Reason.MASK)
    encoded = kwargs.get("encoder_outputs")
    states = encoded.last_hidden_state if isinstance(encoded, BaseModelOutput) else None
    if states is None or states.ndim != 3:
        return Handover(Reason.ENCODER)
    if call.input_ids.shape[0] % states.shape[0]:
        return Handover(Reason.ENCODER, "its rows do not fit the prompts'")
    return None


def _is_own(cache: Any) -> bool:
    """Whether a cache is the empty one that the model made for this call."""
    past = getattr(cache, "self_attention_cache", None)
    return (
        getattr(past, "layer_class_to_replicate", None) is BucketedLayer
        and not getattr(cache, "_is_user_defined", False)
        and cache.get_seq_length() == 0
    )


# What Transformers makes of options of `generate`, beyond what `translate` knows.
PROCESSORS_OF_OPTIONS = frozenset(
    {
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "TopHLogitsWarper",
        "TypicalLogitsWarper",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WatermarkLogitsProcessor",
    }
)
CRITERIA_OF_OPTIONS = frozenset({"ConfidenceCriteria", "MaxTimeCriteria", "StopStringCriteria"})

# Options for which Transformers runs another loop than `_sample` and `_beam_search`.
OTHER_LOOPS = (
    "assistant_early_exit",
    "assistant_model",
    "constraints",
    "custom_generate",
    "dola_layers",
    "force_words_ids",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
)

_warned: set[str] = set()


@lru_cache
def _parameters() -> tuple[str, ...]:
    return tuple(signature(StockWhisper.generate).parameters)[1:]


def options_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate` call by name, without those that are None."""
    named = dict(zip(_parameters(), args, strict=False)) | dict(kwargs)
    return {name: value for name, value in named.items() if value is not None}


def check_handover(handover: Handover, options: Mapping[str, Any] | None, config: Any) -> None:
    """Warn of a handover that neither the call's options nor the model's state explain.

    Args:
        options: the arguments of `generate` by name; None outside of it, where the caller built
            the call and nothing can be judged.
        config: the call's `GenerationConfig`.
    """
    if options is not None and not _is_explained(handover, options, config):
        _warn(str(handover))


def check_encoder(options: Mapping[str, Any] | None) -> None:
    """Warn where the engine decodes states that neither it nor the caller computed.

    Args:
        options: as in `check_handover`.
    """
    if options is not None and "encoder_outputs" not in options:
        _warn("the encoder ran outside the engine")


def check_reached(model: Any, options: Mapping[str, Any]) -> None:
    """Log or warn why a call of `generate` reached none of the decode hooks.

    Args:
        options: the arguments of `generate` by name.
    """
    configs = (options.get("generation_config"), model.generation_config)
    for name in OTHER_LOOPS:
        values = (options.get(name), *(getattr(config, name, None) for config in configs))
        if any(values):
            say(Handover(Reason.LOOP, name))
            return
    groups = (options.get("num_beam_groups"), *(getattr(c, "num_beam_groups", 1) for c in configs))
    if any((each or 1) > 1 for each in groups):
        say(Handover(Reason.LOOP, "num_beam_groups"))
        return
    for name in (*DECODE_STEPS, "generate"):
        if not _is_of_this_package(getattr(type(model), name)):
            say(Handover(Reason.MODULES, f"{type(model).__name__} has a {name} of its own"))
            return
    _warn(f"it called none of {', '.join(DECODE_STEPS)}")


def _is_explained(handover: Handover, options: Mapping[str, Any], config: Any) -> bool:
    match handover.reason:
        case Reason.CACHE:
            chosen = config.cache_implementation not in (None, "dynamic")
            return chosen or any(name in options for name in CACHE_NAMES)
        case Reason.NO_CACHE:
            return not config.use_cache
        case Reason.INPUT:
            return handover.found in options
        case Reason.ENCODER:
            return "encoder_outputs" in options
        case Reason.PROCESSOR:
            given = options.get("logits_processor", ())
            return _is_known(handover.found, PROCESSORS_OF_OPTIONS, given)
        case Reason.CRITERION:
            given = options.get("stopping_criteria", ())
            return _is_known(handover.found, CRITERIA_OF_OPTIONS, given)
        case _:
            return True


def _is_known(found: str, known: frozenset[str], given: Any) -> bool:
    # A colon follows where the engine knows the type but not the value.
    return ":" in found or found in known or found in {type(each).__name__ for each in given}


def _is_of_this_package(function: Any) -> bool:
    return bool(function.__module__.startswith("whisper_flash_attention."))


def _warn(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"generate ran on Transformers' own code although nothing in the call needs it: {reason}. "
        "The output is right, but the engine's speed is lost. "
        f"Transformers {transformers.__version__} is installed; supported: {SUPPORTED}",
        EngineBypassed,
        # The caller of `generate`, as far as Transformers' own frames allow.
        stacklevel=2,
    )
