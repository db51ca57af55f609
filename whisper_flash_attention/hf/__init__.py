"""Where Transformers' `generate` meets the decode engine, and why a call may not reach it.

`decode_hooks` is the seam in Transformers' `generate`, `fast_path` the short cut around it for
plain calls, and `eligibility` decides whether the engine may run a call. A call that it cannot run
exactly falls back to Transformers' own decode loop. The reason is logged once, by the logger
`whisper_flash_attention`: at level INFO where it is an option of the call, at level WARNING where
it is the state of the model, of which the user may not be aware.

This package knows Transformers and the engine; it must not know kernels, files or text. The module
itself imports neither, so that `doctor` can list the reasons without them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger("whisper_flash_attention")


class Reason(StrEnum):
    """The kinds of reasons; the values are what a user reads."""

    ATTENTION = "an attention back-end was chosen by name; the engine has its own"
    INTERNALS = "attention weights or hidden states were asked for"
    CACHE = "a cache was given or its kind was chosen"
    NO_CACHE = "use_cache=False was asked for"
    MASK = "the decoder's prompts are padded"
    INPUT = "the decoder gets an input that the engine does not take"
    ENCODER = "the encoder's output was given in a form that the engine does not take"
    PROCESSOR = "a logits processor has no counterpart in the engine"
    CRITERION = "a stopping criterion has no counterpart in the engine"
    LOOP = "an option needs another decode loop of Transformers"
    LENGTH = "the output may be longer than the model's positions"
    ASSISTANT = "the model assists another one"
    SYNCED = "several GPUs decode in lockstep"
    TRAINING = "training mode changes what the model computes"
    AUTOCAST = "autocast is on"
    MODE = "something intercepts PyTorch's operations"
    MODULES = "the model is not plain Whisper any more"


HANDOVERS: tuple[str, ...] = tuple(reason.value for reason in Reason)
"""Every reason for which a call may run on Transformers' own decode loop."""

_OF_THE_MODEL = frozenset({Reason.TRAINING, Reason.AUTOCAST, Reason.MODE, Reason.MODULES})
_said: set[str] = set()


@dataclass(frozen=True)
class Handover:
    """One decision to hand over: the kind of reason, and what was found."""

    reason: Reason
    found: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.found})" if self.found else self.reason.value


def say(handover: Handover) -> None:
    """Log a handover, the first time that it occurs in this process."""
    sentence = str(handover)
    if sentence in _said:
        return
    _said.add(sentence)
    level = logging.WARNING if handover.reason in _OF_THE_MODEL else logging.INFO
    logger.log(level, "generate runs on Transformers' own decode loop: %s", sentence)
