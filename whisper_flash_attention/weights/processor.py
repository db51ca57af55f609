"""Processors (feature extractor and tokenizer) for checkpoints from anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AddedToken, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import ctranslate2, openai
from whisper_flash_attention.weights.checkpoint import shorten
from whisper_flash_attention.weights.files import read_json
from whisper_flash_attention.weights.sources import TOKENIZER_FILES, Located, Source, hub_id, locate
from whisper_flash_attention.weights.tokens import SpecialTokens, timestamp_names

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
        return ctranslate2.read_dimensions(located.model)
    return openai.read_dimensions(located.model[0])


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
            name = hub_id(os.fspath(source))
            raise _cannot_load(name, "WhisperTokenizer", "no files of a tokenizer were found")
    if tokens is not None:
        _check_ids(source, tokenizer, tokens)
    return tokenizer


def _is_bare(folder: Path) -> bool:
    """Whether a tokenizer lies there without the configuration that Transformers needs."""
    found = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return found == {"tokenizer.json"}


def _from_transformers(kind: Any, source: Source) -> Any:
    name = hub_id(os.fspath(source))
    try:
        return kind.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, kind.__name__, str(error).partition("\n")[0]) from error


def _cannot_load(name: str, what: str, reason: str) -> WeightsError:
    hint = ". If it lies elsewhere, give its place as tokenizer=" if "Tokenizer" in what else ""
    return WeightsError(
        f"{name}: Transformers cannot load its {what} ({shorten(reason, 200)}){hint}"
    )


def _build_tokenizer(folder: Path) -> WhisperTokenizer:
    """Build the tokenizer of a folder that has `tokenizer.json` and no configuration for it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no tokenizer.json; a vocabulary alone cannot encode text. Say with "
            "tokenizer= where a tokenizer is, such as openai/whisper-tiny"
        )
    added = _check_tokenizer(path, read_json(path))
    # Transformers takes the last of these for the last token before the timestamps.
    special = [token["content"] for token in added if token.get("special")]
    try:
        tokenizer: WhisperTokenizer = WhisperTokenizer.from_pretrained(
            str(folder), pad_token=_END_OF_TEXT, additional_special_tokens=special
        )
    except (OSError, TypeError, ValueError, LookupError) as error:
        raise WeightsError(f"{path}: not a tokenizer ({shorten(error, 200)})") from error
    tokenizer.add_tokens(
        [AddedToken(name, special=False, normalized=True) for name in timestamp_names()]
    )
    return tokenizer


def _check_tokenizer(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Check what the tokenizer's own reader would crash on; return the added tokens by id."""
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        raise WeightsError(f"{path}: no 'model' or no 'added_tokens': not a tokenizer")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise WeightsError(f"{path}: its model has no 'vocab' or no 'merges': not Whisper's")
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 1 << 32:
            raise WeightsError(f"{path}: token {shorten(token)} has the id {shorten(index)}")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not _can_merge(pair, vocabulary):
            raise WeightsError(f"{path}: merge {shorten(merge)} is of unknown tokens")
    for token in added:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or type(token.get("id")) is not int
        ):
            raise WeightsError(f"{path}: added token {shorten(token)} has no content or no id")
    return sorted(added, key=lambda token: int(token["id"]))


def _can_merge(pair: list[Any], vocabulary: dict[str, Any]) -> bool:
    left, right = pair
    if not isinstance(left, str) or not isinstance(right, str):
        return False
    return left in vocabulary and right in vocabulary and left + right in vocabulary


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
