"""Memory-efficient attention on tensors: back-ends, the choice among them, and its reasons.

This package defines what attention computes (masks, causality, dropout, gradients) and which
library computes it where. It works on tensors [B, L, H, D] and knows no model, file or audio.
"""

from whisper_flash_attention.flash_attention.backends import attention_weights
from whisper_flash_attention.flash_attention.dispatch import (
    BACKENDS,
    SurveyRow,
    attend,
    backend_names,
    explain,
    pick,
    preference,
    survey,
)
from whisper_flash_attention.flash_attention.problem import (
    AttentionInputs,
    AttentionProblem,
    Backend,
    MaskKind,
)

__all__ = [
    "BACKENDS",
    "AttentionInputs",
    "AttentionProblem",
    "Backend",
    "MaskKind",
    "SurveyRow",
    "attend",
    "attention_weights",
    "backend_names",
    "explain",
    "pick",
    "preference",
    "survey",
]
