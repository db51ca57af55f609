"""One checkpoint in the formats that other systems load: the weights of all are the same.

Every file holds the weights in float16, as most checkpoints are published; a matrix of the
quantized file has 8 bits. A system converts them to the dtype that it computes in.
"""

from __future__ import annotations

import copy
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration

from whisper_flash_attention.benchmark.peer_systems import (
    CTRANSLATE2,
    GGML,
    GGML_8_BITS,
    OPENAI,
    TRANSFORMERS,
    PeerCheckpoint,
    set_alignment_heads,
)
from whisper_flash_attention.benchmark.random_weights import (
    build_model,
    keep_to_text_,
    random_processor,
    special_tokens,
)
from whisper_flash_attention.benchmark.settings import DECODER_POSITIONS, MODEL_SIZES
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.weights.openai_reader import DIMENSIONS, openai_name
from whisper_flash_attention.weights.tokenizer import token_bytes
from whisper_flash_attention.weights.tokens import generation_values, known_alignment_heads


def write_checkpoint(
    source: str,
    formats: Sequence[str],
    folder: Path,
    *,
    is_random: bool = False,
    device: str = "cpu",
    peers: Path | None = None,
) -> PeerCheckpoint:
    """Write a checkpoint in some of `FORMATS`.

    Args:
        source: as users name it; a size of `MODEL_SIZES` for random weights.
        formats: which; CTranslate2's is written by its own converter, from Transformers' folder.
        folder: where files go.
        is_random: whether to draw the weights, by `random_weights`.
        device: on which they are drawn.
        peers: folder with the package `ctranslate2`, if that is not installed.

    Raises:
        WeightsError: the checkpoint cannot be read.
    """
    model, processor = _random(source, device) if is_random else _stock(source)
    tokenizer = processor.tokenizer
    files = {}
    home = folder / TRANSFORMERS
    if {TRANSFORMERS, CTRANSLATE2} & set(formats):
        model.save_pretrained(home)
        tokenizer.save_pretrained(home)
        processor.feature_extractor.save_pretrained(home)  # in the file that all readers know
        files[TRANSFORMERS] = str(home)
    if CTRANSLATE2 in formats:
        files[CTRANSLATE2] = _convert(home, folder / CTRANSLATE2, peers)
    if OPENAI in formats:
        path = folder / "openai.pt"
        torch.save(
            {"dims": openai_dimensions(model), "model_state_dict": openai_state(model)}, path
        )
        files[OPENAI] = str(path)
    for name in (GGML, GGML_8_BITS):
        if name in formats:
            path = folder / f"{name}.bin"
            with path.open("wb") as file:
                write_ggml(file, model, processor, quantize=name == GGML_8_BITS)
            files[name] = str(path)
    return PeerCheckpoint(
        files,
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        bool(getattr(model.generation_config, "is_multilingual", False)),
        _alignment_heads(model),
    )


def _alignment_heads(model: Any) -> tuple[tuple[int, int], ...] | None:
    """The heads that the generation config names."""
    named = getattr(model.generation_config, "alignment_heads", None)
    return tuple((int(layer), int(head)) for layer, head in named) if named else None


def _stock(source: str) -> tuple[Any, Any]:
    """Transformers' own class with the weights that this package reads, and the processor."""
    ours = Transcriber.from_pretrained(source, device="cpu", compute_type="float32")
    model: Any = WhisperForConditionalGeneration(copy.deepcopy(ours.model.config))
    model.load_state_dict(ours.model.state_dict())
    model.generation_config = copy.deepcopy(ours.model.generation_config)
    return model.half(), ours.processor


def _random(size_name: str, device: str) -> tuple[Any, Any]:
    size = MODEL_SIZES[size_name]
    model: Any = build_model(
        WhisperForConditionalGeneration,
        size,
        size.decoder_layers,
        device=device,
        dtype=torch.float16,
    )
    keep_to_text_(model)
    heads = known_alignment_heads(
        size.encoder_layers, size.decoder_layers, size.heads, size.vocabulary
    )
    values = generation_values(
        special_tokens(size), max_length=DECODER_POSITIONS, alignment_heads=heads
    )
    model.generation_config = GenerationConfig(**values)
    processor = random_processor(size)
    processor.tokenizer.pad_token = "<|endoftext|>"  # as that of a checkpoint
    return model.cpu(), processor


