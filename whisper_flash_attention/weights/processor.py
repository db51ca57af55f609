"""Processors (feature extractor and tokenizer) for checkpoints from anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AddedToken, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import ctranslate2_reader, openai_reader
from whisper_flash_attention.weights.files import (
    LARGEST_TOKENIZER,
    cannot_load,
    describe_error,
    read_json,
    third_party_parser,
)
from whisper_flash_attention.weights.sources import TOKENIZER_FILES, Located, Source, hub_id, locate
from whisper_flash_attention.weights.tokenizer_files import check_tokenizer, check_tokenizer_files
from whisper_flash_attention.weights.tokens import SpecialTokens, timestamp_names
from whisper_flash_attention.weights.transformers_folder import check_feature_extractor_files

# Number of languages -> a repository with the tokenizer of all of OpenAI's checkpoints with as
# many, for checkpoints that come without one; 0 is English-only.
_TOKENIZERS = {
    0: "openai/whisper-tiny.en",
    99: "openai/whisper-tiny",
    100: "openai/whisper-large-v3",
}
_END_OF_TEXT = "<|endoftext|>"


def load_processor(source: Source, tokenizer: Source | None = None) -> WhisperProcessor:
    """Load the processor that goes with a checkpoint.

    A CTranslate2 folder brings its `tokenizer.json`; timestamp tokens that it lacks are added. An
    OpenAI checkpoint brings no tokenizer: it comes from the repository on the Hub that matches.

    Args:
        source: as `read_checkpoint` takes it, Hub ids and OpenAI's short names included.
        tokenizer: another source to take the tokenizer from.

    Returns:
        A processor as the Hub's, except that `tokenizer.normalize` needs a table of spellings
        (`normalizer.json`) that CTranslate2 folders do not carry.

    Raises:
        WeightsError: something is missing, wrong, or does not fit the checkpoint.
        MissingPackage: the package of `package:NAME` is not installed.
    """
    located = locate(source, weights=False)
    tokens = None
    if located.kind == "transformers":
        extractor = _from_transformers(WhisperFeatureExtractor, source)
    else:
        mel_bins, tokens = _read_dimensions(located)
        extractor = WhisperFeatureExtractor(feature_size=mel_bins)
        if tokenizer is None and located.kind == "openai":
            tokenizer = _TOKENIZERS[len(tokens.languages) if tokens.multilingual else 0]
    made = _load_tokenizer(tokenizer or source, tokens)
    return WhisperProcessor(extractor, made)


def _read_dimensions(located: Located) -> tuple[int, SpecialTokens]:
    if located.kind == "ctranslate2":
        return ctranslate2_reader.read_dimensions(located.model)
    return openai_reader.read_dimensions(located.model[0])


def _load_tokenizer(source: Source, tokens: SpecialTokens | None) -> WhisperTokenizer:
    located = locate(source, weights=False)
    if located.kind == "openai":
        raise WeightsError(
            f"{source}: an OpenAI checkpoint holds no tokenizer, give another source"
        )
    folder = located.folder
    if folder is not None and (located.kind == "ctranslate2" or _is_bare(folder)):
        tokenizer = _build_tokenizer(folder)
        tokens = tokens or SpecialTokens.of_vocabulary(len(tokenizer))
    else:
        tokenizer = _from_transformers(WhisperTokenizer, source)
        # Where it finds no files, Transformers makes a tokenizer without a vocabulary.
        if "<|notimestamps|>" not in tokenizer.get_vocab():
            name = hub_id(source)
            reason = "no files of a tokenizer were found"
            raise WeightsError(_cannot_load(name, "WhisperTokenizer", reason))
    _check_text(source, tokenizer)
    if tokens is not None:
        _check_ids(source, tokenizer, tokens)
    return tokenizer


def _is_bare(folder: Path) -> bool:
    """Whether a tokenizer lies there without the configuration that Transformers needs."""
    found = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return found == {"tokenizer.json"}


def _from_transformers(kind: Any, source: Source) -> Any:
    name = hub_id(source)
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if Path(name).is_dir():
        check = check_tokenizer_files if kind is WhisperTokenizer else check_feature_extractor_files
        check(Path(name))
    with third_party_parser(lambda error: _cannot_load(name, kind.__name__, describe_error(error))):
        return kind.from_pretrained(name)


def _cannot_load(name: str, what: str, reason: str) -> str:
    hint = ". If it lies elsewhere, give its place as tokenizer=" if "Tokenizer" in what else ""
    return f"{name}: Transformers cannot load its {what} ({reason}){hint}"


def _build_tokenizer(folder: Path) -> WhisperTokenizer:
    """Build the tokenizer of a folder that has `tokenizer.json` and no configuration for it."""
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise WeightsError(
            f"{folder}: no tokenizer.json; a vocabulary alone cannot encode text. Say with "
            "tokenizer= where a tokenizer is, such as openai/whisper-tiny"
        )
    check_tokenizer_files(folder)
    added = check_tokenizer(str(path), read_json(path, LARGEST_TOKENIZER))
    # Transformers takes the last of these for the last token before the timestamps.
    special = [token["content"] for token in added if token.get("special")]
    with third_party_parser(cannot_load(path, "tokenizer")):
        tokenizer: WhisperTokenizer = WhisperTokenizer.from_pretrained(
            str(folder), pad_token=_END_OF_TEXT, additional_special_tokens=special
        )
        tokenizer.add_tokens(
            [AddedToken(name, special=False, normalized=True) for name in timestamp_names()]
        )
    return tokenizer


def _check_text(source: Source, tokenizer: WhisperTokenizer) -> None:
    """Require an end of the text, the marker of a prompt, and every text token."""
    vocabulary = tokenizer.get_vocab()
    for name in (_END_OF_TEXT, "<|startoftranscript|>", "<|startofprev|>"):
        if name not in vocabulary:
            raise WeightsError(f"{source}: its tokenizer has no {name}")
    end = vocabulary[_END_OF_TEXT]
    if tokenizer.eos_token_id != end:
        raise WeightsError(f"{source}: its tokenizer ends text with {tokenizer.eos_token_id}")
    missing = end - sum(index < end for index in vocabulary.values())
    if missing:
        raise WeightsError(f"{source}: its tokenizer has no text for {missing} ids below {end}")


def _check_ids(source: Source, tokenizer: WhisperTokenizer, tokens: SpecialTokens) -> None:
    """Require the special and timestamp tokens to have the ids that the model was trained on."""
    names = timestamp_names()
    # Those between have had other names over time ("iw" for "he").
    languages = tokens.language_ids
    first_language, *_, last_language = languages
    expected = {
        _END_OF_TEXT: tokens.end_of_text,
        "<|startoftranscript|>": tokens.start_of_transcript,
        first_language: languages[first_language],
        last_language: languages[last_language],
        "<|translate|>": tokens.translate,
        "<|transcribe|>": tokens.transcribe,
        "<|startofprev|>": tokens.start_of_previous,
        "<|notimestamps|>": tokens.no_timestamps,
        names[0]: tokens.first_timestamp,
        names[-1]: tokens.first_timestamp + len(names) - 1,
    }
    for name, token in expected.items():
        found = tokenizer.convert_tokens_to_ids(name)
        if found != token:
            raise WeightsError(
                f"{source}: its tokenizer has the id {found} for {name}, the model has {token}: "
                "they do not belong together"
            )
