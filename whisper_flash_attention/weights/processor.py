"""Processors (feature extractor and tokenizer) for checkpoints from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import ctranslate2_reader, openai_reader
from whisper_flash_attention.weights.files import (
    LARGEST_TOKENIZER,
    cannot_load,
    describe_error,
    read_json,
    third_party_parser,
)
from whisper_flash_attention.weights.sources import (
    Located,
    Source,
    hub_id,
    is_bare,
    locate,
    tokenizer_source,
)
from whisper_flash_attention.weights.tokenizer import (
    END_OF_TEXT,
    check_ids,
    check_text,
    check_tokenizer,
    check_tokenizer_files,
    tokenizer_path,
)
from whisper_flash_attention.weights.tokens import SpecialTokens, timestamp_names
from whisper_flash_attention.weights.transformers_folder import check_feature_extractor_files

if TYPE_CHECKING:
    from transformers import WhisperProcessor, WhisperTokenizer


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
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    located = locate(source, weights=False)
    tokens = None
    if located.kind == "transformers":
        extractor = _from_transformers(WhisperFeatureExtractor, source)
    else:
        mel_bins, tokens = _read_dimensions(located)
        extractor = WhisperFeatureExtractor(feature_size=mel_bins)
        if tokenizer is None and located.kind == "openai":
            tokenizer = tokenizer_source(tokens)
    made = _load_tokenizer(tokenizer or source, tokens)
    return WhisperProcessor(extractor, made)


def _read_dimensions(located: Located) -> tuple[int, SpecialTokens]:
    if located.kind == "ctranslate2":
        return ctranslate2_reader.read_dimensions(located.model)
    return openai_reader.read_dimensions(located.model[0])


def _load_tokenizer(source: Source, tokens: SpecialTokens | None) -> WhisperTokenizer:
    from transformers import WhisperTokenizer

    located = locate(source, weights=False)
    if located.kind == "openai":
        raise WeightsError(
            f"{source}: an OpenAI checkpoint holds no tokenizer, give another source"
        )
    folder = located.folder
    if folder is not None and (located.kind == "ctranslate2" or is_bare(folder)):
        tokenizer = _build_tokenizer(folder)
        tokens = tokens or SpecialTokens.of_vocabulary(len(tokenizer))
    else:
        tokenizer = _from_transformers(WhisperTokenizer, source)
        # Where it finds no files, Transformers makes a tokenizer without a vocabulary.
        if "<|notimestamps|>" not in tokenizer.get_vocab():
            name = hub_id(source)
            reason = "no files of a tokenizer were found"
            raise WeightsError(_cannot_load(name, "WhisperTokenizer", reason))
    check_text(source, tokenizer)
    if tokens is not None:
        check_ids(source, tokenizer, tokens)
    return tokenizer


def _from_transformers(kind: Any, source: Source) -> Any:
    name = hub_id(source)
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if Path(name).is_dir():
        is_tokenizer = kind.__name__ == "WhisperTokenizer"
        (check_tokenizer_files if is_tokenizer else check_feature_extractor_files)(Path(name))
    with third_party_parser(lambda error: _cannot_load(name, kind.__name__, describe_error(error))):
        return kind.from_pretrained(name)


def _cannot_load(name: str, what: str, reason: str) -> str:
    hint = ". If it lies elsewhere, give its place as tokenizer=" if "Tokenizer" in what else ""
    return f"{name}: Transformers cannot load its {what} ({reason}){hint}"


def _build_tokenizer(folder: Path) -> WhisperTokenizer:
    """Build the tokenizer of a folder that has `tokenizer.json` and no configuration for it."""
    from transformers import AddedToken, WhisperTokenizer

    path = tokenizer_path(folder)
    check_tokenizer_files(folder)
    added = check_tokenizer(str(path), read_json(path, LARGEST_TOKENIZER))
    # Transformers takes the last of these for the last token before the timestamps.
    special = [token["content"] for token in added if token.get("special")]
    with third_party_parser(cannot_load(path, "tokenizer")):
        tokenizer: WhisperTokenizer = WhisperTokenizer.from_pretrained(
            str(folder), pad_token=END_OF_TEXT, additional_special_tokens=special
        )
        tokenizer.add_tokens(
            [AddedToken(name, special=False, normalized=True) for name in timestamp_names()]
        )
    return tokenizer
