"""What one `generate` call remembers while Transformers' code runs it: states, and its decodes.

Stock Whisper runs the encoder again at every temperature and once more to detect the language.
Within one call, equal features are encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.request import Decoded, Request


@dataclass(frozen=True)
class Decode:
    """One decode by the engine on behalf of `_sample`.

    `repeatable` says that another call with the same options asks the engine for the same, whatever
    the audio.
    """

    prompt: torch.Tensor
    request: Request
    states: torch.Tensor
    decoded: Decoded
    config: Any
    repeatable: bool


@dataclass
class Scope:
    """The memory of one `generate` call."""

    decodes: list[Decode] = field(default_factory=list)
    languages: list[torch.Tensor] = field(default_factory=list)
    handed_over: bool = False
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


_current: ContextVar[Scope | None] = ContextVar("whisper_flash_attention_generate", default=None)


@contextmanager
def call_scope(options: dict[str, Any] | None = None) -> Iterator[Scope]:
    """A new memory, for the time of one `generate` call with these options."""
    scope = Scope(options=options)
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def current_scope() -> Scope:
    """The running call's memory; outside `generate` a fresh one that nobody reads."""
    return _current.get() or Scope()
