"""Replacements for the decode loops of Transformers' `generate`, and for its encoder step.

    generate (Whisper's: windows, temperatures)  ─  generate (Transformers': options, processors)
        ├─ encode  ─ engine.encode
        └─ decode  ─ to_engine_call ─ engine.decode      or a `Fallback` to Transformers' loop

`decode` returns what stock's `_sample` or `_beam_search` would: token ids, or a dictionary whose
key/value cache is computed when it is read. Stock Whisper runs the encoder again at every
temperature and to detect the language; here equal features are encoded once within a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.hf.compat import (
    CACHE,
    BaseModelOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
)
from whisper_flash_attention.hf.eligibility import (
    DecodeCall,
    encoder_engine,
    to_engine_call,
    warn_if_encoded_elsewhere,
    warn_if_unexplained,
)
from whisper_flash_attention.hf.fallback import Fallback, log_once
from whisper_flash_attention.hf.kv_cache import RecomputedCache, recomputed_cache
from whisper_flash_attention.hf.logits_processors import detect_no_speech


@dataclass(frozen=True)
class EngineDecode:
    """A decode that the engine ran for `_sample` or `_beam_search`.

    `repeatable`: another call with the same options makes the same request for any audio.
    """

    prompt: torch.Tensor
    request: Request
    states: torch.Tensor
    decoded: DecodeOutput
    config: Any
    repeatable: bool


@dataclass
class CallScope:
    """State of one `generate` call."""

    decodes: list[EngineDecode] = field(default_factory=list)
    languages: list[torch.Tensor] = field(default_factory=list)
    fell_back: bool = False
    # The arguments of `generate` by name; None for decodes outside of it.
    options: dict[str, Any] | None = None
    encoder_reached: bool = False
    _features: torch.Tensor | None = None
    _states: torch.Tensor | None = None

    def encode(self, engine: Engine, features: torch.Tensor) -> torch.Tensor:
        """Encoder states `[B, S, D]` of features `[B, mel bins, frames]`, reused where equal."""
        last, states = self._features, self._states
        if states is not None and last is not None and _equal(last, features):
            return states
        del states
        self._features = self._states = None
        self._states = engine.encode(features)
        self._features = features
        return self._states


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


_current: ContextVar[CallScope | None] = ContextVar(
    "whisper_flash_attention_generate", default=None
)


@contextmanager
def call_scope(options: dict[str, Any] | None = None) -> Iterator[CallScope]:
    """Set a new `CallScope` for the duration of one `generate` call with these options."""
    scope = CallScope(options=options)
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def current_scope() -> CallScope:
    """The scope of the running call; outside `generate` a new one."""
    return _current.get() or CallScope()


def decode(model: Any, call: DecodeCall) -> Any:
    """Run the call on the engine; `Fallback` if Transformers' own loop must."""
    engine_call = to_engine_call(model, call)
    scope = current_scope()
    if isinstance(engine_call, Fallback):
        scope.fell_back = True
        log_once(engine_call)
        warn_if_unexplained(engine_call, scope.options, call.config)
        return engine_call
    if not scope.encoder_reached:
        warn_if_encoded_elsewhere(scope.options)
    engine, request, states = engine_call
    prompt = call.input_ids
    detect_no_speech(call.processors, engine, states, prompt, request)
    decoded = engine.decode(states, prompt, request)
    if call.streamer is not None:
        call.streamer.end()
    scope.decodes.append(
        EngineDecode(prompt, request, states, decoded, call.config, _is_repeatable(call))
    )
    if not call.config.return_dict_in_generate:
        return decoded.sequences
    return to_model_output(model, states, decoded)


def record_languages(detected: torch.Tensor) -> None:
    """Record languages detected by this call, int64 `[B]`: its prompt depends on the audio."""
    current_scope().languages.append(detected)


def to_model_output(
    model: Any, states: torch.Tensor, decoded: DecodeOutput
) -> GenerateEncoderDecoderOutput | GenerateBeamEncoderDecoderOutput:
    """The `ModelOutput` that stock returns for a decode; fields not requested are None."""
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
    engine = encoder_engine(model, features, kwargs, config)
    if engine is None:
        return None
    return BaseModelOutput(last_hidden_state=scope.encode(engine, features))


def postprocess_outputs(stock: Any, *, seek_outputs: Any, is_shortform: bool, **more: Any) -> Any:
    """Stock's `_postprocess_outputs`, without computing the caches.

    Args:
        stock: stock's method; the other arguments are its own.
    """
    outputs = seek_outputs
    cache = None if isinstance(outputs, torch.Tensor) else outputs.get(CACHE)
    if not isinstance(cache, RecomputedCache):
        return stock(seek_outputs=outputs, is_shortform=is_shortform, **more)
    others = {name: value for name, value in outputs.items() if name != CACHE}
    sequences, rows = stock(seek_outputs=type(outputs)(**others), is_shortform=is_shortform, **more)
    for index, row in enumerate(rows):
        row[CACHE] = cache.row(index) if is_shortform else None
    return sequences, rows


def _is_repeatable(call: DecodeCall) -> bool:
    config = call.config
    thresholds = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")
    return (
        call.streamer is None
        and call.model_kwargs.get("decoder_attention_mask") is None
        and all(getattr(config, name, None) is None for name in thresholds)
        # Transformers warns of lengths that cannot be met, at every call.
        and (config.min_length or 0) <= config.max_length
    )
