"""Plain calls of `generate`: one window per clip, no options but common ones.

Preparing a call takes Transformers longer than decoding it takes the engine with a small model.
The outcome depends only on the options, the configuration and the batch size, so the first call of
a kind runs through Transformers, and the engine request that it led to is kept: later calls with
the same key go directly to the engine. A call is kept only if its result, computed from the kept
request, equals what Transformers returned. Transformers' warnings about options appear at the
first call only.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getattr_static
from itertools import chain
from operator import is_not
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import GenerationConfig

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.hf.compat import StockWhisper
from whisper_flash_attention.hf.decode_hooks import (
    CallScope,
    EngineDecode,
    call_scope,
    to_model_output,
)
from whisper_flash_attention.hf.eligibility import (
    ModelChanged,
    accepts_features,
    options_of,
    report_missed_hooks,
    trusted_engine,
    verify_engine,
)

# Options that affect only the prompt, the logits processors, the lengths and the output format.
PREPARED_OPTIONS = frozenset(
    {
        "begin_suppress_tokens",
        "do_sample",
        "eos_token_id",
        "force_unique_generate_call",
        "is_multilingual",
        "language",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "repetition_penalty",
        "return_dict_in_generate",
        "return_timestamps",
        "suppress_tokens",
        "synced_gpus",
        "task",
        "temperature",
        "top_k",
        "top_p",
        "use_cache",
    }
)
PLAIN_TYPES = (type(None), bool, int, float, str, list, tuple)
MAX_PREPARED_CALLS = 64


@dataclass(frozen=True)
class LanguageDetection:
    """Stock Whisper's language detection, on encoder states that are already computed.

    Args:
        position: of the language token in the prompt.
        start: the token after which the language logits are compared.
        ids: the languages' tokens, ascending, int64 `[N]`.
    """

    position: int
    start: int
    ids: torch.Tensor

    def detect(self, engine: Engine, states: torch.Tensor) -> torch.Tensor:
        """The most probable language token for each clip of states `[B, S, D]`, int64 `[B]`."""
        return self.ids[engine.language_logits(states, self.start, self.ids).argmax(dim=-1)]


@dataclass(frozen=True)
class PreparedCall:
    """The engine request of calls with one key, and the format of their output."""

    prompt: torch.Tensor
    request: Request
    output_format: OutputFormat
    returns_dictionary: bool
    language: LanguageDetection | None

    def run(self, model: Any, engine: Engine, features: torch.Tensor) -> Any:
        """What `generate` returns for features `[B, mel bins, frames]`.

        None if Transformers would continue with a second window. In this case and on an error the
        state of the random number generator is restored.

        Args:
            engine: from `trusted_engine`; the model is verified while the device works.

        Raises:
            ModelChanged: this engine must not run the model any more, or its class was changed.
        """
        before = _rng_state(features.device) if self.request.sample else None
        try:
            result = self._decoded(model, engine, features)
        except Exception:  # weights freed or replaced since the last call may cause any error
            if before is not None:
                _restore_rng(features.device, before)
            _verify(model, engine)
            raise
        if result is None and before is not None:
            _restore_rng(features.device, before)
        return result

    def _decoded(self, model: Any, engine: Engine, features: torch.Tensor) -> Any:
        states = engine.encode(features)
        prompt = self.prompt
        if self.language is not None:
            prompt = prompt.clone()
            found = self.language.detect(engine, states)
            prompt[:, self.language.position] = found.repeat_interleave(
                prompt.shape[0] // found.shape[0]
            )
        decoded = engine.decode(
            states, prompt, self.request, meanwhile=lambda: _verify(model, engine)
        )
        return self.result(model, states, decoded)

    def result(self, model: Any, states: torch.Tensor, decoded: Any) -> Any:
        """The output for one decode; None as in `run`."""
        if not self.returns_dictionary:
            return self.output_format.sequences(decoded)
        if not self.output_format.one_window and self.output_format.lengths(decoded) is None:
            return None
        return to_model_output(model, states, decoded)


_prepared: WeakKeyDictionary[Any, dict[bytes, PreparedCall]] = WeakKeyDictionary()


def forget(model: Any) -> None:
    """Drop the calls that were prepared for a model."""
    _prepared.pop(model, None)


def generate(
    model: Any, stock: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Whisper's `generate`: directly on the engine where the call was prepared, else stock's.

    Args:
        stock: runs Transformers' `generate` with these arguments.
        args, kwargs: the arguments of `generate`.
    """
    features, key = _call_key(model, args, kwargs)
    calls = _prepared.setdefault(model, {})
    prepared = None if key is None else calls.get(key)
    if key is not None and prepared is not None:
        engine = trusted_engine(model)
        if engine is not None:
            try:
                with torch.no_grad():
                    result = prepared.run(model, engine, features)
            except ModelChanged:
                # Otherwise a model with methods of its own would run on the engine at every call.
                calls.pop(key, None)
                prepared = None
            else:
                if result is not None:
                    return result
    options = options_of(args, kwargs)
    with call_scope(options) as scope:
        result = stock()
    if not scope.decodes and not scope.fell_back:
        report_missed_hooks(model, options)
    if key is not None and prepared is None:
        prepared = _prepare(model, scope, kwargs, result)
        if prepared is not None:
            if len(calls) >= MAX_PREPARED_CALLS:
                calls.clear()
            calls[key] = prepared
    return result


