"""OpenAI's `.pt` checkpoints, converted to Transformers' terms.

A file is what `torch.save({"dims": {...}, "model_state_dict": {...}})` writes. It is never
unpickled: `torch_archive` reads the records of the tensors, and each tensor is read from the file
only after all of them have been checked.
"""

from __future__ import annotations

from pathlib import Path

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import (
    FLOATING,
    Checkpoint,
    Convert,
    Dimensions,
    assemble,
    check_shapes,
    make_dimensions,
    parameter_shapes,
    shorten,
)
from whisper_flash_attention.weights.tokens import (
    SpecialTokens,
    generation_values,
    known_alignment_heads,
)
from whisper_flash_attention.weights.torch_archive import StoredTensor, TorchArchive, is_contiguous

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


def read_openai(
    path: Path, source: str | None = None, *, convert: Convert | None = None
) -> Checkpoint:
    """Read an OpenAI checkpoint; no code from the file runs.

    Args:
        path: the file.
        source: how the checkpoint was named by the caller; the path unless given.
        convert: applied to each tensor as it is read. Tensors may then lie in the mapped file;
            otherwise each has memory of its own.

    Raises:
        WeightsError: the file is truncated, hostile, or holds something else.
    """
    with TorchArchive(path) as archive:
        dimensions, tokens, stored = _read_header(archive)
        shapes = parameter_shapes(dimensions)
        names = {name: openai_name(name) for name in shapes}
        expected = {names[name]: shape for name, shape in shapes.items()}
        check_shapes(str(path), expected, {name: item.shape for name, item in stored.items()})
        generation = generation_values(
            tokens,
            max_length=dimensions.max_target_positions,
            alignment_heads=known_alignment_heads(
                dimensions.encoder_layers,
                dimensions.decoder_layers,
                dimensions.decoder_attention_heads,
                dimensions.vocab_size,
            ),
        )
        tensors = {name: archive.read(stored[theirs], convert) for name, theirs in names.items()}
    return assemble(source or str(path), "openai", dimensions, generation, tensors)


def read_dimensions(path: Path) -> tuple[int, SpecialTokens]:
    """Mel bins and special tokens of an OpenAI checkpoint; the weights stay in the file."""
    with TorchArchive(path) as archive:
        dimensions, tokens, _ = _read_header(archive)
    return dimensions.num_mel_bins, tokens


def _read_header(
    archive: TorchArchive,
) -> tuple[Dimensions, SpecialTokens, dict[str, StoredTensor]]:
    dims, tensors = _parts(archive)
    return *_read_dimensions(archive.name, dims, tensors), tensors


def _parts(archive: TorchArchive) -> tuple[dict[str, int], dict[str, StoredTensor]]:
    path, content = archive.name, archive.content
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= content.keys():
        found = sorted(shorten(key, 30) for key in content) if isinstance(content, dict) else []
        raise WeightsError(
            f"{path}: expected an OpenAI checkpoint, a dict with 'dims' and 'model_state_dict', "
            f"found {_kind(content)} {found[:5]}"
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
        total += tensor.elements * tensor.dtype.itemsize
    if total > archive.size:
        raise WeightsError(f"{path}: its tensors claim {total} bytes, more than the file has")
    return dims, dict(state)


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, StoredTensor) else type(value).__name__.lstrip("_")


def _check_tensor(path: str, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
        raise WeightsError(
            f"{path}: {shorten(name)} in model_state_dict is {_kind(tensor)}, expected a tensor "
            "with a name"
        )
    if tensor.dtype not in FLOATING or not is_contiguous(tensor.shape, tensor.strides):
        raise WeightsError(
            f"{path}: tensor {shorten(name)} is not a contiguous float16, bfloat16 or float32 one "
            f"({tensor.dtype}, shape {list(tensor.shape)}, strides {list(tensor.strides)})"
        )


def _read_dimensions(
    path: str, dims: dict[str, int], tensors: dict[str, StoredTensor]
) -> tuple[Dimensions, SpecialTokens]:
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise WeightsError(
            f"{path}: n_audio_state {shorten(dims['n_audio_state'])} and n_text_state "
            f"{shorten(dims['n_text_state'])} differ; Transformers' Whisper has one width"
        )
    for name in ("n_audio_layer", "n_text_layer"):
        if dims[name] > len(tensors):
            raise WeightsError(
                f"{path}: {name} is {shorten(dims[name])} for {len(tensors)} tensors in all"
            )
    options = {ours: dims[theirs] for theirs, ours in DIMENSIONS.items()}
    for side in ("encoder", "decoder"):
        # OpenAI's models are four times as wide in there; a missing tensor is reported later.
        first = tensors.get(f"{side}.blocks.0.mlp.0.weight")
        width = None if first is None or len(first.shape) != 2 else first.shape[0]
        options[f"{side}_ffn_dim"] = width or 4 * options["d_model"]
    return make_dimensions(path, **options)


def openai_name(name: str) -> str:
    """OpenAI's name of a parameter, from Transformers'."""
    name = name.removeprefix("model.")
    side, kind, *rest = name.split(".")
    if kind != "layers":
        return _OUTER_NAMES.get(name, name)
    layer, module, parameter = rest[0], ".".join(rest[1:-1]), rest[-1]
    return f"{side}.blocks.{layer}.{_LAYER_MODULES[module]}.{parameter}"
