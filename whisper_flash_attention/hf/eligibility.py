"""Whether the engine may stand in for the model as it is now.

`stock_modules` compares every module with what stock Whisper has. That takes longer than a small
model's whole decode, so the outcome is kept. Before each call it is checked that nothing which was
compared has changed: types, children, parameters, hooks, attributes, the configuration, and the
functions of all classes that are involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain, repeat
from operator import contains, is_not, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.hf import stock_modules
from whisper_flash_attention.hf.attention_registry import to_transformers_name
from whisper_flash_attention.hf.handover import Handover, Reason
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
