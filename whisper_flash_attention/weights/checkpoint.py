"""A checkpoint in Transformers' terms, and the checks that every converted one must pass."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.tokens import BEGIN_OF_SEQUENCE, SpecialTokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, WhisperConfig

Shape = tuple[int, ...]
# What becomes of a tensor as it is read, such as a copy on another device or in another dtype.
Convert = Callable[[torch.Tensor], torch.Tensor]

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a Whisper, by the names that `WhisperConfig` gives them; its defaults, too."""

    vocab_size: int = 51865
    d_model: int = 384
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448
    encoder_layers: int = 4
    decoder_layers: int = 4
    encoder_attention_heads: int = 6
    decoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536


@dataclass(frozen=True)
class Checkpoint:
    """Weights with everything that `WhisperForConditionalGeneration` needs to run them.

    Attributes:
        source: where it came from, as the caller named it.
        format: "openai", "ctranslate2" or "transformers".
        dimensions: the model's sizes.
        generation: what its `generation_config.json` holds or would hold: special ids, suppress
            lists, languages, tasks and alignment heads.
        state_dict: parameters by their names in `WhisperForConditionalGeneration.state_dict()`,
            all of one floating dtype (that of the file; float32 for quantised files);
            `proj_out.weight` is the tensor of the token embeddings.
        is_int8: whether the file holds 8-bit weights.
    """

    source: str
    format: str
    dimensions: Dimensions
    generation: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    is_int8: bool = False

    @cached_property
    def config(self) -> WhisperConfig:
        """Dimensions and special ids, for Transformers."""
        from transformers import WhisperConfig

        tokens = SpecialTokens.of_vocabulary(self.dimensions.vocab_size)
        assert tokens is not None
        return WhisperConfig(
            **asdict(self.dimensions),
            bos_token_id=BEGIN_OF_SEQUENCE,
            eos_token_id=tokens.end_of_text,
            pad_token_id=tokens.end_of_text,
            decoder_start_token_id=tokens.start_of_transcript,
            begin_suppress_tokens=list(tokens.suppressed_at_begin),
        )

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """`generation`, for Transformers."""
        from transformers import GenerationConfig

        return GenerationConfig(**self.generation)


# The most that a dimension may be; large-v3 has 1280 columns and 32 layers. Products of these
# numbers stay far from what PyTorch's sizes can hold.
LARGEST = {
    "vocab_size": 1 << 20,
    "d_model": 1 << 14,
    "num_mel_bins": 1 << 10,
    "max_source_positions": 1 << 16,
    "max_target_positions": 1 << 16,
    "encoder_layers": 1 << 10,
    "decoder_layers": 1 << 10,
    "encoder_attention_heads": 1 << 10,
    "decoder_attention_heads": 1 << 10,
    "encoder_ffn_dim": 1 << 17,
    "decoder_ffn_dim": 1 << 17,
}
DIMENSIONS = tuple(field.name for field in fields(Dimensions))


def check_limits(source: str, config: Any) -> None:
    """Refuse sizes of which building the modules alone would take for ever.

    Raises:
        WeightsError: a dimension is many times that of any Whisper.
    """
    for name, most in LARGEST.items():
        value = getattr(config, name)
        if isinstance(value, int) and value > most:
            raise WeightsError(f"{source}: {name} is {shorten(value)}, expected up to {most}")


def check_dimensions(source: str, dimensions: Mapping[str, Any]) -> None:
    """Check the sizes of a model before anything is allocated for it.

    Args:
        source: file, for messages.
        dimensions: values by the names in `DIMENSIONS`, all of them.

    Raises:
        WeightsError: a dimension is no positive whole number, too large for any Whisper, or the
            width is odd or not a multiple of the heads.
    """
    for name, most in LARGEST.items():
        value = dimensions[name]
        if type(value) is not int:
            raise WeightsError(f"{source}: {name} is {shorten(value)}, expected a whole number")
        if not 1 <= value <= most:
            raise WeightsError(
                f"{source}: {name} is {shorten(value)}, expected a positive number up to {most}"
            )
    width = dimensions["d_model"]
    if width % 2 or width < 4:  # The encoder's positions are sines and cosines, half and half.
        raise WeightsError(f"{source}: d_model is {width}, expected an even number from 4 on")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if width % dimensions[name]:
            raise WeightsError(f"{source}: {dimensions[name]} {name} do not divide {width} columns")


