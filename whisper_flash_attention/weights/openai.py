"""OpenAI's `.pt` checkpoints, converted to Transformers' terms.

A file is what `torch.save({"dims": {...}, "model_state_dict": {...}})` writes. It is unpickled by
PyTorch's weights-only reader, which builds tensors and plain containers and calls nothing else.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperConfig

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import (
    FLOATING,
    Checkpoint,
    assemble,
    check_shapes,
    make_config,
    parameter_shapes,
    shorten,
)
from whisper_flash_attention.weights.generation import known_alignment_heads, make_generation_config
from whisper_flash_attention.weights.tokens import SpecialTokens

# OpenAI's `ModelDimensions` -> `WhisperConfig`. The width is there twice, once for each side.
DIMENSIONS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
# Transformers' names -> OpenAI's, of modules in a layer and of those outside.
_LAYER_MODULES = {
    f"{attention}.{part}_proj": f"{theirs}.{name}"
    for attention, theirs in (("self_attn", "attn"), ("encoder_attn", "cross_attn"))
    for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
} | {
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
_OUTER_NAMES = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "encoder.layer_norm.weight": "encoder.ln_post.weight",
    "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.embed_tokens.weight": "decoder.token_embedding.weight",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.layer_norm.weight": "decoder.ln.weight",
    "decoder.layer_norm.bias": "decoder.ln.bias",
}
# What PyTorch's reader raises for broken files, as found by breaking files.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_openai(path: Path, source: str | None = None) -> Checkpoint:
    """Read an OpenAI checkpoint; no code from the file runs.

    Args:
        path: the file.
        source: how the checkpoint was asked for; the path unless given.

    Raises:
        WeightsError: the file is truncated, hostile, or holds something else.
    """
    config, tokens, tensors = _open(path)
    names = {name: openai_name(name) for name in parameter_shapes(config)}
    expected = {names[name]: shape for name, shape in parameter_shapes(config).items()}
    check_shapes(str(path), expected, {name: tuple(t.shape) for name, t in tensors.items()})
    generation_config = make_generation_config(
        tokens,
        max_length=config.max_target_positions,
        alignment_heads=known_alignment_heads(
            config.encoder_layers,
            config.decoder_layers,
            config.decoder_attention_heads,
            config.vocab_size,
        ),
    )
    # Copies: the tensors of the file are views of a mapping, which changes when the file does.
    converted = {name: tensors[theirs].clone() for name, theirs in names.items()}
    return assemble(source or str(path), "openai", config, generation_config, converted)


def read_dimensions(path: Path) -> tuple[int, SpecialTokens]:
    """Mel bins and special tokens of an OpenAI checkpoint; the weights stay in the file."""
    config, tokens, _ = _open(path)
    return config.num_mel_bins, tokens


def _open(path: Path) -> tuple[WhisperConfig, SpecialTokens, dict[str, torch.Tensor]]:
    dims, tensors = _parts(path, _load(path))
    return *_read_config(path, dims, tensors), tensors


def _load(path: Path) -> Any:
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            # It warns of unusual pickles; what it cannot read it refuses, and that is what counts.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        raise WeightsError(
            f"{path}: damaged, or holds more than tensors, which would have to run as code: "
            f"PyTorch's weights-only reader refuses it ({type(error).__name__}: "
            f"{_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return shorten(lines[0], 200) if lines else "no reason given"


def _check_archive(path: Path) -> None:
    """Require the archive that `torch.save` writes: stored entries that fit into the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = path.stat().st_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise WeightsError(
            f"{path}: truncated, or not an archive of torch.save ({shorten(error, 200)}). Expected "
            "an OpenAI checkpoint"
        ) from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:
        raise WeightsError(f"{path}: an archive, but not one of torch.save")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightsError(f"{path}: has compressed entries; torch.save writes none")
    if sum(entry.file_size for entry in entries) > size:
        raise WeightsError(f"{path}: claims to hold more than its {size} bytes")


def _parts(path: Path, content: Any) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= content.keys():
        found = sorted(shorten(key, 30) for key in content) if isinstance(content, dict) else []
        raise WeightsError(
            f"{path}: expected an OpenAI checkpoint, a dict with 'dims' and 'model_state_dict', "
            f"found {type(content).__name__} {found[:5]}"
        )
    dims, state = content["dims"], content["model_state_dict"]
    if not isinstance(dims, dict) or not isinstance(state, dict):
        raise WeightsError(f"{path}: 'dims' or 'model_state_dict' is not a dict")
    wrong = [name for name in DIMENSIONS if type(dims.get(name)) is not int]
    if wrong:
        raise WeightsError(f"{path}: dims without a whole number for {', '.join(wrong)}")
    total = 0
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
        total += tensor.numel() * tensor.itemsize
    if total > path.stat().st_size:
        raise WeightsError(f"{path}: its tensors claim {total} bytes, more than the file has")
    return dims, dict(state)


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise WeightsError(
            f"{path}: {shorten(name)} in model_state_dict is {type(tensor).__name__}, no tensor"
        )
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in FLOATING or not tensor.is_contiguous():
        raise WeightsError(
            f"{path}: tensor {shorten(name)} is not a plain float16, bfloat16 or float32 one "
            f"({tensor.dtype}, {tensor.layout}, {tensor.device})"
        )


def _read_config(
    path: Path, dims: dict[str, int], tensors: dict[str, torch.Tensor]
) -> tuple[WhisperConfig, SpecialTokens]:
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise WeightsError(
            f"{path}: n_audio_state {dims['n_audio_state']} and n_text_state "
            f"{dims['n_text_state']} differ; Transformers' Whisper has one width"
        )
    for name in ("n_audio_layer", "n_text_layer"):
        if dims[name] > len(tensors):
            raise WeightsError(f"{path}: {name} is {dims[name]} for {len(tensors)} tensors in all")
    options = {ours: dims[theirs] for theirs, ours in DIMENSIONS.items()}
    for side in ("encoder", "decoder"):
        # OpenAI's models are four times as wide in there; a missing tensor is reported later.
        first = tensors.get(f"{side}.blocks.0.mlp.0.weight")
        width = None if first is None or first.dim() != 2 else first.shape[0]
        options[f"{side}_ffn_dim"] = width or 4 * options["d_model"]
    return make_config(str(path), **options)


def openai_name(name: str) -> str:
    """OpenAI's name of a parameter, from Transformers'."""
    name = name.removeprefix("model.")
    side, kind, *rest = name.split(".")
    if kind != "layers":
        return _OUTER_NAMES.get(name, name)
    layer, module, parameter = rest[0], ".".join(rest[1:-1]), rest[-1]
    return f"{side}.blocks.{layer}.{_LAYER_MODULES[module]}.{parameter}"
