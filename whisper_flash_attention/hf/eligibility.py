"""Whether the engine may run a call of `generate`, with the reasons why not.

Three questions are answered here, and nowhere else:

- May the engine replace the model in its current state? `stock_modules` compares every module with
  stock Whisper's. That takes longer than decoding with a small model, so the outcome is kept as a
  `ModelSnapshot`. Before each call, the snapshot is compared with the model: types, children,
  parameters, hooks, attributes, the configuration, and the functions of all classes involved.
- Can the engine do exactly what the call requests? `to_engine_call` translates the call.
- Did a call fall back although nothing in it requires that? The engine is called by private methods
  of Transformers, which a new release may call with other arguments, or not at all. The text stays
  right and the speed is lost: `EngineBypassed`, a warning that Python shows by default.
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
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers

from whisper_flash_attention.engine.engine import Engine, operation_mode
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.errors import EngineBypassed
from whisper_flash_attention.hf import stock_modules
from whisper_flash_attention.hf.attention_registry import to_transformers_name
from whisper_flash_attention.hf.compat import (
    CACHE,
    CACHE_NAMES,
    DECODE_STEPS,
    SUPPORTED,
    BaseModelOutput,
    StockWhisper,
)
from whisper_flash_attention.hf.fallback import Fallback, FallbackReason, log_once
from whisper_flash_attention.hf.kv_cache import BucketedLayer
from whisper_flash_attention.hf.logits_processors import translate
from whisper_flash_attention.hf.stock_modules import (
    BYPASSED_METHODS,
    CALL_METHODS,
    CONFIG_SIZES,
    HOOK_TABLES,
)

AUTOMATIC = to_transformers_name("auto")
# Probabilities of modules that drop values or whole layers in training mode.
DROPOUT_RATES = ("dropout", "activation_dropout", "layerdrop")
_TRAINING = itemgetter("training")
_HOOKS: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*HOOK_TABLES)


class ModelSnapshot:
    """State of a model that passed `stock_modules.mismatch`, and the engine that runs it.

    It holds the submodules only, so that it does not keep the model alive.
    """

    def __init__(self, model: Any, engine: Engine) -> None:
        self.engine = engine
        modules = list(model.modules())
        self._inner = modules[1:]
        self._types = list(map(type, modules))
        specs = [
            (module, spec)
            for module, spec in stock_modules.walk_specs(model, stock_modules.expected_spec(model))
            if spec.attributes
        ]
        self._attribute_owners = [module for module, _ in specs]
        # With the second name, `itemgetter` gives a tuple where there is one attribute, too.
        self._getters = [itemgetter(*spec.attributes, "training") for _, spec in specs]
        self._attributes = self._current_attributes()
        self._hooks = _hooks(map(vars, modules))
        self._config = model.config
        self._sizes = _sizes(model.config)
        self._methods = _methods(type(model))
        self._functions = stock_modules.current_functions()

    def _current_attributes(self) -> list[Any]:
        """Values of all attributes that the modules' `forward` methods read."""
        values = (
            get(vars(each)) for get, each in zip(self._getters, self._attribute_owners, strict=True)
        )
        return list(chain.from_iterable(each[:-1] for each in values))

    def matches(self, model: Any) -> bool:
        """Whether the model is unchanged, apart from parameters, which `Engine.of` compares."""
        modules = [model, *self._inner]
        attributes = list(map(vars, modules))
        return (
            model.config is self._config
            and _sizes(model.config) == self._sizes
            and not any(map(is_not, map(type, modules), self._types))
            and not any(any(map(contains, attributes, repeat(name))) for name in CALL_METHODS)
            and vars(model).keys().isdisjoint(BYPASSED_METHODS)
            and _hooks(attributes) == self._hooks
            and not any(stock_modules.GLOBAL_HOOKS)
            and not any(map(is_not, self._current_attributes(), self._attributes))
            and not any(map(is_not, _methods(type(model)), self._methods))
            and not any(map(is_not, stock_modules.current_functions(), self._functions))
        )

    def is_training(self, model: Any) -> bool:
        return any(map(_TRAINING, map(vars, (model, *self._inner))))

    def training_reason(self, model: Any) -> str | None:
        """What stock Whisper does in training mode and the engine does not; None if nothing."""
        if getattr(model.config, "apply_spec_augment", False):
            return "SpecAugment"
        for module in self._inner:
            rate = next((name for name in DROPOUT_RATES if getattr(module, name, 0)), None)
            if module.training and rate is not None:
                return rate
            if module.training and getattr(module, "gradient_checkpointing", False):
                return "gradient checkpointing"
        return None


