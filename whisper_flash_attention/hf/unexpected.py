"""Notice calls of `generate` that leave the engine although nothing in them asks for it.

The engine is reached through methods of Transformers that carry no promise. A new release may call
them with other arguments, or not at all: the text stays right and all speed is lost. Options of a
call that need Transformers' own loop are normal and stay in the log; everything else is a warning
that Python shows by default, once for each reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

import transformers

from whisper_flash_attention.errors import EngineBypassed
from whisper_flash_attention.hf.call_scope import Scope
from whisper_flash_attention.hf.compat import CACHE_NAMES, DECODE_STEPS, SUPPORTED, StockWhisper
from whisper_flash_attention.hf.handover import Handover, Reason, say

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


def check_encoder(scope: Scope, options: Mapping[str, Any] | None) -> None:
    """Warn where the engine decodes states that neither it nor the caller computed."""
    if options is not None and not scope.encoder_reached and "encoder_outputs" not in options:
        _warn("the encoder ran outside the engine")


def check_reached(model: Any, scope: Scope) -> None:
    """Say why a call of `generate` that is done decoded nothing on the engine, if it did not."""
    if scope.decodes or scope.handed_over:
        return
    options = scope.options or {}
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
