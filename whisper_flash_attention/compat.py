"""Every Transformers name that we lean on beyond its documented interface.

All of them are imported here and nowhere else, so that a new Transformers release is judged in one
place: `check` compares the signatures with what was read from 5.17 to 5.23, and
`tests/contract/` runs it, and the behaviour behind it, against the installed version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import sdpa_mask
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from whisper_flash_attention.errors import IncompatibleTransformers

__all__ = ["PROMISES", "Cache", "DynamicLayer", "GenerationMode", "check", "sdpa_mask"]

# What we call or override -> the parameters that must be there, by name.
PROMISES: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "masking_utils.sdpa_mask": (
        sdpa_mask,
        ("batch_size", "q_length", "kv_length", "attention_mask", "allow_is_causal_skip"),
    ),
    "PreTrainedModel._check_and_adjust_attn_implementation": (
        PreTrainedModel._check_and_adjust_attn_implementation,
        ("self", "attn_implementation", "is_init_check"),
    ),
    "PreTrainedModel.set_attn_implementation": (
        PreTrainedModel.set_attn_implementation,
        ("self", "attn_implementation"),
    ),
    "GenerationMixin._prepare_cache_for_generation": (
        GenerationMixin._prepare_cache_for_generation,
        ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    ),
    "WhisperGenerationMixin.generate": (
        WhisperGenerationMixin.generate,
        ("self", "input_features", "return_token_timestamps"),
    ),
    "cache_utils.Cache.__init__": (Cache.__init__, ("self", "layer_class_to_replicate")),
    "cache_utils.DynamicLayer.update": (
        DynamicLayer.update,
        ("self", "key_states", "value_states"),
    ),
    "cache_utils.DynamicLayer.lazy_initialization": (
        DynamicLayer.lazy_initialization,
        ("self", "key_states", "value_states"),
    ),
}


def check() -> None:
    """Raise `IncompatibleTransformers` if a name in `PROMISES` lost a parameter that we use."""
    for name, (function, wanted) in PROMISES.items():
        found = inspect.signature(function).parameters
        if missing := [parameter for parameter in wanted if parameter not in found]:
            raise IncompatibleTransformers(
                f"transformers' {name} has no parameter {', '.join(missing)}; "
                "install transformers>=5.17,<5.24"
            )