_snapshots: WeakKeyDictionary[Any, ModelSnapshot] = WeakKeyDictionary()


def engine_for(model: Any) -> Engine | Fallback:
    """The model's engine, or why the engine must not run this model as it is now."""
    if model.config._attn_implementation != AUTOMATIC:
        return Fallback(FallbackReason.ATTENTION, repr(model.attention_backend))
    found = _current_snapshot(model) or _take_snapshot(model)
    if isinstance(found, Fallback):
        return found
    if torch.is_autocast_enabled(found.engine.weights.device.type):
        return Fallback(FallbackReason.AUTOCAST)
    if (mode := operation_mode()) is not None:
        return Fallback(FallbackReason.MODE, mode)
    if found.is_training(model) and (reason := found.training_reason(model)) is not None:
        return Fallback(FallbackReason.TRAINING, reason)
    return found.engine


class ModelChanged(Exception):
    """The engine of a model must not run it any more."""


def trusted_engine(model: Any) -> Engine | None:
    """The engine that ran the model last, before its snapshot is compared; None without one.

    The comparison takes up to milliseconds, in which a GPU can work already: the caller starts the
    engine, calls `verify_engine` meanwhile, and drops the result if that raises. The engine calls
    and changes nothing of the model, and holds the weights that it read. Modes that intercept the
    engine's own operations are checked here.
    """
    if model.training or model.config._attn_implementation != AUTOMATIC:
        found = engine_for(model)
        return None if isinstance(found, Fallback) else found
    snapshot = _snapshots.get(model)
    if snapshot is None or operation_mode() is not None:
        return None
    if torch.is_autocast_enabled(snapshot.engine.weights.device.type):
        return None
    return snapshot.engine


def verify_engine(model: Any, engine: Engine) -> None:
    """Raise `ModelChanged` unless `engine` may run the model as it is now."""
    if engine_for(model) is not engine:
        raise ModelChanged


def _current_snapshot(model: Any) -> ModelSnapshot | None:
    """The snapshot of the model, if the model still matches it."""
    snapshot = _snapshots.get(model)
    if snapshot is None:
        return None
    # Replaced modules may lack the attributes that are read here.
    with suppress(AttributeError, KeyError):
        if snapshot.matches(model) and Engine.of(model) is snapshot.engine:
            return snapshot
    return None


def _take_snapshot(model: Any) -> ModelSnapshot | Fallback:
    found = stock_modules.mismatch(model)
    if found is not None:
        _snapshots.pop(model, None)
        Engine.forget(model)
        return Fallback(FallbackReason.MODULES, found)
    snapshot = _snapshots[model] = ModelSnapshot(model, Engine.of(model))
    return snapshot


def _hooks(attributes: Iterable[Mapping[str, Any]]) -> list[int]:
    """Ids of all hooks; PyTorch never uses an id twice."""
    return list(chain.from_iterable(chain.from_iterable(map(_HOOKS, attributes))))


def _sizes(config: Any) -> list[Any]:
    # Attribute access of configurations runs Python code of Transformers.
    return list(map(vars(config).get, CONFIG_SIZES))


def _methods(model_class: type) -> list[Any]:
    return [getattr(model_class, name, None) for name in (*CALL_METHODS, *BYPASSED_METHODS)]


