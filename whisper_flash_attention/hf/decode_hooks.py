"""The seam in Transformers' `generate`: its decode loops, and the encoder before them.

    generate (Whisper's: windows, temperatures)  ─  generate (Transformers': options, processors)
        ├─ encode       ─ engine.encode
        └─ decode       ─ translate ─ engine.decode      or Transformers' loop, with a reason

`decode` returns what stock's `_sample` or `_beam_search` would: token ids, or a dictionary whose
key/value cache is computed when it is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import Decoded, Request
from whisper_flash_attention.hf.call_scope import Decode, current_scope
from whisper_flash_attention.hf.compat import (
    CACHE,
    BaseModelOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
)
from whisper_flash_attention.hf.eligibility import engine_for
from whisper_flash_attention.hf.handover import Handover, Reason, say
from whisper_flash_attention.hf.kv_cache import BucketedLayer
from whisper_flash_attention.hf.logits_processors import translate
from whisper_flash_attention.hf.no_speech import detects_silence, listen
from whisper_flash_attention.hf.recomputed_cache import RecomputedCache, recomputed_cache
from whisper_flash_attention.hf.unexpected import check_encoder, check_handover

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


def decode(model: Any, call: Call) -> Any:
    """Run the call on the engine; `Handover` if Transformers' own loop must."""
    plan = _plan(model, call)
    scope = current_scope()
    if isinstance(plan, Handover):
        hand_over(plan)
        check_handover(plan, scope.options, call.config)
        return plan
    check_encoder(scope, scope.options)
    if detects_silence(call.processors):
        listen(call.processors, plan.engine, plan.states, call.input_ids, plan.request)
    decoded = plan.engine.decode(plan.states, call.input_ids, plan.request)
    if call.streamer is not None:
        call.streamer.end()
    scope.decodes.append(
        Decode(
            call.input_ids, plan.request, plan.states, decoded, call.config, _is_repeatable(call)
        )
    )
    if not call.config.return_dict_in_generate:
        return decoded.sequences
    return as_dictionary(model, plan.states, decoded)


def hand_over(handover: Handover) -> None:
    """Note and say that Transformers' own loop runs this call."""
    current_scope().handed_over = True
    say(handover)


def note_languages(detected: torch.Tensor) -> None:
    """Note that this call detected languages, int64 `[B]`: the prompt depends on the audio."""
    current_scope().languages.append(detected)


def as_dictionary(
    model: Any, states: torch.Tensor, decoded: Decoded
) -> GenerateEncoderDecoderOutput | GenerateBeamEncoderDecoderOutput:
    """Stock's dictionary of a decode; fields that were not asked for are None."""
    # Transformers declares tuples of one tensor here.
    fields: dict[str, Any] = {
        "sequences": decoded.sequences,
        "scores": decoded.scores,
        "logits": decoded.logits,
    }
    if decoded.beam_indices is None:
        fields[CACHE] = recomputed_cache(model, states, decoded.sequences)
        return GenerateEncoderDecoderOutput(**fields)
    assert decoded.running is not None
    fields[CACHE] = recomputed_cache(model, states, decoded.running)
    return GenerateBeamEncoderDecoderOutput(
        **fields,
        # Transformers gives these two together or not at all.
        sequences_scores=cast(Any, None if decoded.scores is None else decoded.sequences_scores),
        beam_indices=cast(Any, decoded.beam_indices),
    )


def encode(model: Any, features: Any, kwargs: dict[str, Any], config: Any) -> Any:
    """The encoder's output for `generate`, from the engine; None if the model must compute it.

    Args:
        features: the main input, float `[B, mel bins, frames]`.
        kwargs: the model's other inputs.
        config: the call's `GenerationConfig`.
    """
    scope = current_scope()
    scope.encoder_reached = True
    if config.output_attentions or config.output_hidden_states:
        return None
    if not takes(model, features) or any(
        value is not None and name not in HARMLESS | LOOKED_AT and not name.startswith("decoder_")
        for name, value in kwargs.items()
    ):
        return None
    engine = engine_for(model)
    if isinstance(engine, Handover):
        return None
    return BaseModelOutput(last_hidden_state=scope.encode(engine, features))


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


def split_outputs(stock: Any, *, seek_outputs: Any, is_shortform: bool, **more: Any) -> Any:
    """Stock's `_postprocess_outputs`, without looking into caches that are not computed yet.

    Args:
        stock: stock's method; the other arguments are its own.
    """
    outputs = seek_outputs
    cache = None if isinstance(outputs, torch.Tensor) else outputs.get(CACHE)
    if not isinstance(cache, RecomputedCache):
        return stock(seek_outputs=outputs, is_shortform=is_shortform, **more)
    rest = {name: value for name, value in outputs.items() if name != CACHE}
    sequences, rows = stock(seek_outputs=type(outputs)(**rest), is_shortform=is_shortform, **more)
    for index, row in enumerate(rows):
        row[CACHE] = cache.row(index) if is_shortform else None
    return sequences, rows


def _plan(model: Any, call: Call) -> Plan | Handover:
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


def _is_repeatable(call: Call) -> bool:
    config = call.config
    thresholds = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")
    return (
        call.streamer is None
        and call.model_kwargs.get("decoder_attention_mask") is None
        and all(getattr(config, name, None) is None for name in thresholds)
        # Transformers warns of lengths that cannot be met, at every call.
        and (config.min_length or 0) <= config.max_length
    )
