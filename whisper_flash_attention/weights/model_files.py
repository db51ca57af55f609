"""All of a checkpoint that transcription needs, without Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from whisper_flash_attention.weights.checkpoint import Checkpoint, Convert
from whisper_flash_attention.weights.ctranslate2_reader import read_ctranslate2
from whisper_flash_attention.weights.files import cannot_load, third_party_parser
from whisper_flash_attention.weights.hub import Hub
from whisper_flash_attention.weights.openai_reader import read_openai
from whisper_flash_attention.weights.sources import (
    Located,
    hub_id,
    is_bare,
    locate,
    source_name,
    tokenizer_source,
)
from whisper_flash_attention.weights.tokenizer import (
    Tokenizer,
    check_ids,
    check_text,
    read_tokenizer,
)
from whisper_flash_attention.weights.tokens import SpecialTokens
from whisper_flash_attention.weights.transformers_folder import check_feature_extractor_files
from whisper_flash_attention.weights.transformers_reader import read_transformers

# What `WhisperFeatureExtractor` computes unless its files say otherwise.
FEATURES = MappingProxyType(
    {
        "feature_size": 80,
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": 30,
        "dither": 0.0,
    }
)


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint, what its features are by the names in `FEATURES`, and its tokenizer."""

    checkpoint: Checkpoint
    features: Mapping[str, Any]
    tokenizer: Tokenizer


def read_model(source: str, convert: Convert, hub: Hub = Hub()) -> ModelFiles | str:
    """Read a checkpoint and what goes with it, or say why only Transformers can.

    Args:
        source: all that `read_checkpoint` takes, Hub ids and OpenAI's short names included.
        convert: applied to each tensor as it is read; tensors may lie in the mapped file.
        hub: where repositories come from.

    Raises:
        WeightsError: something is missing, wrong, or does not fit the checkpoint.
        MissingPackage: the package of `package:NAME` is not installed.

    What the client of the Hub raises passes.
    """
    located, name = locate(source), source_name(source)
    tokens = None
    if located.kind == "transformers":
        folder = located.folder or hub.repository_folder(hub_id(name))
        found = read_transformers(folder, name, convert)
        if isinstance(found, str):
            return found
        checkpoint, descriptions = found, check_feature_extractor_files(folder)
        described = [
            {each: description.get(each, usual) for each, usual in FEATURES.items()}
            for description in descriptions
        ]
        # Older and newer files of a processor lie side by side where a model was saved again.
        if not described or any(each != described[0] for each in described):
            return "its features are described by none of its files, or differently by several"
        features = described[0]
    else:
        checkpoint, folder = _read_converted(located, name, convert, hub)
        tokens = SpecialTokens.of_vocabulary(checkpoint.dimensions.vocab_size)
        features = {**FEATURES, "feature_size": checkpoint.dimensions.num_mel_bins}
    is_converted = located.kind == "ctranslate2" or is_bare(folder)
    tokenizer = read_tokenizer(folder, is_converted=is_converted)
    if tokenizer is None:
        return "its tokenizer's files leave ids of tokens to Transformers"
    if is_converted:
        tokens = tokens or SpecialTokens.of_vocabulary(len(tokenizer))
    check_text(name, tokenizer)
    if tokens is not None:
        check_ids(name, tokenizer, tokens)
    return ModelFiles(checkpoint, features, tokenizer)


def _read_converted(
    located: Located, name: str, convert: Convert, hub: Hub
) -> tuple[Checkpoint, Path]:
    """A checkpoint that Transformers cannot read, and the folder of its tokenizer."""
    if located.kind == "ctranslate2":
        assert located.folder is not None
        read = read_ctranslate2(located.folder, located.model, name, convert=convert)
        return read, located.folder
    checkpoint = read_openai(located.model[0], name, convert=convert)
    tokens = SpecialTokens.of_vocabulary(checkpoint.dimensions.vocab_size)
    assert tokens is not None
    tokenizer = tokenizer_source(tokens)
    with third_party_parser(cannot_load(tokenizer, "tokenizer")):
        return checkpoint, hub.repository_folder(tokenizer, weights=False)
