"""Why a call of `generate` runs on Transformers' own decode loop.

Each reason is logged once, by the logger `whisper_flash_attention`: at level INFO where it is an
option of the call, at level WARNING where it is the state of the model, of which the user may not
be aware. This module imports neither Transformers nor PyTorch, so that `doctor` can list the
reasons without them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger("whisper_flash_attention")


class FallbackReason(StrEnum):
    """The kinds of reasons; the values are what a user reads."""

    ATTENTION = "an attention back-end was chosen by name; the engine has its own"
    INTERNALS = "attention weights or hidden states were requested"
    CACHE = "a cache was passed or its kind was chosen"
    NO_CACHE = "use_cache=False was passed"
    MASK = "the decoder's prompts are padded"
    INPUT = "the decoder gets an input that the engine does not take"
    ENCODER = "the encoder's output was passed in a form that the engine does not take"
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


FALLBACK_REASONS: tuple[str, ...] = tuple(reason.value for reason in FallbackReason)
"""Every reason for which a call may run on Transformers' own decode loop."""

_MODEL_STATE = frozenset(
    {
        FallbackReason.TRAINING,
        FallbackReason.AUTOCAST,
        FallbackReason.MODE,
        FallbackReason.MODULES,
    }
)
_logged: set[str] = set()


@dataclass(frozen=True)
class Fallback:
    """The decision that Transformers' own loop runs a call: the reason, and what was found."""

    reason: FallbackReason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


def log_once(fallback: Fallback) -> None:
    """Log a fallback the first time that it occurs in this process."""
    sentence = str(fallback)
    if sentence in _logged:
        return
    _logged.add(sentence)
    level = logging.WARNING if fallback.reason in _MODEL_STATE else logging.INFO
    logger.log(level, "generate runs on Transformers' own decode loop: %s", sentence)