def _call_key(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, bytes | None]:
    """The features, and the key of the prepared call; None for a call that cannot be prepared."""
    options = dict(kwargs)
    features = args[0] if args else options.pop("input_features", None)
    if len(args) > 1 or not accepts_features(model, features):
        return features, None
    mask = options.pop("attention_mask", None)
    # Whisper ignores the mask; Transformers reports one of the wrong type or shape.
    if mask is not None and (type(mask) is not torch.Tensor or mask.ndim != 2):
        return features, None
    # Transformers' trainer passes labels, which `generate` ignores.
    labels = options.pop("labels", None)
    if labels is not None and (type(labels) is not torch.Tensor or not labels.ndim):
        return features, None
    configs = [model.generation_config]
    if (given := options.pop("generation_config", None)) is not None:
        configs.append(given)
    prompt_ids = options.pop("prompt_ids", None)
    if prompt_ids is not None:
        if type(prompt_ids) is not torch.Tensor or prompt_ids.dtype != torch.int64:
            return features, None
        prompt_ids = (prompt_ids.device.type, prompt_ids.tolist())
    simple = all(
        name in PREPARED_OPTIONS
        and type(value) in PLAIN_TYPES
        and not (name == "temperature" and type(value) in (list, tuple))
        for name, value in options.items()
    )
    if not simple or any(type(config) is not GenerationConfig for config in configs):
        return features, None
    device = features.device
    parts = (
        (features.shape[0], device.type, device.index),
        (options, prompt_ids),
        [vars(config) for config in configs],
        # Settings of the model that `generate` reads or warns about.
        (len(vars(model.config)), getattr(model.config, "forced_decoder_ids", None)),
        model.cross_attention,
    )
    try:
        # Exact where `==` is not (True, 1 and 1.0 differ); fails for objects of other types.
        return features, marshal.dumps(parts, 2)
    except ValueError:
        return features, None


def _verify(model: Any, engine: Engine) -> None:
    """Raise `ModelChanged` unless the prepared calls and `engine` may still be used."""
    verify_engine(model, engine)
    if _is_customised(model):
        raise ModelChanged


def _is_customised(model: Any) -> bool:
    """Whether a method, `generate` aside, is not this package's or stock Whisper's own.

    A prepared call runs none of the methods that prepared it.
    """
    model_class = type(model)
    now = list(chain.from_iterable(vars(each).values() for each in model_class.__mro__))
    known = _classes.get(model_class)
    if known is None or len(known.members) != len(now) or any(map(is_not, now, known.members)):
        known = _classes[model_class] = _ClassMembers(now, _has_own_methods(model_class))
    return known.customised or not vars(model).keys().isdisjoint(_METHODS)


class _ClassMembers(NamedTuple):
    """The members of a class and its bases, and whether any method is not this package's own."""

    members: list[Any]
    customised: bool


_classes: WeakKeyDictionary[type, _ClassMembers] = WeakKeyDictionary()
_STOCK = {
    name: getattr_static(StockWhisper, name)
    for name in dir(StockWhisper)
    if not name.startswith("__")
}
_METHODS = frozenset(name for name, value in _STOCK.items() if callable(value)) - {"generate"}


def _has_own_methods(model_class: type) -> bool:
    ours = next(
        c for c in model_class.__mro__ if c.__module__.startswith("whisper_flash_attention.")
    )
    return any(
        getattr_static(model_class, name) is not getattr_static(ours, name)
        or getattr_static(StockWhisper, name, None) is not value
        for name, value in _STOCK.items()
    )


