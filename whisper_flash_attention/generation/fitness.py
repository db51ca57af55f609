"""Whether the engine may stand in for the model: nothing may be in or around its modules.

The engine reads weights and calls no module, so adapters, quantised layers, hooks and replaced
`forward` methods would be skipped without a word. Looking through all modules takes longer than a
small model's whole decode, so the answer is kept while the engine finds the parameters, children
and hooks unchanged and no module gained or lost an attribute (a `forward` of its own, say).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from whisper_flash_attention.compat import StockWhisper
from whisper_flash_attention.engine.loop import Engine
from whisper_flash_attention.engine.weights import why_not as why_not_weights
from whisper_flash_attention.flash_attention import to_transformers_name
from whisper_flash_attention.generation.handover import Handover, Reason

AUTOMATIC = to_transformers_name("auto")
# Methods of the model that the engine replaces without calling them.
REPLACED = ("forward", "prepare_inputs_for_generation", "get_encoder", "get_decoder")
DROPPING = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "apply_spec_augment",
)


@dataclass(frozen=True)
class _Inspected:
    """A model that was found plain: its engine, and how many attributes each module had."""

    engine: Engine
    attributes: list[dict[str, Any]]
    sizes: list[int]

    def same_attributes(self) -> bool:
        return list(map(len, self.attributes)) == self.sizes

    def is_training(self) -> bool:
        return any(map(itemgetter("training"), self.attributes))


_inspected: WeakKeyDictionary[Any, _Inspected] = WeakKeyDictionary()


def engine_for(model: Any) -> Engine | Handover:
    """The model's engine, or why the engine must not run this model as it is now."""
    if model.config._attn_implementation != AUTOMATIC:
        return Handover(Reason.ATTENTION, repr(model.attention_backend))
    found = _known(model) or _inspect(model)
    if isinstance(found, Handover):
        return found
    if torch.is_autocast_enabled(found.engine.weights.device.type):
        return Handover(Reason.AUTOCAST)
    if found.is_training() and any(getattr(model.config, name, 0) for name in DROPPING):
        return Handover(Reason.TRAINING)
    return found.engine


def _known(model: Any) -> _Inspected | None:
    """What was found out about the model, if it is still as it was."""
    known = _inspected.get(model)
    if known is None or not known.same_attributes():
        return None
    # A module that was replaced meanwhile may lack what the engine reads.
    with suppress(AttributeError):
        if Engine.of(model) is known.engine:
            return known
    return None


def _inspect(model: Any) -> _Inspected | Handover:
    found = _overridden(model.__class__) or why_not_weights(model)
    if found is not None:
        _inspected.pop(model, None)
        Engine.forget(model)
        return Handover(Reason.MODULES, found)
    attributes = [vars(module) for module in model.modules()]
    inspected = _Inspected(Engine.of(model), attributes, list(map(len, attributes)))
    _inspected[model] = inspected
    return inspected


@lru_cache
def _overridden(model_class: type) -> str | None:
    for name in REPLACED:
        if getattr(model_class, name) is not getattr(StockWhisper, name):
            return f"{model_class.__name__} has a {name} of its own"
    return None
