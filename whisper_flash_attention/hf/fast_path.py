"""Plain calls of `generate`: one window per clip, no options but common ones.

Transformers spends longer on preparing a call than the engine on decoding it with a small model.
All of that preparation follows from the options, the configuration and the batch size, so the
first call of a kind goes the whole way through Transformers; what it asked the engine for is kept,
and the next call of this kind asks for the same directly. A call is kept only if its result, made
anew the short way, equals what Transformers returned. What Transformers says about options in its
log, it says at the first call.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from contextlib import suppress
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
from whisper_flash_attention.hf.decode_hooks import Decode, Scope, as_dictionary, call_scope
from whisper_flash_attention.hf.eligibility import (
    ModelChanged,
    check_reached,
    confirm,
    options_of,
    takes,
    trusted_engine,
)

# Options that decide nothing but the prompt, the rules, the lengths and the form of the output.
OPTIONS = frozenset(
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
SIMPLE = (type(None), bool, int, float, str, list, tuple)
MOST_CALLS = 64


@dataclass(frozen=True)
class Language:
    """Detection of the language: stock's, on the states that are there already.

    Args:
        place: where the language's token stands in the prompt.
        start: the token after which the languages are compared.
        ids: the languages' tokens, ascending, int64 `[N]`.
    """

    place: int
    start: int
    ids: torch.Tensor

    def detect(self, engine: Engine, states: torch.Tensor) -> torch.Tensor:
        """The likeliest language's token for every clip of states `[B, S, D]`, int64 `[B]`."""
        return self.ids[engine.language_logits(states, self.start, self.ids).argmax(dim=-1)]


@dataclass(frozen=True)
class PreparedCall:
    """What calls of one kind ask the engine for, and what becomes of its answer."""

    prompt: torch.Tensor
    request: Request
    finish: Finish
    as_dictionary: bool
    language: Language | None

    def run(self, model: Any, engine: Engine, features: torch.Tensor) -> Any:
        """What `generate` returns for features `[B, mel bins, frames]`.

        None if Transformers would go on to a second window; random numbers are then as before.

        Args:
            engine: from `trusted_engine`; the model is looked at while the device works.

        Raises:
            ModelChanged: this engine must not run the model any more; random numbers are as before.
        """
        before = _random_state(features.device) if self.request.sample else None
        try:
            result = self._decoded(model, engine, features)
        except Exception:  # of weights that are the model's no more, say
            if before is not None:
                _restore(features.device, before)
            confirm(model, engine)
            raise
        if result is None and before is not None:
            _restore(features.device, before)
        return result

    def _decoded(self, model: Any, engine: Engine, features: torch.Tensor) -> Any:
        states = engine.encode(features)
        prompt = self.prompt
        if self.language is not None:
            prompt = prompt.clone()
            found = self.language.detect(engine, states)
            prompt[:, self.language.place] = found.repeat_interleave(
                prompt.shape[0] // found.shape[0]
            )
        decoded = engine.decode(
            states, prompt, self.request, meanwhile=lambda: confirm(model, engine)
        )
        return self.result(model, states, decoded)

    def result(self, model: Any, states: torch.Tensor, decoded: Any) -> Any:
        """The output for one decode; None as in `run`."""
        if not self.as_dictionary:
            return self.finish.sequences(decoded)
        if not self.finish.one_window and self.finish.lengths(decoded) is None:
            return None
        return as_dictionary(model, states, decoded)


_prepared: WeakKeyDictionary[Any, dict[bytes, PreparedCall]] = WeakKeyDictionary()


def forget(model: Any) -> None:
    """Drop the calls that were prepared for a model."""
    _prepared.pop(model, None)