def _convert(home: Path, target: Path, peers: Path | None) -> str:
    """Run CTranslate2's converter on a Transformers folder."""
    if peers is not None:
        sys.path.append(str(peers))
    from ctranslate2.converters import TransformersConverter

    extra = ["tokenizer.json", "preprocessor_config.json"]
    # The folder may be there: it is written again when another format is added.
    TransformersConverter(str(home), copy_files=extra, load_as_float16=True).convert(
        str(target), quantization="float16", force=True
    )
    return str(target)


def openai_dimensions(model: Any) -> dict[str, int]:
    """The sizes of a Transformers model by openai-whisper's names."""
    return {theirs: getattr(model.config, ours) for theirs, ours in DIMENSIONS.items()}


def openai_state(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a Transformers model by openai-whisper's names."""
    return {
        openai_name(name): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("proj_out")
    }


def openai_model(model: Any) -> Any:
    """openai-whisper's model with a Transformers model's weights, device and alignment heads."""
    from whisper.model import ModelDimensions, Whisper

    found = Whisper(ModelDimensions(**openai_dimensions(model)))
    found.load_state_dict(openai_state(model))
    if (heads := _alignment_heads(model)) is not None:
        set_alignment_heads(found, heads)
    return found.eval().to(model.device)


# whisper.cpp's file, as its `convert-pt-to-ggml.py` and `quantize` write it.
_MAGIC = 0x67676D6C
_TYPE_F32, _TYPE_F16, _TYPE_Q8_0 = 0, 1, 8
_FILE_F16, _FILE_Q8_0 = 1, 7 + 2 * 1000  # with the version of quantization
_BLOCK = 32  # values that share a scale


def write_ggml(file: BinaryIO, model: Any, processor: Any, *, quantize: bool) -> None:
    """Write whisper.cpp's file of a Transformers model.

    Args:
        file: open for bytes.
        model: weights, on the CPU.
        processor: mel filters and vocabulary.
        quantize: whether matrices get 8 bits a value and a scale for every 32 of them.
    """
    order = (
        *("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer"),
        *("n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels"),
    )
    sizes = openai_dimensions(model)
    kind = _FILE_Q8_0 if quantize else _FILE_F16
    file.write(struct.pack("<12i", _MAGIC, *(sizes[name] for name in order), kind))
    filters = np.asarray(processor.feature_extractor.mel_filters, np.float32).T
    file.write(struct.pack("<2i", *filters.shape) + filters.tobytes())
    tokenizer = processor.tokenizer
    texts = range(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    file.write(struct.pack("<i", len(texts)))
    for name in tokenizer.convert_ids_to_tokens(texts):
        data = token_bytes(name)
        file.write(struct.pack("<i", len(data)) + data)
    for name, tensor in openai_state(model).items():
        _write_tensor(file, name, tensor.float().numpy(), quantize=quantize)


def _write_tensor(file: BinaryIO, name: str, values: Any, *, quantize: bool) -> None:
    if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
        values = values[:, None]
    kind, data = _TYPE_F16, values.astype("<f2")
    if values.ndim < 2 or name.endswith(("positional_embedding", "conv1.bias", "conv2.bias")):
        kind, data = _TYPE_F32, values.astype("<f4")
    elif quantize and values.ndim == 2:
        kind, data = _TYPE_Q8_0, _in_8_bits(values)
    encoded = name.encode()
    file.write(struct.pack("<3i", values.ndim, len(encoded), kind))
    file.write(struct.pack(f"<{values.ndim}i", *reversed(values.shape)) + encoded + data.tobytes())


def _in_8_bits(values: Any) -> Any:
    """Blocks of a scale in float16 and 32 integers (`quantize_row_q8_0_ref` in ggml)."""
    blocks = values.reshape(-1, _BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    numbers = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return np.concatenate([scale.astype("<f2").view(np.int8), numbers.astype(np.int8)], axis=1)
