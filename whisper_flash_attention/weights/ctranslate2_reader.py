"""CTranslate2's (faster-whisper's) Whisper folders, converted to Transformers' terms.

The variables in a `model.bin` are located and checked before any of their data is read: every
number is compared with the bytes that are left before it is used. Little endian, binary versions 1
to 6 (`Model::load` in CTranslate2's `src/models/model.cc`):

    u32 version . version >= 2: str spec, u32 revision . u32 number of variables
    per variable: str name . u8 rank . u32 dimensions[rank] . u8 dtype (version < 4: item size)
                  . u32 bytes (version < 4: items) . data
    version >= 3: u32 number of aliases . per alias: str alias, str variable
    str = u16 length with the trailing NUL, bytes, NUL

CTranslate2 stacks projections along axis 0 (query, key and value; key and value), names layers
otherwise, and may quantize matrices to int8 (a scale per row) or int16 (one scale):
`weight = stored / scale`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import (
    FLOATING,
    Checkpoint,
    Convert,
    Dimensions,
    Shape,
    assemble,
    check_shapes,
    make_dimensions,
    parameter_shapes,
    shorten,
)
from whisper_flash_attention.weights.files import JoinedFiles, read_json
from whisper_flash_attention.weights.tokens import (
    SpecialTokens,
    generation_values,
    known_alignment_heads,
)

SPEC = "WhisperSpec"
REVISION = 3
_VERSIONS = range(1, 7)
_LARGEST_RANK = 3  # the weights of a convolution
_SMALLEST_VARIABLE = 2 + 2 + 1 + 1 + 4  # name of one letter, rank, dtype, size
_SMALLEST_ALIAS = 2 * (2 + 2)

_DTYPES = (
    torch.float32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
)
# Before version 4 only the size of an item was kept.
_DTYPES_BY_SIZE = {4: torch.float32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True, slots=True)
class Variable:
    """Where the data of a variable lies, and what it is."""

    name: str
    shape: Shape
    dtype: torch.dtype
    position: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class VariableReader:
    """The variables of an open `model.bin`, by name; aliases are names like any other.

    Raises:
        WeightsError: the header is not one of a Whisper, or a number in it cannot be true.
    """

    def __init__(self, file: JoinedFiles) -> None:
        self._file = file
        self._position = 0
        self.name = file.name
        self.variables: dict[str, Variable] = {}
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            raise self._wrong(f"binary version {version}, expected 1 to 6: not a model.bin?")
        if version >= 2:
            self._check_spec()
        for index in range(self._count("variables", _SMALLEST_VARIABLE)):
            self._read_variable(version, index)
        if version >= 3:
            for index in range(self._count("aliases", _SMALLEST_ALIAS)):
                self._read_alias(index)
        if self._position != file.size:
            raise self._wrong(f"{file.size - self._position} bytes are left over")

    def tensor(self, name: str, convert: Convert | None = None) -> torch.Tensor:
        """Read a variable; see `JoinedFiles.tensor`."""
        each = self.variables[name]
        return self._file.tensor(each.position, each.dtype, each.shape, convert)

    def _check_spec(self) -> None:
        spec = self._string("the name of the specification")
        revision = self._number("I", "the revision")
        if spec != SPEC:
            raise self._wrong(f"a model of kind {shorten(spec)!r}, expected {SPEC!r}")
        if revision != REVISION:
            raise self._wrong(
                f"revision {revision} of {SPEC}, expected {REVISION}: convert the model again "
                "with a current ct2-transformers-converter"
            )

    def _read_variable(self, version: int, index: int) -> None:
        name = self._string(f"the name of variable {index}")
        what = f"variable {shorten(name)}"
        if name in self.variables:
            raise self._wrong(f"{what} is there twice")
        rank = self._number("B", f"the rank of {what}")
        if rank > _LARGEST_RANK:
            raise self._wrong(f"{what} has rank {rank}, expected at most {_LARGEST_RANK}")
        shape = tuple(self._number("I", f"the dimensions of {what}") for _ in range(rank))
        kind = self._number("B", f"the type of {what}")
        count = self._number("I", f"the size of {what}")
        if version >= 4:
            dtype = _DTYPES[kind] if kind < len(_DTYPES) else None
        else:
            dtype = _DTYPES_BY_SIZE.get(kind)
            count *= kind
        if dtype is None:
            raise self._wrong(f"{what} has unknown type {kind}")
        variable = Variable(name, shape, dtype, self._position)
        if variable.size != count:
            raise self._wrong(
                f"{what} of shape {list(shape)} takes {variable.size} bytes, not {count}"
            )
        if count > self._left:
            raise self._wrong(f"truncated: {what} takes {count} bytes, {self._left} are left")
        self.variables[name] = variable
        self._position += count

    def _read_alias(self, index: int) -> None:
        alias = self._string(f"the name of alias {index}")
        target = self._string(f"what alias {index} stands for")
        if alias in self.variables:
            raise self._wrong(f"alias {shorten(alias)} is there twice")
        if target not in self.variables:
            raise self._wrong(
                f"alias {shorten(alias)} stands for {shorten(target)}, which is missing"
            )
        self.variables[alias] = self.variables[target]

    @property
    def _left(self) -> int:
        return self._file.size - self._position

    def _take(self, count: int, what: str) -> bytearray:
        if count > self._left:
            raise self._wrong(f"truncated: {what} takes {count} bytes, {self._left} are left")
        data = self._file.read(self._position, count)
        self._position += count
        return data

    def _number(self, code: str, what: str) -> int:
        layout = struct.Struct("<" + code)
        return int(layout.unpack(self._take(layout.size, what))[0])

    def _count(self, what: str, smallest: int) -> int:
        count = self._number("I", f"the number of {what}")
        if count * smallest > self._left:
            raise self._wrong(f"{count} {what} do not fit into the {self._left} bytes left")
        return count

    def _string(self, what: str) -> str:
        length = self._number("H", what)
        data = bytes(self._take(length, what))
        if length < 2 or data.find(0) != length - 1:
            raise self._wrong(f"{what} is not a text that ends with a NUL")
        try:
            return data[:-1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} is not UTF-8") from error

    def _wrong(self, message: str) -> WeightsError:
        return WeightsError(f"{self.name}: {message} (at byte {self._position})")


# Module in a layer -> the modules of Transformers that are stacked in it.
_SELF_ATTENTION = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
}
_CROSS_ATTENTION = {
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}
_FEED_FORWARD = {
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_CONVOLUTIONS = ("encoder/conv1", "encoder/conv2")
_PROJECTION = "decoder/projection/weight"
_EMBEDDINGS = "decoder/embeddings/weight"
_SCALE = "_scale"

# Options of the format that change what the weights mean, and the values that Whisper has.
_EXPECTED_OPTIONS = {
    "decoder/activation": 3,  # GELU, not its approximations
    "encoder/activation": 3,
    "decoder/pre_norm": 1,
    "decoder/alibi": 0,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_OLD_INT16_SCALE = 1000.0  # CTranslate2's `Quantize::global_int16_scale`, where none is stored


def read_ctranslate2(
    folder: Path,
    model: Sequence[Path] | None = None,
    source: str | None = None,
    *,
    convert: Convert | None = None,
) -> Checkpoint:
    """Read a folder with `model.bin` and, where it is there, `config.json`.

    Args:
        folder: the folder.
        model: the parts of `model.bin`, where it lies elsewhere or in parts.
        source: how the checkpoint was named by the caller; the folder unless given.
        convert: applied to each tensor as it is read. Tensors may then lie in the mapped file, or
            share memory; otherwise each has memory of its own.

    Raises:
        WeightsError: a file is missing, truncated, wrong or hostile.
    """
    with JoinedFiles(model or (folder / "model.bin",)) as file:
        reader = VariableReader(file)
        dimensions, tokens = _read_dimensions(reader)
        generation = read_generation(folder / "config.json", dimensions, tokens)
        tensors = _convert(reader, dimensions, convert)
        # Scalars, such as the number of heads, may be of 8 bits in any file.
        is_int8 = reader.variables[_EMBEDDINGS].dtype is torch.int8
    found = assemble(source or str(folder), "ctranslate2", dimensions, generation, tensors)
    return replace(found, is_int8=is_int8)


def read_dimensions(model: Sequence[Path]) -> tuple[int, SpecialTokens]:
    """Mel bins and special tokens of a model, from the header of its `model.bin` alone."""
    with JoinedFiles(model) as file:
        dimensions, tokens = _read_dimensions(VariableReader(file))
    return dimensions.num_mel_bins, tokens


def _read_dimensions(reader: VariableReader) -> tuple[Dimensions, SpecialTokens]:
    for name, expected in _EXPECTED_OPTIONS.items():
        found = _scalar(reader, name)
        if found is not None and found != expected:
            raise WeightsError(f"{reader.name}: {name} is {found}; Whisper's is {expected}")
    vocabulary, width = _shape(reader, _EMBEDDINGS, 2)
    return make_dimensions(
        reader.name,
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=_shape(reader, "encoder/conv1/weight", 3)[1],
        max_source_positions=_shape(reader, "encoder/position_encodings/encodings", 2)[0],
        max_target_positions=_shape(reader, "decoder/position_encodings/encodings", 2)[0],
        encoder_layers=_count_layers(reader, "encoder"),
        decoder_layers=_count_layers(reader, "decoder"),
        encoder_attention_heads=_required_scalar(reader, "encoder/num_heads"),
        decoder_attention_heads=_required_scalar(reader, "decoder/num_heads"),
        encoder_ffn_dim=_shape(reader, "encoder/layer_0/ffn/linear_0/weight", 2)[0],
        decoder_ffn_dim=_shape(reader, "decoder/layer_0/ffn/linear_0/weight", 2)[0],
    )


def _shape(reader: VariableReader, name: str, rank: int) -> tuple[int, ...]:
    variable = reader.variables.get(name)
    if variable is None:
        raise WeightsError(f"{reader.name}: variable {name} is missing")
    if len(variable.shape) != rank:
        raise WeightsError(
            f"{reader.name}: variable {name} is {list(variable.shape)}, expected rank {rank} "
            f"(at byte {variable.position})"
        )
    return variable.shape


def _scalar(reader: VariableReader, name: str) -> int | None:
    variable = reader.variables.get(name)
    if variable is None:
        return None
    if variable.shape or variable.dtype.is_floating_point:
        raise WeightsError(
            f"{reader.name}: variable {name} is no whole number (at byte {variable.position})"
        )
    return int(reader.tensor(name).item())


def _required_scalar(reader: VariableReader, name: str) -> int:
    value = _scalar(reader, name)
    if value is None:
        raise WeightsError(f"{reader.name}: variable {name} is missing")
    return value


def _count_layers(reader: VariableReader, side: str) -> int:
    """Count the layers that are named; the numbers of a true file run from 0 without gaps."""
    pattern = re.compile(rf"{side}/layer_([0-9]{{1,4}})/")
    matches = (pattern.match(name) for name in reader.variables)
    return len({match[1] for match in matches if match})


def _plan(dimensions: Dimensions) -> dict[str, tuple[str, ...]]:
    """Map each variable to the parameters that are stacked in it, by Transformers' names."""
    plan: dict[str, tuple[str, ...]] = {
        _EMBEDDINGS: ("model.decoder.embed_tokens.weight",),
        "encoder/position_encodings/encodings": ("model.encoder.embed_positions.weight",),
        "decoder/position_encodings/encodings": ("model.decoder.embed_positions.weight",),
    }
    modules: dict[str, tuple[str, ...]] = {
        name: (f"model.{name.replace('/', '.')}",) for name in _CONVOLUTIONS
    }
    sides = (
        ("encoder", dimensions.encoder_layers, _SELF_ATTENTION | _FEED_FORWARD),
        ("decoder", dimensions.decoder_layers, _SELF_ATTENTION | _CROSS_ATTENTION | _FEED_FORWARD),
    )
    for side, layers, parts in sides:
        modules[f"{side}/layer_norm"] = (f"model.{side}.layer_norm",)
        for layer in range(layers):
            for part, names in parts.items():
                target = f"model.{side}.layers.{layer}"
                modules[f"{side}/layer_{layer}/{part}"] = tuple(f"{target}.{n}" for n in names)
    for module, targets in modules.items():
        kinds = ("gamma", "beta") if module.endswith("layer_norm") else ("weight", "bias")
        for kind, parameter in zip(kinds, ("weight", "bias"), strict=True):
            plan[f"{module}/{kind}"] = tuple(f"{target}.{parameter}" for target in targets)
    return plan