def generate(
    model: Any, stock: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Whisper's `generate`: the short way where a call of this kind was prepared, else stock's.

    Args:
        stock: runs Transformers' `generate` with these arguments.
        args, kwargs: the arguments of `generate`.
    """
    features, key = _kind(model, args, kwargs)
    calls = _prepared.setdefault(model, {})
    prepared = None if key is None else calls.get(key)
    if prepared is not None:
        engine = trusted_engine(model)
        if engine is not None:
            with torch.no_grad(), suppress(ModelChanged):
                result = prepared.run(model, engine, features)
                if result is not None:
                    return result
    options = options_of(args, kwargs)
    with call_scope(options) as scope:
        result = stock()
    if not scope.decodes and not scope.handed_over:
        check_reached(model, options)
    if key is not None and prepared is None:
        prepared = _prepare(model, scope, kwargs, result)
        if prepared is not None:
            if len(calls) >= MOST_CALLS:
                calls.clear()
            calls[key] = prepared
    return result


def _kind(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bytes | None]:
    """The features, and everything that preparation depends on as one key; None if not plain."""
    options = dict(kwargs)
    features = args[0] if args else options.pop("input_features", None)
    if len(args) > 1 or not takes(model, features) or _is_customised(model):
        return features, None
    mask = options.pop("attention_mask", None)
    # Whisper ignores the mask here; one that is not as expected is for Transformers to refuse.
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
        name in OPTIONS
        and type(value) in SIMPLE
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
        # Settings of the model that `generate` reads or complains of.
        (len(vars(model.config)), getattr(model.config, "forced_decoder_ids", None)),
        model.cross_attention,
    )
    try:
        # Exact where `==` is not (True, 1 and 1.0 differ); fails for anything that is not plain.
        return features, marshal.dumps(parts, 2)
    except ValueError:
        return features, None


def _is_customised(model: Any) -> bool:
    """Whether a method, `generate` aside, is not this package's or stock Whisper's own.

    A prepared call runs none of the methods that prepared it.
    """
    model_class = type(model)
    now = list(chain.from_iterable(vars(each).values() for each in model_class.__mro__))
    known = _classes.get(model_class)
    if known is None or len(known.members) != len(now) or any(map(is_not, now, known.members)):
        known = _classes[model_class] = _Class(now, _has_own_methods(model_class))
    return known.customised or not vars(model).keys().isdisjoint(_METHODS)


class _Class(NamedTuple):
    """All that a class and its bases hold, and whether that is not this package's own."""

    members: list[Any]
    customised: bool


_classes: WeakKeyDictionary[type, _Class] = WeakKeyDictionary()
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


def _prepare(model: Any, scope: Scope, options: dict[str, Any], result: Any) -> PreparedCall | None:
    """What Transformers made of a call, if the next one of its kind can do without it."""
    if scope.handed_over or len(scope.decodes) != 1 or not scope.decodes[0].repeatable:
        return None
    decode = scope.decodes[0]
    if decode.request.beams is not None and isinstance(result, dict):
        # Stock keeps the cache of some beams only, as it happens.
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
        finish=Finish(
            prompt=decode.prompt.shape[1],
            eos=config.eos_token_id,
            pad=config.pad_token_id,
            timestamp_begin=no_timestamps + 1,
            one_window=one_window,
        ),
        as_dictionary=isinstance(result, dict),
        language=language,
    )
    again = prepared.result(model, decode.states, decode.decoded)
    return prepared if _same(again, result) else None


def _forces_one_window(options: dict[str, Any], config: Any) -> bool:
    forced = options.get("force_unique_generate_call")
    if forced is None:
        forced = getattr(config, "force_unique_generate_call", False)
    return bool(forced)


def _language(scope: Scope, decode: Decode) -> Language | None:
    """Where the detected language stands in the prompt; None unless that is clear."""
    if len(scope.languages) != 1:
        return None
    start, ids = decode.config.decoder_start_token_id, decode.config.lang_to_id.values()
    prompt = decode.prompt
    places = (prompt[0] == start).nonzero().flatten().tolist()
    if not places or places[-1] + 1 >= prompt.shape[1]:
        return None
    place = places[-1] + 1
    detected = scope.languages[0]
    if not torch.equal(
        prompt[:, place], detected.repeat_interleave(prompt.shape[0] // detected.shape[0])
    ):
        return None
    return Language(place, start, torch.tensor(sorted(ids), device=prompt.device))


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


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class Finish:
    """How sequences `[B, P + N]` become what `generate` returns.

    Args:
        prompt: P, the length of the prompt.
        eos, pad: the ids of the end and of the padding.
        timestamp_begin: the first timestamp's id.
        one_window: a single window was forced, and the sequences are returned as they are.
    """

    prompt: int
    eos: int
    pad: int
    timestamp_begin: int
    one_window: bool

    def lengths(self, decoded: DecodeOutput) -> np.ndarray | None:
        """Tokens of each row's answer, int64 `[B]`; None if stock would go on or do otherwise."""
        ids = decoded.sequences[:, self.prompt :].cpu().numpy()
        lengths = np.full(ids.shape[0], ids.shape[1])
        padding = (ids == self.pad).sum(axis=1) - (self.pad == self.eos)
        lengths -= np.where(ids[:, -1] == self.pad, padding, 0)
        if lengths.min() < 1:
            return None
        lengths -= ids[np.arange(ids.shape[0]), lengths - 1] == self.eos
        return lengths if self._is_last_window(ids, lengths) else None

    def sequences(self, decoded: DecodeOutput) -> torch.Tensor | None:
        """The ids that `generate` returns, `[B, longest]` int64; None if stock must do it."""
        if self.one_window:
            return decoded.sequences
        lengths = self.lengths(decoded)
        if lengths is None:
            return None
        longest = int(lengths.max())
        ids = decoded.sequences[:, self.prompt : self.prompt + longest]
        if self.pad == self.eos:
            return ids.contiguous()
        places = torch.arange(longest, device=ids.device)
        ends = torch.from_numpy(lengths).to(ids.device)
        return ids.where(places < ends[:, None], self.pad)

    def _is_last_window(self, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether no row holds a pair of timestamps, or each that does ends in a single one."""
        stamps = ids >= self.timestamp_begin
        if not stamps.any():
            return True
        for row, length in zip(stamps, lengths, strict=True):
            answer = row[:length]
            has_pair = bool((answer[:-1] & answer[1:]).any())
            if has_pair and answer[-2:].tolist() != [False, True]:
                return False
        return True
