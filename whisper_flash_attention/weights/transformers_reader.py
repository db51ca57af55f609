"""Read the plain Whisper of a Transformers folder without Transformers.

Plain is what `WhisperForConditionalGeneration` saves of itself: parameters by its names, GELU, tied
embeddings. Transformers also loads adapters, quantised weights, other classes' checkpoints and
older names; such folders are not read here, and the reason is returned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whisper_flash_attention.weights.checkpoint import (
    FLOATING,
    Checkpoint,
    Convert,
    Dimensions,
    Shape,
    assemble,
    parameter_shapes,
    shorten,
)
from whisper_flash_attention.weights.files import JoinedFiles, read_json
from whisper_flash_attention.weights.torch_archive import StoredTensor, TorchArchive, is_contiguous
from whisper_flash_attention.weights.transformers_folder import (
    ALIASES,
    CONFIG,
    GENERATION,
    check_config,
    check_folder,
    read_safetensors_header,
    weight_files,
)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values of `config.json` that a plain Whisper has, where they are there.
_PLAIN = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
    "transformers_weights": None,
}
_EMBEDDINGS = "model.decoder.embed_tokens.weight"
_PROJECTION = "proj_out.weight"


def read_transformers(folder: Path, source: str, convert: Convert) -> Checkpoint | str:
    """Read a folder, or say why only Transformers can.

    Args:
        source: how the checkpoint was named by the caller.
        convert: applied to each tensor as it is read; tensors may lie in the mapped file.

    Raises:
        WeightsError: as `check_folder`.
    """
    check_folder(folder)
    content = read_json(folder / CONFIG)
    dimensions = Dimensions(**check_config(str(folder / CONFIG), content))
    reason = _config_reason(folder, content, dimensions)
    if reason is not None:
        return reason
    with ExitStack() as files:
        stored: dict[str, _Stored] = {}
        for path in weight_files(folder, None, True, None):
            is_safe = path.suffix == ".safetensors"
            stored |= (_safe_tensors if is_safe else _torch_tensors)(path, files)
        projection = stored.pop(_PROJECTION, None)
        reason = _tensors_reason(stored, parameter_shapes(dimensions), projection)
        if reason is not None:
            return reason
        tensors = {name: each.read(convert) for name, each in stored.items()}
    path = folder / GENERATION
    generation = read_json(path) if os.path.lexists(path) else {}
    return assemble(source, "transformers", dimensions, generation, tensors)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of an open file; `dtype` is None if it is no dense floating one."""

    dtype: torch.dtype | None
    shape: Shape
    read: Callable[[Convert], torch.Tensor]


def _safe_tensors(path: Path, files: ExitStack) -> dict[str, _Stored]:
    file = files.enter_context(JoinedFiles((path,)))
    found = {}
    for name, tensor in read_safetensors_header(file).items():
        dtype = _DTYPES.get(tensor.dtype)
        place = (tensor.position, dtype or torch.float32, tensor.shape)
        found[name] = _Stored(dtype, tensor.shape, partial(file.tensor, *place))
    return found


def _torch_tensors(path: Path, files: ExitStack) -> dict[str, _Stored]:
    archive = files.enter_context(TorchArchive(path))
    content: dict[str, StoredTensor] = archive.content  # as `check_folder` found
    found = {}
    for name, tensor in content.items():
        is_dense = tensor.dtype in FLOATING and is_contiguous(tensor.shape, tensor.strides)
        dtype = tensor.dtype if is_dense else None
        found[name] = _Stored(dtype, tensor.shape, partial(archive.read, tensor))
    return found


def _config_reason(folder: Path, content: Mapping[str, Any], dimensions: Dimensions) -> str | None:
    for name, plain in _PLAIN.items():
        if content.get(name, plain) != plain:
            return f"its config.json has {name} {shorten(content[name])}"
    for alias, name in ALIASES.items():
        if content.get(alias, content.get(name)) != content.get(name):
            return f"its config.json has another {alias} than {name}"
    if (folder / "adapter_config.json").exists():
        return "there is an adapter beside it"
    return None


def _tensors_reason(
    stored: Mapping[str, _Stored], expected: Mapping[str, Shape], projection: _Stored | None
) -> str | None:
    if {name: each.shape for name, each in stored.items()} != dict(expected):
        return "its tensors are not those that Transformers saves of a Whisper of this size"
    dtypes = {each.dtype for each in (*stored.values(), *([projection] if projection else []))}
    if None in dtypes:
        return "it has tensors that are not dense ones of float32, float16 or bfloat16"
    if projection is not None and not torch.equal(
        projection.read(_as_it_is), stored[_EMBEDDINGS].read(_as_it_is)
    ):
        return f"its {_PROJECTION} is not its token embeddings"
    return None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
