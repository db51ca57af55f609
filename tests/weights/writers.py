"""Writers of the formats that `weights/` reads, and the small models that tests write with them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.random_whisper import perturbed

Variables = dict[str, torch.Tensor]

DTYPES = (
    torch.float32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
)


def small_whisper(**changes: int) -> WhisperForConditionalGeneration:
    """A random Whisper all of whose dimensions differ, so that none can stand for another."""
    options: dict[str, int] = {
        "vocab_size": 51865,
        "d_model": 16,
        "num_mel_bins": 80,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 40,
        "max_source_positions": 20,
        "max_target_positions": 12,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**(options | changes)))
    perturbed(model)
    return model


def smallest_whisper() -> WhisperForConditionalGeneration:
    """A model whose file is mostly header, to break byte by byte."""
    return small_whisper(
        vocab_size=51864,
        d_model=4,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=3,
        decoder_ffn_dim=5,
        max_source_positions=4,
        max_target_positions=6,
    )


def logits(model: WhisperForConditionalGeneration) -> torch.Tensor:
    """The logits of one fixed input: `[2, 5, V]`."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    frames = 2 * config.max_source_positions
    features = torch.randn(2, config.num_mel_bins, frames, generator=generator)
    ids = torch.arange(10).reshape(2, 5) * 7
    with torch.no_grad():
        return model.eval()(input_features=features, decoder_input_ids=ids).logits


# CTranslate2


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<H", len(encoded) + 1) + encoded + b"\0"


def variable(name: str, tensor: torch.Tensor, version: int = 6) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    header = text(name) + struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
    if version >= 4:
        return header + struct.pack("<BI", DTYPES.index(tensor.dtype), len(data)) + data
    return header + struct.pack("<BI", tensor.itemsize, tensor.numel()) + data


def model_bin(
    variables: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str] | None = None,
    version: int = 6,
    spec: str = "WhisperSpec",
    revision: int = 3,
) -> bytes:
    parts = [struct.pack("<I", version)]
    if version >= 2:
        parts += [text(spec), struct.pack("<I", revision)]
    parts.append(struct.pack("<I", len(variables)))
    parts += [variable(name, tensor, version) for name, tensor in variables.items()]
    if version >= 3:
        aliases = aliases or {}
        parts.append(struct.pack("<I", len(aliases)))
        parts += [text(alias) + text(target) for alias, target in aliases.items()]
    return b"".join(parts)


def to_ctranslate2(model: WhisperForConditionalGeneration) -> Variables:
    """The parameters as CTranslate2 names and stacks them, float32, scalars included."""
    state, config = model.model.state_dict(), model.config
    found: Variables = {
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
        "decoder/num_heads": torch.tensor(config.decoder_attention_heads, dtype=torch.int16),
        "decoder/activation": torch.tensor(3, dtype=torch.int8),
        "decoder/pre_norm": torch.tensor(1, dtype=torch.int8),
        "encoder/num_heads": torch.tensor(config.encoder_attention_heads, dtype=torch.int16),
    }
    for convolution in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            found[f"encoder/{convolution}/{kind}"] = state[f"encoder.{convolution}.{kind}"]
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        positions = f"{side}/position_encodings/encodings"
        found[positions] = state[f"{side}.embed_positions.weight"]
        put_norm(found, f"{side}/layer_norm", state, f"{side}.layer_norm")
        for layer in range(layers):
            put_layer(found, f"{side}/layer_{layer}", state, f"{side}.layers.{layer}")
    return {name: tensor.detach().clone() for name, tensor in sorted(found.items())}


