"""Every name of Transformers that is used beyond its documented interface.

All of them are imported here and nowhere else: `check` compares their signatures with those of
releases 5.17 to 5.24, and `tests/contract/` tests them and their behaviour with the installed one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers import WhisperForConditionalGeneration as StockWhisper
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WhisperNoSpeechDetection,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import (
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperDecoder,
    WhisperDecoderLayer,
    WhisperEncoder,
    WhisperEncoderLayer,
    WhisperModel,
    WhisperPositionalEmbedding,
)

from whisper_flash_attention.errors import IncompatibleTransformers

__all__ = [
    "ACT2FN",
    "CACHE",
    "CACHE_NAMES",
    "DECODE_STEPS",
    "ENCODER_STEPS",
    "REQUIRED_PARAMETERS",
    "SORTS_SAMPLED_BEAMS",
    "SUPPORTED",
    "BaseModelOutput",
    "Cache",
    "DynamicLayer",
    "EosTokenCriteria",
    "GenerateBeamEncoderDecoderOutput",
    "GenerateEncoderDecoderOutput",
    "GenerationMode",
    "MaxLengthCriteria",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "StockWhisper",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "WhisperAttention",
    "WhisperDecoder",
    "WhisperDecoderLayer",
    "WhisperEncoder",
    "WhisperEncoderLayer",
    "WhisperModel",
    "WhisperNoSpeechDetection",
    "WhisperPositionalEmbedding",
    "WhisperTimeStampLogitsProcessor",
    "check",
    "sdpa_mask",
]

# The releases that the contract tests pass with; pyproject.toml states the same range.
SUPPORTED = ">=5.17,<5.25"
INSTALLED = tuple(map(int, transformers.__version__.split(".")[:2]))

# The key/value cache, as an argument of forward methods and `generate` and as a field of their
# outputs: renamed in 5.24, which accepts the older name with a warning.
CACHE_NAMES = ("past_key_values", "cache")
CACHE = "cache" if INSTALLED >= (5, 24) else "past_key_values"

# Since 5.24, sampled beam search sorts the drawn candidates by score; only the first `num_beams`
# of them may finish.
SORTS_SAMPLED_BEAMS = INSTALLED >= (5, 24)

# The loops of `generate` that the engine replaces.
DECODE_STEPS = ("_sample", "_beam_search")

# The step of `generate` that runs the encoder, by its older and its newer name.
ENCODER_STEPS = (
    "_prepare_encoder_decoder_kwargs_for_generation",
    "_prepare_text_encoder_decoder_kwargs_for_generation",
)

# Functions that are called or overridden -> names of the parameters that they must have.
REQUIRED_PARAMETERS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
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
    "GenerationMixin._sample": (
        GenerationMixin._sample,
        (
            "input_ids",
            "logits_processor",
            "stopping_criteria",
            "generation_config",
            "synced_gpus",
            "streamer",
            "model_kwargs",
        ),
    ),
    "GenerationMixin._beam_search": (
        GenerationMixin._beam_search,
        ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus"),
    ),
    "WhisperForConditionalGeneration.forward": (
        StockWhisper.forward,
        ("input_features", "decoder_input_ids", "encoder_outputs", CACHE, "use_cache"),
    ),
    "WhisperDecoder.forward": (
        WhisperDecoder.forward,
        ("input_ids", "encoder_hidden_states", CACHE, "use_cache"),
    ),
    "GenerateEncoderDecoderOutput": (
        GenerateEncoderDecoderOutput,
        ("sequences", "scores", "logits", CACHE),
    ),
    "GenerateBeamEncoderDecoderOutput": (
        GenerateBeamEncoderDecoderOutput,
        ("sequences", "sequences_scores", "scores", "logits", "beam_indices", CACHE),
    ),
    "WhisperGenerationMixin.generate": (
        WhisperGenerationMixin.generate,
        ("self", "input_features", "return_token_timestamps", "force_unique_generate_call"),
    ),
    "WhisperGenerationMixin.detect_language": (
        WhisperGenerationMixin.detect_language,
        ("input_features", "encoder_outputs", "generation_config", "num_segment_frames"),
    ),
    "WhisperGenerationMixin._postprocess_outputs": (
        WhisperGenerationMixin._postprocess_outputs,
        ("seek_outputs", "decoder_input_ids", "is_shortform"),
    ),
    "WhisperNoSpeechDetection.__call__": (
        WhisperNoSpeechDetection.__call__,
        ("self", "input_ids", "scores"),
    ),
    **{
        f"GenerationMixin.{name}": (
            getattr(GenerationMixin, name),
            ("inputs_tensor", "model_kwargs", "model_input_name", "generation_config"),
        )
        for name in ENCODER_STEPS
        if hasattr(GenerationMixin, name)
    },
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
    """Raise `IncompatibleTransformers` if a function lacks a parameter that is used here."""
    if not any(hasattr(GenerationMixin, name) for name in ENCODER_STEPS):
        raise IncompatibleTransformers(
            f"transformers {transformers.__version__} has no step {' or '.join(ENCODER_STEPS)}; "
            f"install transformers{SUPPORTED}"
        )
    for name, (function, wanted) in REQUIRED_PARAMETERS.items():
        found = inspect.signature(function).parameters
        if missing := [parameter for parameter in wanted if parameter not in found]:
            raise IncompatibleTransformers(
                f"transformers {transformers.__version__}: {name} has no parameter "
                f"{', '.join(missing)}; "
                f"install transformers{SUPPORTED}"
            )
