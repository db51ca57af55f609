"""Checks of a Transformers folder before Transformers reads it.

Transformers trusts its folders: it builds as many layers as `config.json` claims, follows the file
names of an index, waits for a named pipe. Here every file that it would open must be a regular
one, the configuration must describe a Whisper that the weight files can hold, and the headers of
the weight files must be true. Nothing is allocated for weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import (
    LARGEST,
    Dimensions,
    Shape,
    check_dimensions,
    shorten,
)
from whisper_flash_attention.weights.files import (
    JoinedFiles,
    check_regular,
    decode_json,
    read_json,
)
from whisper_flash_attention.weights.torch_archive import StoredTensor, TorchArchive

CONFIG, GENERATION = "config.json", "generation_config.json"
# Weight files in the order in which Transformers looks for them, without and with safetensors.
_SAFE_NAMES = ("model.safetensors", "model.safetensors.index.json")
_TORCH_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_LARGEST_INDEX = 4 << 20
_LARGEST_HEADER = 2 << 20  # large-v3's has 0.15 MB
_MOST_LEVELS = 32
# Bytes of an element; 4-bit and 6-bit types are not Whisper's.
_ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
}
# Parameters that need no room in the files: a model of 4-bit weights keeps two in a byte, and a
# small one may leave some to be initialised.
_PARAMETERS_PER_BYTE, _FREE_PARAMETERS = 2, 1 << 24

_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")


def check_folder(
    folder: Path,
    *,
    variant: str | None = None,
    safetensors: bool = True,
    config: bool = True,
    weights: bool = True,
) -> None:
    """Check the configuration and the weight files of a Transformers folder.

    Args:
        folder: the folder.
        variant: as in Transformers' `from_pretrained`: "fp16" for `model.fp16.safetensors`.
        safetensors: whether safetensors files take precedence over `pytorch_model.bin`.
        config, weights: whether these will be read from the folder.

    Raises:
        WeightsError: a file is missing, not regular, damaged, contradicts the configuration by
            size, or claims what would take more memory than a model of its size.
    """
    content = read_json(folder / CONFIG) if config else {}
    dimensions = check_config(str(folder / CONFIG), content) if config else None
    if os.path.lexists(folder / GENERATION):
        path = folder / GENERATION
        check_generation_config(str(path), read_json(path), dimensions)
    if not weights:
        return
    files = list(weight_files(folder, variant, safetensors, content.get("transformers_weights")))
    size = sum(_check_weights(path) for path in files)
    parameters = 0 if dimensions is None else count_parameters(dimensions)
    if parameters > _PARAMETERS_PER_BYTE * size + _FREE_PARAMETERS:
        raise WeightsError(
            f"{folder / CONFIG}: describes a model of {parameters} parameters, but the weight "
            f"files ({', '.join(path.name for path in files)}) have {size} bytes"
        )


# Configuration


# Other names of the same sizes; Transformers takes whichever it reads last.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
    "num_key_value_heads": "encoder_attention_heads",
}


def check_config(path: str, content: Mapping[str, Any]) -> dict[str, int]:
    """Check a `config.json` of Transformers' Whisper.

    Args:
        path: the file, for messages.
        content: its JSON object.

    Returns:
        The dimensions of the model, by the names in `checkpoint.DIMENSIONS`.

    Raises:
        WeightsError: a value is of the wrong type or out of range.
    """
    _check_levels(path, content)
    kind = content.get("model_type")
    if kind not in (None, "whisper"):
        raise WeightsError(f"{path}: a model of type {shorten(kind)}, expected whisper")
    defaults = asdict(Dimensions())
    dimensions = {name: content.get(name, default) for name, default in defaults.items()}
    check_dimensions(path, dimensions)
    for alias, name in ALIASES.items():
        if alias in content:
            check_dimensions(path, {**dimensions, name: content[alias]})
            dimensions[name] = max(dimensions[name], content[alias])
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        _check_number(path, content, name, 0, 1)
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        _check_number(path, content, name, 0, 1)
    _check_number(path, content, "init_std", 0, 1000)
    for name in ("scale_embedding", "use_cache", "is_encoder_decoder", "tie_word_embeddings"):
        _check_flag(path, content, name)
    width = content.get("median_filter_width", 7)
    if type(width) is not int or not 1 <= width <= 1001 or width % 2 == 0:
        raise WeightsError(f"{path}: median_filter_width is {shorten(width)}, expected an odd one")
    _check_activation(path, content.get("activation_function", "gelu"))
    for name in ("dtype", "torch_dtype"):
        dtype = content.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            raise WeightsError(
                f"{path}: {name} is {shorten(dtype)}, expected one of {', '.join(_DTYPES)}"
            )
    quantization = content.get("quantization_config")
    if quantization is not None and (
        not isinstance(quantization, dict) or not isinstance(quantization.get("quant_method"), str)
    ):
        raise WeightsError(f"{path}: quantization_config names no quant_method")
    explicit = content.get("transformers_weights")
    if explicit is not None and not _is_file_name(explicit):
        raise WeightsError(f"{path}: transformers_weights is {shorten(explicit)}, no file's name")
    _check_tokens(path, content, dimensions["vocab_size"])
    return dimensions


def _check_activation(path: str, name: object) -> None:
    if name == "gelu":
        return
    from transformers.activations import ACT2FN

    if not isinstance(name, str) or name not in ACT2FN:
        raise WeightsError(f"{path}: activation_function {shorten(name)} is unknown")


def check_generation_config(
    path: str, content: Mapping[str, Any], dimensions: Mapping[str, int] | None = None
) -> None:
    """Check a `generation_config.json`: types everywhere, token ids against the vocabulary.

    Args:
        path: the file, for messages.
        content: its JSON object.
        dimensions: of the model, where they are known.

    Raises:
        WeightsError: a value is of the wrong type or out of range.
    """
    limits = LARGEST if dimensions is None else dimensions
    _check_levels(path, content)
    _check_tokens(path, content, limits["vocab_size"])
    for name in ("is_multilingual", "return_timestamps", "do_sample", "use_cache"):
        _check_flag(path, content, name)
    for name in ("max_length", "max_new_tokens", "min_length", "max_initial_timestamp_index"):
        _check_whole(path, content, name, 0, 1 << 20)
    for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
        _check_whole(path, content, name, 1, 1 << 12)
    for name in ("temperature", "top_p", "repetition_penalty", "length_penalty"):
        _check_number(path, content, name, -1000, 1000)
    for name in ("lang_to_id", "task_to_id"):
        ids = content.get(name)
        if ids is not None and not (
            isinstance(ids, dict) and all(_is_token(t, limits["vocab_size"]) for t in ids.values())
        ):
            raise WeightsError(f"{path}: {name} does not map names to token ids")
    pairs = content.get("alignment_heads")
    if pairs is not None and not (
        isinstance(pairs, list)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and _is_token(pair[0], limits["decoder_layers"])
            and _is_token(pair[1], limits["decoder_attention_heads"])
            for pair in pairs
        )
    ):
        raise WeightsError(f"{path}: alignment_heads is not a list of [layer, head] of the model")


# No vocabulary is this large.
MOST_TOKENS = 2**31

_TOKEN_NAMES = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("no_timestamps_token_id", "prev_sot_token_id"),
)


# What Transformers saves with a model of any vocabulary if none were chosen.
DEFAULT_TOKENS = {"bos_token_id": 50256, "eos_token_id": 50256}


def _check_tokens(path: str, content: Mapping[str, Any], vocab_size: int) -> None:
    content = {
        name: value
        for name, value in content.items()
        if name not in DEFAULT_TOKENS or value != DEFAULT_TOKENS[name]
    }
    for name in _TOKEN_NAMES:
        token = content.get(name)
        several = token if isinstance(token, list) and token else [token]
        if token is not None and not all(_is_token(each, vocab_size) for each in several):
            raise WeightsError(f"{path}: {name} is {shorten(token)}, no token below {vocab_size}")
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        tokens = content.get(name)
        # Older files hold -1 for OpenAI's own list. Tokens beyond the vocabulary, such as the
        # defaults in the configuration of a small one, are never generated anyway.
        if tokens is not None and not (
            isinstance(tokens, list)
            and all(token == -1 or _is_token(token, MOST_TOKENS) for token in tokens)
        ):
            raise WeightsError(f"{path}: {name} is not a list of token ids")
    forced = content.get("forced_decoder_ids")
    if forced is not None and not (
        isinstance(forced, list)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and _is_token(pair[0], vocab_size)
            and (pair[1] is None or _is_token(pair[1], vocab_size))
            for pair in forced
        )
    ):
        raise WeightsError(f"{path}: forced_decoder_ids is not a list of [position, token]")


def check_feature_extractor(path: str, content: Mapping[str, Any]) -> None:
    """Check a `preprocessor_config.json` before a filter bank of its size is made.

    Raises:
        WeightsError: a value is of the wrong type or out of range.
    """
    _check_levels(path, content)
    _check_whole(path, content, "feature_size", 1, 1 << 10, optional=False)
    _check_whole(path, content, "sampling_rate", 1000, 1 << 20, optional=False)
    _check_whole(path, content, "hop_length", 1, 1 << 12, optional=False)
    _check_whole(path, content, "chunk_length", 1, 3600, optional=False)
    _check_whole(path, content, "n_fft", 16, 1 << 12, optional=False)
    for name in ("padding_value", "dither"):
        _check_number(path, content, name, -1000, 1000)
    _check_flag(path, content, "return_attention_mask")
    side = content.get("padding_side", "right")
    if side not in ("left", "right"):
        raise WeightsError(f"{path}: padding_side is {shorten(side)}, expected left or right")


def check_feature_extractor_files(folder: Path) -> list[dict[str, Any]]:
    """Check the files of a folder that describe a feature extractor, and return what they hold."""
    found = []
    path = folder / "preprocessor_config.json"
    if os.path.lexists(path):
        found.append(read_json(path))
        check_feature_extractor(str(path), found[-1])
    path = folder / "processor_config.json"
    if os.path.lexists(path):
        whole = read_json(path)
        content = whole.get("feature_extractor", {})
        if not isinstance(content, dict):
            raise WeightsError(f"{path}: feature_extractor is no JSON object")
        check_feature_extractor(str(path), content)
        if "feature_extractor" in whole or not found:
            found.append(content)
    return found


def _is_token(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _check_flag(path: str, content: Mapping[str, Any], name: str) -> None:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise WeightsError(f"{path}: {name} is {shorten(value)}, expected true or false")


def _check_whole(
    path: str,
    content: Mapping[str, Any],
    name: str,
    least: int,
    most: int,
    *,
    optional: bool = True,
) -> None:
    value = content.get(name)
    if name not in content or (optional and value is None):
        return
    if type(value) is not int or not least <= value <= most:
        raise WeightsError(
            f"{path}: {name} is {shorten(value)}, expected a whole number from {least} to {most}"
        )


def _check_number(
    path: str, content: Mapping[str, Any], name: str, least: float, most: float
) -> None:
    value = content.get(name)
    if value is None:
        return
    # A comparison with NaN is false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise WeightsError(
            f"{path}: {name} is {shorten(value)}, expected a number from {least} to {most}"
        )


def _check_levels(path: str, content: object) -> None:
    """Refuse nesting that recursive code of other packages would stumble over."""
    level: list[Any] = [content]
    for _ in range(_MOST_LEVELS):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise WeightsError(f"{path}: nested more than {_MOST_LEVELS} levels deep")


def count_parameters(dimensions: Mapping[str, int]) -> int:
    """Count the parameters of a Whisper, biases left out."""
    width = dimensions["d_model"]
    encoder = 4 * width * width + 2 * width * dimensions["encoder_ffn_dim"]
    decoder = 8 * width * width + 2 * width * dimensions["decoder_ffn_dim"]
    positions = dimensions["max_source_positions"] + dimensions["max_target_positions"]
    return (
        3 * width * (dimensions["num_mel_bins"] + width)
        + (dimensions["vocab_size"] + positions) * width
        + dimensions["encoder_layers"] * encoder
        + dimensions["decoder_layers"] * decoder
    )


# Weights


def weight_files(
    folder: Path, variant: str | None, safetensors: bool, explicit: str | None
) -> Iterator[Path]:
    """Find the files that Transformers will read; an index stands for its shards."""
    names: tuple[str, ...] = (*_SAFE_NAMES, *_TORCH_NAMES) if safetensors else _TORCH_NAMES
    if explicit is not None:
        names = (explicit,)
    elif variant is not None:
        names = (*(_with_variant(name, variant) for name in names), *names)
    for name in names:
        path = folder / name
        if os.path.lexists(path):
            if ".index." in name:
                yield from (folder / shard for shard in read_index(path))
            else:
                yield path
            return
    raise WeightsError(f"{folder}: none of {', '.join(names)} is there")


def _with_variant(name: str, variant: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}"


def read_index(path: Path) -> list[str]:
    """Names of the shards of an index of weight files, each once; all lie beside the index.

    Raises:
        WeightsError: the index is no index, or names a file elsewhere or one that is missing.
    """
    names = index_shards(str(path), read_json(path, _LARGEST_INDEX))
    for name in names:
        if not os.path.lexists(path.with_name(name)):
            raise WeightsError(f"{path}: names {name}, which is missing")
    return names


def index_shards(path: str, content: Mapping[str, Any]) -> list[str]:
    """Check an index, and list the shards that it names."""
    mapping = content.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise WeightsError(f"{path}: its weight_map is no map of parameters to files")
    if not isinstance(content.get("metadata", {}), dict):
        raise WeightsError(f"{path}: its metadata is no JSON object")
    suffix = ".safetensors" if path.endswith(".json") and ".safetensors." in path else ".bin"
    for name in mapping.values():
        if not _is_file_name(name) or not name.endswith(suffix):
            raise WeightsError(
                f"{path}: its weight_map names {shorten(name)}, expected *{suffix} files beside it"
            )
    return sorted(set(mapping.values()))


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name) <= 255
        and not any(mark in name for mark in "/\\:")
        and name not in (".", "..")
    )


def _check_weights(path: Path) -> int:
    """Check a file of weights by its header; return its size in bytes."""
    if path.name.endswith(".safetensors"):
        with JoinedFiles((path,)) as file:
            read_safetensors_header(file)
            return file.size
    if not path.name.endswith(".bin"):
        return check_regular(path)
    with TorchArchive(path) as archive:
        content, total = archive.content, 0
        if not isinstance(content, dict):
            raise WeightsError(f"{path}: holds a {type(content).__name__}, expected parameters")
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
                raise WeightsError(f"{path}: {shorten(name)} is no parameter")
            total += tensor.elements * tensor.dtype.itemsize
        # Tied parameters are there twice.
        if total > 2 * archive.size:
            raise WeightsError(f"{path}: its tensors claim {total} bytes, more than the file has")
        return archive.size


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """A tensor of a safetensors file: its type by the format's name, and its first byte."""

    dtype: str
    shape: Shape
    position: int