def put_layer(found: Variables, name: str, state: Mapping[str, torch.Tensor], theirs: str) -> None:
    attentions = [("self_attention", "self_attn", ("qkv", "o"))]
    if name.startswith("decoder"):
        attentions.append(("attention", "encoder_attn", ("q", "kv", "o")))
    for attention, module, groups in attentions:
        put_norm(found, f"{name}/{attention}/layer_norm", state, f"{theirs}.{module}_layer_norm")
        for index, group in enumerate(groups):
            parts = [f"{theirs}.{module}.{'out' if p == 'o' else p}_proj" for p in group]
            put_linear(found, f"{name}/{attention}/linear_{index}", state, parts)
    put_norm(found, f"{name}/ffn/layer_norm", state, f"{theirs}.final_layer_norm")
    put_linear(found, f"{name}/ffn/linear_0", state, [f"{theirs}.fc1"])
    put_linear(found, f"{name}/ffn/linear_1", state, [f"{theirs}.fc2"])


def put_norm(found: Variables, name: str, state: Mapping[str, torch.Tensor], theirs: str) -> None:
    found[f"{name}/gamma"] = state[f"{theirs}.weight"]
    found[f"{name}/beta"] = state[f"{theirs}.bias"]


def put_linear(
    found: Variables, name: str, state: Mapping[str, torch.Tensor], parts: list[str]
) -> None:
    found[f"{name}/weight"] = torch.cat([state[f"{part}.weight"] for part in parts])
    width = state[f"{parts[0]}.weight"].shape[0]
    zeros = torch.zeros(width)
    found[f"{name}/bias"] = torch.cat([state.get(f"{part}.bias", zeros) for part in parts])


def quantize(variables: Variables, kind: str) -> Variables:
    """As CTranslate2's converter does for `--quantization kind`."""
    matrices, _, rest = kind.partition("_")
    floats = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(rest or kind, torch.float32)
    found: Variables = {}
    for name, tensor in variables.items():
        if not tensor.is_floating_point():
            found[name] = tensor
        elif matrices.startswith("int") and name.endswith("weight") and "conv" not in name:
            found[name], found[f"{name}_scale"] = quantize_matrix(tensor, matrices)
        else:
            found[name] = tensor.to(floats)
    return found


def quantize_matrix(tensor: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "int16":
        scale = 2**10 / tensor.abs().max()
        return (tensor * scale).round().to(torch.int16), scale
    scale = 127 / tensor.abs().amax(dim=1)
    return (tensor * scale[:, None]).round().to(torch.int8), scale


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def write_folder(
    folder: Path, variables: Variables, config: dict[str, object] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(model_bin(variables, ALIASES))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# OpenAI


def to_openai(model: WhisperForConditionalGeneration) -> dict[str, object]:
    """What OpenAI's `torch.save` holds; names by replacement, as the library has them by hand."""
    config = model.config
    replacements = (
        ("layers", "blocks"),
        ("fc1", "mlp.0"),
        ("fc2", "mlp.2"),
        ("final_layer_norm", "mlp_ln"),
        ("self_attn_layer_norm", "attn_ln"),
        ("encoder_attn_layer_norm", "cross_attn_ln"),
        ("self_attn", "attn"),
        ("encoder_attn", "cross_attn"),
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("out_proj", "out"),
        ("embed_tokens", "token_embedding"),
        ("embed_positions.weight", "positional_embedding"),
        ("encoder.layer_norm", "encoder.ln_post"),
        ("decoder.layer_norm", "decoder.ln"),
    )
    state = {}
    for name, tensor in model.model.state_dict().items():
        for ours, theirs in replacements:
            name = name.replace(ours, theirs)
        state[name] = tensor.detach().clone()
    dims = {
        "n_mels": config.num_mel_bins,
        "n_vocab": config.vocab_size,
        "n_audio_ctx": config.max_source_positions,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": config.encoder_layers,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": config.decoder_layers,
    }
    return {"dims": dims, "model_state_dict": state}


# Audio


def read_audio(path: Path) -> np.ndarray:
    """Decode a file to float32 `[T]` at 16 kHz."""
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=16000)
    with av.open(str(path)) as container:
        frames = [
            part.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    frames += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(frames)