# Arguments of `_sample` without effect: Whisper's encoder ignores its mask, the engine computes
# only the last logits, and Transformers drops the labels that its trainer passes.
IGNORED_INPUTS = frozenset({"attention_mask", "labels", "logits_to_keep", "use_cache", CACHE})
CHECKED_INPUTS = frozenset({"encoder_outputs", "decoder_attention_mask"})


@dataclass(frozen=True)
class DecodeCall:
    """The arguments of Transformers' `_sample` or, with `by_beams`, `_beam_search`."""

    input_ids: torch.Tensor
    processors: list[Any]
    criteria: list[Any]
    config: Any
    synced_gpus: bool
    streamer: Any
    model_kwargs: dict[str, Any]
    by_beams: bool = False


class EngineCall(NamedTuple):
    """Engine and arguments of one decode."""

    engine: Engine
    request: Request
    states: torch.Tensor


def encoder_engine(model: Any, features: Any, kwargs: dict[str, Any], config: Any) -> Engine | None:
    """The engine, if it may run the encoder on these inputs; arguments as for `encode`."""
    if (
        config.output_attentions
        or config.output_hidden_states
        or not accepts_features(model, features)
    ):
        return None
    for name, value in kwargs.items():
        is_known = name in IGNORED_INPUTS | CHECKED_INPUTS or name.startswith("decoder_")
        if value is not None and not is_known:
            return None
    engine = engine_for(model)
    return None if isinstance(engine, Fallback) else engine


def accepts_features(model: Any, features: Any) -> bool:
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


def to_engine_call(model: Any, call: DecodeCall) -> EngineCall | Fallback:
    """The engine call that does what `call` requests, or why there is none."""
    found = _call_reason(model, call)
    if found is not None:
        return found
    engine = engine_for(model)
    if isinstance(engine, Fallback):
        return engine
    states = call.model_kwargs["encoder_outputs"].last_hidden_state
    if states.dtype != engine.weights.dtype or states.device != engine.weights.device:
        return Fallback(FallbackReason.ENCODER, f"{states.dtype} on {states.device}")
    if call.by_beams:
        # Transformers repeats the states for every beam; the engine's beams share them.
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
    if isinstance(request, Fallback):
        return request
    if request.max_length > model.config.max_target_positions:
        return Fallback(FallbackReason.LENGTH)
    return EngineCall(engine, request, states)


def _call_reason(model: Any, call: DecodeCall) -> Fallback | None:
    """Why the engine cannot run a call, apart from its logits processors and the model."""
    config, kwargs = call.config, call.model_kwargs
    if call.synced_gpus:
        return Fallback(FallbackReason.SYNCED)
    if config.is_assistant:
        return Fallback(FallbackReason.ASSISTANT)
    if config.output_attentions or config.output_hidden_states:
        return Fallback(FallbackReason.INTERNALS)
    if not kwargs.get("use_cache"):
        return Fallback(FallbackReason.NO_CACHE)
    if config.cache_implementation not in (None, "dynamic") or not _is_empty_own_cache(
        kwargs.get(CACHE)
    ):
        return Fallback(FallbackReason.CACHE)
    for name, value in kwargs.items():
        if value is not None and name not in IGNORED_INPUTS | CHECKED_INPUTS:
            return Fallback(FallbackReason.INPUT, name)
    mask = kwargs.get("decoder_attention_mask")
    # Whisper's `generate` compares the prompts with None where a checkpoint has no padding token.
    if mask is not None and not (isinstance(mask, torch.Tensor) and bool((mask != 0).all())):
        return Fallback(FallbackReason.MASK)
    encoded = kwargs.get("encoder_outputs")
    states = encoded.last_hidden_state if isinstance(encoded, BaseModelOutput) else None
    if states is None or states.ndim != 3:
        return Fallback(FallbackReason.ENCODER)
    if call.input_ids.shape[0] % states.shape[0]:
        return Fallback(FallbackReason.ENCODER, "its rows do not fit the prompts'")
    return None