def read_safetensors_header(file: JoinedFiles) -> dict[str, SafeTensor]:
    """Check the header of a safetensors file against its size.

    Returns:
        The tensors by name.

    Raises:
        WeightsError: the header is no header, or its tensors do not fill the file without overlaps.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(_LARGEST_HEADER, file.size - 8):
        raise WeightsError(
            f"{file.name}: a header of {length} bytes in a file of {file.size}: truncated, or no "
            "safetensors file"
        )
    content = decode_json(file.name, file.read(8, length))
    if not isinstance(content, dict):
        raise WeightsError(f"{file.name}: its header is no JSON object")
    _check_levels(file.name, content)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{file.name}: its metadata is no map of strings")
    tensors: dict[str, SafeTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in content.items():
        dtype, shape, (start, end) = _tensor_entry(file.name, name, entry)
        if end - start != math.prod(shape) * _ITEM_SIZES[dtype]:
            raise WeightsError(
                f"{file.name}: tensor {shorten(name)} of shape {shorten(shape)} and type {dtype} "
                f"has {end - start} bytes"
            )
        tensors[name] = SafeTensor(dtype, shape, 8 + length + start)
        ranges.append((start, end, name))
    position = 0
    for start, end, name in sorted(ranges):
        if start != position:
            raise WeightsError(
                f"{file.name}: tensor {shorten(name)} begins at {start}, expected {position}"
            )
        position = end
    if position != file.size - 8 - length:
        raise WeightsError(
            f"{file.name}: its tensors take {position} bytes, but {file.size - 8 - length} follow "
            "the header: truncated?"
        )
    return tensors


def _tensor_entry(
    path: str, name: str, entry: object
) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise WeightsError(f"{path}: tensor {shorten(name)} is of type {shorten(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise WeightsError(f"{path}: tensor {shorten(name)} has no shape or no place")
    if offsets[0] > offsets[1]:
        raise WeightsError(f"{path}: tensor {shorten(name)} ends before it begins")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(_is_token(number, 1 << 48) for number in value)
    )