def make_dimensions(source: str, **sizes: int) -> tuple[Dimensions, SpecialTokens]:
    """Check sizes, and find the special tokens that follow from the vocabulary's.

    Raises:
        WeightsError: a dimension is not positive, the width is odd or not a multiple of the heads,
            or the vocabulary is not one of Whisper's.
    """
    check_dimensions(source, sizes)
    tokens = SpecialTokens.of_vocabulary(sizes["vocab_size"])
    if tokens is None:
        raise WeightsError(
            f"{source}: a vocabulary of {sizes['vocab_size']} tokens, expected 51864 "
            "(English-only), 51865 (multilingual) or 51866 (large-v3): the special tokens of "
            "others are unknown"
        )
    return Dimensions(**sizes), tokens


def parameter_shapes(config: Any) -> dict[str, Shape]:
    """Shapes by name of all parameters of `WhisperForConditionalGeneration`, tied ones once.

    Args:
        config: `Dimensions`, or a `WhisperConfig`.
    """
    width = config.d_model
    shapes: dict[str, Shape] = {
        "model.encoder.conv1.weight": (width, config.num_mel_bins, 3),
        "model.encoder.conv1.bias": (width,),
        "model.encoder.conv2.weight": (width, width, 3),
        "model.encoder.conv2.bias": (width,),
        "model.encoder.embed_positions.weight": (config.max_source_positions, width),
        "model.decoder.embed_tokens.weight": (config.vocab_size, width),
        "model.decoder.embed_positions.weight": (config.max_target_positions, width),
    }
    sides = (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim, ("self_attn",)),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim, ("self_attn", "encoder_attn")),
    )
    for side, layers, ffn, attentions in sides:
        shapes |= _norm(f"model.{side}.layer_norm", width)
        for layer in range(layers):
            prefix = f"model.{side}.layers.{layer}"
            for attention in attentions:
                shapes |= _norm(f"{prefix}.{attention}_layer_norm", width)
                for part in ("q", "k", "v", "out"):
                    shapes |= _linear(f"{prefix}.{attention}.{part}_proj", width, width)
                del shapes[f"{prefix}.{attention}.k_proj.bias"]  # Whisper's keys have no bias.
            shapes |= _norm(f"{prefix}.final_layer_norm", width)
            shapes |= _linear(f"{prefix}.fc1", width, ffn)
            shapes |= _linear(f"{prefix}.fc2", ffn, width)
    return shapes


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def check_shapes(source: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Require exactly the expected tensors; the error lists the first that are wrong.

    Raises:
        WeightsError: tensors are missing, unexpected or have the wrong shape.
    """
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [shorten(name) for name in found if name not in expected]),
        ("of the wrong shape", wrong),
    )
    report = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in problems if names)
    if report:
        raise WeightsError(f"{source}: not the tensors of a Whisper of this size ({report})")


def _first(names: list[str], limit: int = 3) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shorten(value: object, limit: int = 80) -> str:
    """Describe a value from a file, safe to print: escaped, and cut to a line."""
    # `str` of deeply nested lists recurses; `reprlib` stops early.
    text = reprlib.repr(value) if isinstance(value, dict | list | tuple) else str(value)
    escaped = text[: 2 * limit].encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else f"{escaped[: limit - 3]}..."


def assemble(
    source: str,
    layout: str,
    dimensions: Dimensions,
    generation: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> Checkpoint:
    """Unify the dtypes, tie the output projection and wrap everything up."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        for name in tensors:  # one by one, so that no second copy of all of them exists
            tensors[name] = tensors[name].float()
    state = tensors | {"proj_out.weight": tensors["model.decoder.embed_tokens.weight"]}
    return Checkpoint(source, layout, dimensions, generation, state)