def _prepare(
    model: Any, scope: CallScope, options: dict[str, Any], result: Any
) -> PreparedCall | None:
    """The prepared call, if later calls with the same key can bypass Transformers."""
    if (
        _is_customised(model)
        or scope.fell_back
        or len(scope.decodes) != 1
        or not scope.decodes[0].repeatable
    ):
        return None
    decode = scope.decodes[0]
    if decode.request.beams is not None and isinstance(result, dict):
        # Stock keeps the cache of those beams only that were running at the end.
        return None
    config = decode.config
    one_window = _forces_one_window(options, config)
    if config.return_timestamps and not one_window:
        return None
    if type(config.eos_token_id) is not int or type(config.pad_token_id) is not int:
        return None
    language = _language(scope, decode) if scope.languages else None
    if scope.languages and language is None:
        return None
    no_timestamps = getattr(config, "no_timestamps_token_id", model.config.vocab_size)
    prepared = PreparedCall(
        prompt=decode.prompt.contiguous(),
        request=decode.request,
        output_format=OutputFormat(
            prompt=decode.prompt.shape[1],
            eos=config.eos_token_id,
            pad=config.pad_token_id,
            timestamp_begin=no_timestamps + 1,
            one_window=one_window,
        ),
        returns_dictionary=isinstance(result, dict),
        language=language,
    )
    again = prepared.result(model, decode.states, decode.decoded)
    return prepared if _same(again, result) else None


def _forces_one_window(options: dict[str, Any], config: Any) -> bool:
    forced = options.get("force_unique_generate_call")
    if forced is None:
        forced = getattr(config, "force_unique_generate_call", False)
    return bool(forced)


def _language(scope: CallScope, decode: EngineDecode) -> LanguageDetection | None:
    """The position of the detected language in the prompt; None if it is ambiguous."""
    if len(scope.languages) != 1:
        return None
    start, ids = decode.config.decoder_start_token_id, decode.config.lang_to_id.values()
    prompt = decode.prompt
    starts = (prompt[0] == start).nonzero().flatten().tolist()
    if not starts or starts[-1] + 1 >= prompt.shape[1]:
        return None
    position = starts[-1] + 1
    detected = scope.languages[0]
    if not torch.equal(
        prompt[:, position], detected.repeat_interleave(prompt.shape[0] // detected.shape[0])
    ):
        return None
    return LanguageDetection(position, start, torch.tensor(sorted(ids), device=prompt.device))


def _same(ours: Any, stock: Any) -> bool:
    if isinstance(stock, torch.Tensor):
        return isinstance(ours, torch.Tensor) and _same_tensor(ours, stock)
    return (
        type(ours) is type(stock)
        and list(ours.keys()) == list(stock.keys())
        and _same_tensor(ours.sequences, stock.sequences)
    )


def _same_tensor(ours: torch.Tensor, stock: torch.Tensor) -> bool:
    return ours.dtype == stock.dtype and ours.device == stock.device and torch.equal(ours, stock)


def _rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_rng(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class OutputFormat:
    """Conversion of sequences `[B, P + N]` to what `generate` returns.

    Args:
        prompt: P, the length of the prompt.
        eos, pad: ids of the end and padding tokens.
        timestamp_begin: id of the first timestamp token.
        one_window: a single window was forced; sequences are returned unchanged.
    """

    prompt: int
    eos: int
    pad: int
    timestamp_begin: int
    one_window: bool

    def lengths(self, decoded: DecodeOutput) -> np.ndarray | None:
        """Generated tokens of each row, int64 `[B]`; None if stock must process the result."""
        ids = decoded.sequences[:, self.prompt :].cpu().numpy()
        lengths = np.full(ids.shape[0], ids.shape[1])
        padding = (ids == self.pad).sum(axis=1) - (self.pad == self.eos)
        lengths -= np.where(ids[:, -1] == self.pad, padding, 0)
        if lengths.min() < 1:
            return None
        lengths -= ids[np.arange(ids.shape[0]), lengths - 1] == self.eos
        return lengths if self._is_last_window(ids, lengths) else None

    def sequences(self, decoded: DecodeOutput) -> torch.Tensor | None:
        """The ids that `generate` returns, int64 `[B, longest]`; None as in `lengths`."""
        if self.one_window:
            return decoded.sequences
        lengths = self.lengths(decoded)
        if lengths is None:
            return None
        longest = int(lengths.max())
        ids = decoded.sequences[:, self.prompt : self.prompt + longest]
        if self.pad == self.eos:
            return ids.contiguous()
        positions = torch.arange(longest, device=ids.device)
        ends = torch.from_numpy(lengths).to(ids.device)
        return ids.where(positions < ends[:, None], self.pad)

    def _is_last_window(self, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether every row with a pair of timestamps ends in a single one, so that stock stops."""
        is_timestamp = ids >= self.timestamp_begin
        if not is_timestamp.any():
            return True
        for flags, length in zip(is_timestamp, lengths, strict=True):
            row = flags[:length]
            has_pair = bool((row[:-1] & row[1:]).any())
            if has_pair and row[-2:].tolist() != [False, True]:
                return False
        return True