def _convert(
    reader: VariableReader, dimensions: Dimensions, convert: Convert | None
) -> dict[str, torch.Tensor]:
    plan, shapes = _plan(dimensions), parameter_shapes(dimensions)
    expected = {name: _stacked_shape(names, shapes) for name, names in plan.items()}
    found = {
        name: variable.shape
        for name, variable in reader.variables.items()
        if variable.shape and not name.endswith(_SCALE)
    }
    _check_projection(reader, found)
    check_shapes(reader.name, expected, found)
    _check_sharing(reader, expected)
    tensors: dict[str, torch.Tensor] = {}
    for name, names in plan.items():
        dense = _read_dense(reader, name, convert)
        rows = [_rows(parameter, shapes, dimensions) for parameter in names]
        for parameter, part in zip(names, torch.split(dense, rows), strict=True):
            # The keys' part of a bias is dropped: it adds the same to all scores of a query, so
            # softmax does not see it (and converted models hold zeros there).
            if parameter in shapes:
                tensors[parameter] = part.clone() if len(names) > 1 and convert is None else part
    return tensors


def _rows(parameter: str, shapes: dict[str, tuple[int, ...]], dimensions: Dimensions) -> int:
    return shapes[parameter][0] if parameter in shapes else dimensions.d_model


def _stacked_shape(names: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    # All that is stacked in a variable has the same shape, keys' bias (no parameter) included.
    known = next(shapes[name] for name in names if name in shapes)
    return (known[0] * len(names), *known[1:])


def _check_projection(reader: VariableReader, found: dict[str, tuple[int, ...]]) -> None:
    """Drop the output projection from what was found, if it is the embeddings by another name."""
    if _PROJECTION not in found:
        return
    if reader.variables[_PROJECTION] is not reader.variables[_EMBEDDINGS]:
        raise WeightsError(
            f"{reader.name}: {_PROJECTION} is not tied to {_EMBEDDINGS}, as in Whisper it must be"
        )
    del found[_PROJECTION]


def _check_sharing(reader: VariableReader, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse layers that share a matrix: a small file could claim to be a huge model."""
    seen: dict[int, str] = {}
    for name, shape in expected.items():
        other = seen.setdefault(reader.variables[name].position, name)
        if other != name and len(shape) > 1:
            raise WeightsError(f"{reader.name}: {name} is the same matrix as {other}")


def _read_dense(reader: VariableReader, name: str, convert: Convert | None) -> torch.Tensor:
    """Read a variable as a floating tensor, dequantised to float32 where it is int8 or int16."""
    if reader.variables[name].dtype in FLOATING:
        return reader.tensor(name, convert)
    stored = reader.tensor(name)
    if stored.dtype not in (torch.int8, torch.int16) or stored.dim() < 2:
        raise WeightsError(f"{reader.name}: variable {name} is of type {stored.dtype}")
    scale = _read_scale(reader, name, stored)
    dense = stored.float() / scale.reshape(-1, *[1] * (stored.dim() - 1))
    return dense if convert is None else convert(dense)


def _read_scale(reader: VariableReader, name: str, stored: torch.Tensor) -> torch.Tensor:
    # An alias shares the scale of what it stands for.
    scale_name = reader.variables[name].name + _SCALE
    if scale_name not in reader.variables:
        if stored.dtype == torch.int16:
            return torch.tensor([_OLD_INT16_SCALE])
        raise WeightsError(f"{reader.name}: variable {scale_name} is missing")
    variable = reader.variables[scale_name]
    where = f"{reader.name}: variable {scale_name} (at byte {variable.position})"
    if math.prod(variable.shape) not in (1, len(stored)) or variable.dtype not in FLOATING:
        raise WeightsError(
            f"{where} is {list(variable.shape)} of {variable.dtype}, expected one floating scale "
            f"or {len(stored)}"
        )
    scale = reader.tensor(scale_name).float()
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise WeightsError(f"{where} holds a scale that is zero, negative or not a number")
    return scale


def read_generation(path: Path, dimensions: Dimensions, tokens: SpecialTokens) -> dict[str, Any]:
    # Converters of early 2023 wrote no config.json; `lang_ids` follow from the vocabulary, and
    # some converted English-only models list wrong ones.
    content = read_json(path) if os.path.lexists(path) else {}
    heads = _pairs(path, content, dimensions)
    if heads is None:
        heads = known_alignment_heads(
            dimensions.encoder_layers,
            dimensions.decoder_layers,
            dimensions.decoder_attention_heads,
            dimensions.vocab_size,
        )
    return generation_values(
        tokens,
        max_length=dimensions.max_target_positions,
        suppress=_ids(path, content, "suppress_ids", dimensions.vocab_size),
        suppress_at_begin=_ids(path, content, "suppress_ids_begin", dimensions.vocab_size),
        alignment_heads=heads,
    )


def _ids(path: Path, content: dict[str, Any], key: str, vocab_size: int) -> list[int] | None:
    ids = content.get(key)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(_is_below(token, vocab_size) for token in ids):
        raise WeightsError(f"{path}: {key} is not a list of token ids below {vocab_size}")
    return ids


def _pairs(
    path: Path, content: dict[str, Any], dimensions: Dimensions
) -> tuple[tuple[int, int], ...] | None:
    pairs = content.get("alignment_heads")
    if pairs is None:
        return None
    limits = (dimensions.decoder_layers, dimensions.decoder_attention_heads)
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(_is_below(value, limit) for value, limit in zip(pair, limits, strict=True))
        for pair in pairs
    ):
        raise WeightsError(
            f"{path}: alignment_heads is not a list of [layer, head] below {list(limits)}"
        )
    return tuple((layer, head) for layer, head in pairs)


def _is_below(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
