"""Registration of the back-ends as attention implementations of Transformers.

Transformers refuses registered names with "flash" in them, has checks of its own for names with
"sdpa" or "flex_attention", and treats a "/" as a kernel of the Hub. It also drops every mask,
padding included, for a name that is not registered for masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from whisper_flash_attention.errors import OptionError, UnsupportedAttention
from whisper_flash_attention.flash_attention.backends import Reference
from whisper_flash_attention.flash_attention.dispatch import attend, backend_names
from whisper_flash_attention.flash_attention.problem import AttentionInputs

TRANSFORMERS_NAMES = {
    "auto": "wfa_auto",
    "reference": "wfa_reference",
    "sdpa_flash": "wfa_torch_fa",
    "sdpa_cudnn": "wfa_torch_cudnn",
    "sdpa_efficient": "wfa_torch_efficient",
    "xformers": "wfa_xformers",
    "flash_attn": "wfa_fa_package",
}

# Arguments of Transformers that change the result and that no back-end here supports.
UNSUPPORTED_ARGUMENTS = ("softcap", "position_bias", "cache", "s_aux")


# What Transformers calls: q, k, v are [B, H, L, D], the output is [B, Lq, H, D].
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def to_transformers_name(name: str) -> str:
    """The name of back-end `name` in Transformers' registries and configurations.

    Raises:
        OptionError: there is no such back-end.
    """
    if name not in TRANSFORMERS_NAMES:
        names = ", ".join(backend_names())
        raise OptionError(f"there is no attention back-end {name!r}; there are {names}")
    return TRANSFORMERS_NAMES[name]


def from_transformers_name(name: str) -> str | None:
    """The back-end registered in Transformers by a name; None for names of others."""
    return next((ours for ours, theirs in TRANSFORMERS_NAMES.items() if theirs == name), None)


def register_backends() -> None:
    """Register every back-end and its masks in Transformers; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from whisper_flash_attention.hf.compat import sdpa_mask

    # Dynamo would trace the cached choice and warn; compilers below it only call the function.
    torch.compiler.allow_in_graph(attend)  # type: ignore[no-untyped-call]  # it has no types
    for backend, name in TRANSFORMERS_NAMES.items():
        AttentionInterface.register(name, attention_function(backend))
        AttentionMaskInterface.register(name, sdpa_mask)


@lru_cache
def attention_function(backend: str) -> AttentionFunction:
    """The function that Transformers calls for `backend`; always the same object."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        _refuse_unsupported(backend, kwargs)
        q_len = query.shape[2]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = q_len > 1 and attention_mask is None and causal
        if causal and key.shape[2] > q_len:
            # The prompt on an empty static cache; positions after it are not written yet.
            key, value = key[:, :, :q_len], value[:, :, :q_len]
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if output_attentions:
            # No fused kernel keeps its weights.
            inputs = AttentionInputs(q, k, v, causal, attention_mask, scaling, dropout)
            return Reference().run_with_weights(inputs)
        options: dict[str, Any] = {"causal": causal, "mask": attention_mask, "scale": scaling}
        return attend(q, k, v, **options, dropout=dropout, backend=backend), None

    return attention


def _refuse_unsupported(backend: str, kwargs: dict[str, Any]) -> None:
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(
                f"attention back-end {backend} does not compute {name!r}, which this model "
                "requests: choose attn_implementation='eager' or 'sdpa'"
            )