def _is_empty_own_cache(cache: Any) -> bool:
    """Whether a cache is empty and was created by our model for this call."""
    past = getattr(cache, "self_attention_cache", None)
    return (
        getattr(past, "layer_class_to_replicate", None) is BucketedLayer
        and not getattr(cache, "_is_user_defined", False)
        and cache.get_seq_length() == 0
    )


# Classes that Transformers creates for options of `generate` and `translate` does not support.
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


def warn_if_unexplained(fallback: Fallback, options: Mapping[str, Any] | None, config: Any) -> None:
    """Warn about a fallback that neither the call's options nor the model's state explain.

    Args:
        options: the arguments of `generate` by name; None if `_sample` or `_beam_search` was
            called directly.
        config: the call's `GenerationConfig`.
    """
    if options is not None and not _is_explained(fallback, options, config):
        _warn(str(fallback))


def warn_if_encoded_elsewhere(options: Mapping[str, Any] | None) -> None:
    """Warn if the engine decodes states that neither it nor the caller computed.

    Args:
        options: as in `warn_if_unexplained`.
    """
    if options is not None and "encoder_outputs" not in options:
        _warn("the encoder ran outside the engine")


def report_missed_hooks(model: Any, options: Mapping[str, Any]) -> None:
    """Log why a call of `generate` reached no decode hook, or warn if nothing explains it.

    Args:
        options: the arguments of `generate` by name.
    """
    configs = (options.get("generation_config"), model.generation_config)
    for name in OTHER_LOOPS:
        values = (options.get(name), *(getattr(config, name, None) for config in configs))
        if any(values):
            log_once(Fallback(FallbackReason.LOOP, name))
            return
    groups = (options.get("num_beam_groups"), *(getattr(c, "num_beam_groups", 1) for c in configs))
    if any((each or 1) > 1 for each in groups):
        log_once(Fallback(FallbackReason.LOOP, "num_beam_groups"))
        return
    for name in (*DECODE_STEPS, "generate"):
        if not _is_of_this_package(getattr(type(model), name)):
            log_once(
                Fallback(FallbackReason.MODULES, f"{type(model).__name__} has a {name} of its own")
            )
            return
    _warn(f"it called none of {', '.join(DECODE_STEPS)}")


def _is_explained(fallback: Fallback, options: Mapping[str, Any], config: Any) -> bool:
    match fallback.reason:
        case FallbackReason.CACHE:
            chosen = config.cache_implementation not in (None, "dynamic")
            return chosen or any(name in options for name in CACHE_NAMES)
        case FallbackReason.NO_CACHE:
            return not config.use_cache
        case FallbackReason.INPUT:
            return fallback.detail in options
        case FallbackReason.ENCODER:
            return "encoder_outputs" in options
        case FallbackReason.PROCESSOR:
            given = options.get("logits_processor", ())
            return _is_known(fallback.detail, PROCESSORS_OF_OPTIONS, given)
        case FallbackReason.CRITERION:
            given = options.get("stopping_criteria", ())
            return _is_known(fallback.detail, CRITERIA_OF_OPTIONS, given)
        case _:
            return True


def _is_known(found: str, known: frozenset[str], given: Any) -> bool:
    # A colon: the engine supports the type, but not this value.
    return ":" in found or found in known or found in {type(each).__name__ for each in given}


def _is_of_this_package(function: Any) -> bool:
    return bool(function.__module__.startswith("whisper_flash_attention."))


def _warn(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        "generate ran on Transformers' own code although nothing in the call requires it: "
        f"{reason}. The output is right, but the engine's speed is lost. "
        f"Transformers {transformers.__version__} is installed; supported: {SUPPORTED}",
        EngineBypassed,
        # The caller of `generate`, as far as Transformers' own frames allow.
        stacklevel=2,
    )
