"""Checks of a tokenizer's files before `tokenizers` and Transformers read them.

Their readers raise exceptions of any type, and the Rust part aborts with a panic printed to
standard error, where a value is not what they expect. The checks here cover what they read; what
is only stored (descriptions, versions) may be anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import shorten
from whisper_flash_attention.weights.files import (
    LARGEST_TOKENIZER,
    open_regular,
    read_json,
)

# Whisper has 51,866 tokens.
_MOST_TOKENS = 1 << 20
_LONGEST_PADDING = 1 << 12
_LONGEST_TOKEN = 1 << 10  # characters
# Lists of special tokens, by their names in Transformers 4 and 5.
SPECIAL_LISTS = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
# The characters that stand for bytes in byte-level BPE (GPT-2's `bytes_to_unicode`).
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_ALPHABET = frozenset(map(chr, (*_PRINTABLE, *range(256, 512 - len(_PRINTABLE)))))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def check_tokenizer_files(folder: Path) -> None:
    """Check all files of a folder that Transformers reads for a Whisper tokenizer.

    Raises:
        WeightsError: a file is not regular, not readable, or not what its name says.
    """
    checks: dict[str, Callable[[str, dict[str, Any]], object]] = {
        "tokenizer.json": check_tokenizer,
        "tokenizer_config.json": check_tokenizer_config,
        "special_tokens_map.json": check_special_tokens,
        "added_tokens.json": check_vocabulary,
        "vocab.json": check_vocabulary,
        "normalizer.json": _check_spellings,
    }
    for name, check in checks.items():
        path = folder / name
        if os.path.lexists(path):
            check(str(path), read_json(path, LARGEST_TOKENIZER))
    path = folder / "merges.txt"
    if os.path.lexists(path):
        with open_regular(path) as file:
            data = file.read(LARGEST_TOKENIZER + 1)
        check_merges(str(path), data)


def check_tokenizer(path: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check a `tokenizer.json`; return its added tokens, ordered by id.

    Args:
        path: the file, for messages.
        content: its JSON object.

    Raises:
        WeightsError: it is not a byte-level BPE tokenizer as Whisper's.
    """
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        raise WeightsError(f"{path}: no 'model' or no 'added_tokens': not a tokenizer")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise WeightsError(f"{path}: its model has no 'vocab' or no 'merges': not Whisper's")
    if model.get("type", "BPE") != "BPE":
        raise WeightsError(f"{path}: a model of type {shorten(model['type'])}, expected BPE")
    check_vocabulary(path, vocabulary)
    odd = set("".join(vocabulary)) - _ALPHABET
    if odd:
        raise WeightsError(
            f"{path}: its tokens have characters that stand for no byte ({shorten(min(odd))}): not "
            "a byte-level BPE tokenizer"
        )
    if not _are_merges(merges, vocabulary):
        _check_each_merge(path, merges, vocabulary)
    _check_padding(path, content)
    ids: dict[str, Any] = {}
    for token in added:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or not _is_id(token.get("id"))
        ):
            raise WeightsError(f"{path}: added token {shorten(token)} has no content or no id")
        _check_added_token(path, {name: token[name] for name in token if name != "id"})
        ids[token["content"]] = token["id"]
    if len(ids) != len(added) or len(set(ids.values())) != len(added):
        raise WeightsError(f"{path}: an added token or its id is there twice")
    return sorted(added, key=lambda token: int(token["id"]))


def check_vocabulary(path: str, vocabulary: Mapping[str, Any]) -> None:
    """Check a map of tokens to ids: whole numbers, each once."""
    indices = vocabulary.values()
    is_plain = (  # in milliseconds; otherwise the first that is wrong is looked for
        set(map(type, indices)) <= {int}
        and min(indices, default=0) >= 0
        and max(indices, default=0) < _MOST_TOKENS
        and max(map(len, vocabulary), default=0) <= _LONGEST_TOKEN
    )
    for token, index in () if is_plain else vocabulary.items():
        if not _is_id(index):
            raise WeightsError(f"{path}: token {shorten(token)} has the id {shorten(index)}")
        if len(token) > _LONGEST_TOKEN:
            raise WeightsError(f"{path}: token {shorten(token)} has {len(token)} characters")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise WeightsError(f"{path}: two tokens have the same id")


def check_merges(path: str, data: bytes) -> None:
    """Check a `merges.txt`: lines of two tokens, after an optional line with the version."""
    if len(data) > LARGEST_TOKENIZER:
        raise WeightsError(f"{path}: more than {LARGEST_TOKENIZER} bytes, too many for merges")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: not UTF-8") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#version") and len(line.split(" ")) != 2:
            raise WeightsError(f"{path}: line {number}, {shorten(line)}, is no pair of tokens")


def check_special_tokens(path: str, content: Mapping[str, Any]) -> None:
    """Check names of special tokens: strings, or objects as `AddedToken` takes them."""
    for name, value in content.items():
        if name.endswith("_token") and value is not None:
            _check_named_token(path, name, value)
        elif name in SPECIAL_LISTS and value is not None:
            if not isinstance(value, list | dict):
                raise WeightsError(f"{path}: {name} is {shorten(value)}, expected a list")
            for token in value.values() if isinstance(value, dict) else value:
                _check_named_token(path, name, token)


def check_tokenizer_config(path: str, content: Mapping[str, Any]) -> None:
    """Check a `tokenizer_config.json` for what the tokenizer's class and its reader use."""
    check_special_tokens(
        path, {name: value for name, value in content.items() if not name.startswith("add_")}
    )
    decoder = content.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise WeightsError(f"{path}: added_tokens_decoder is no JSON object")
    for index, token in decoder.items():
        if not index.isascii() or not index.isdigit() or not _is_id(int(index[:10])):
            raise WeightsError(f"{path}: added_tokens_decoder has the id {shorten(index)}")
        _check_added_token(path, token)
    for name in ("add_prefix_space", "predict_timestamps", "clean_up_tokenization_spaces"):
        value = content.get(name)
        if value is not None and not isinstance(value, bool):
            raise WeightsError(f"{path}: {name} is {shorten(value)}, expected true or false")
    for name in ("language", "task", "tokenizer_class", "processor_class"):
        value = content.get(name)
        if value is not None and not isinstance(value, str):
            raise WeightsError(f"{path}: {name} is {shorten(value)}, expected a string")
    longest = content.get("model_max_length")
    if longest is not None and type(longest) not in (int, float):
        raise WeightsError(f"{path}: model_max_length is {shorten(longest)}, expected a number")
    if content.get("init_inputs", []) != []:
        raise WeightsError(f"{path}: init_inputs is {shorten(content['init_inputs'])}")


def _check_named_token(path: str, name: str, value: object) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: {name} is {shorten(value)}, expected a token")
    _check_added_token(path, value)


def _check_added_token(path: str, token: object) -> None:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise WeightsError(f"{path}: added token {shorten(token)} has no content or no id")
    if len(token["content"]) > _LONGEST_TOKEN:
        raise WeightsError(f"{path}: an added token has {len(token['content'])} characters")
    for name, value in token.items():
        if name in _FLAGS and not isinstance(value, bool):
            raise WeightsError(
                f"{path}: {name} of token {shorten(token['content'])} is {shorten(value)}"
            )
        if name not in (*_FLAGS, "content", "__type"):
            raise WeightsError(
                f"{path}: token {shorten(token['content'])} has the unknown key {shorten(name)}"
            )


def _check_padding(path: str, content: Mapping[str, Any]) -> None:
    """Refuse padding that makes text of any length a huge number of tokens."""
    padding, truncation = content.get("padding"), content.get("truncation")
    if truncation is not None and not isinstance(truncation, dict):
        raise WeightsError(f"{path}: truncation is {shorten(truncation)}")
    if padding is None:
        return
    if not isinstance(padding, dict):
        raise WeightsError(f"{path}: padding is {shorten(padding)}")
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) else 0
    multiple = padding.get("pad_to_multiple_of") or 0
    for length in (fixed, multiple):
        if type(length) is not int or not 0 <= length <= _LONGEST_PADDING:
            raise WeightsError(f"{path}: padding to {shorten(length)} tokens")


def _check_spellings(path: str, content: Mapping[str, Any]) -> None:
    if not all(isinstance(value, str) for value in content.values()):
        raise WeightsError(f"{path}: does not map spellings to spellings")


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_TOKENS


def _are_merges(merges: list[Any], vocabulary: dict[str, Any]) -> bool:
    """Whether all merges are pairs of tokens that together are one; in a few operations on all.

    True is certain; False may be wrong.
    """
    kinds = set(map(type, merges))
    if kinds == {list}:
        if set(map(len, merges)) != {2} or set(map(type, chain.from_iterable(merges))) != {str}:
            return False
        merges = list(map(" ".join, merges))
    elif kinds != {str}:
        return not merges
    text = "\n".join(merges)
    merged = text.replace(" ", "").split("\n")
    known = vocabulary.keys()
    return (
        len(merged) == len(merges)
        and set(map(str.count, merges, repeat(" "))) == {1}
        and known >= set(merged)
        and known >= set(text.replace("\n", " ").split(" "))
    )


def _check_each_merge(path: str, merges: list[Any], vocabulary: dict[str, Any]) -> None:
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not _can_merge(pair, vocabulary):
            raise WeightsError(f"{path}: merge {shorten(merge)} is of unknown tokens")


def _can_merge(pair: list[Any], vocabulary: dict[str, Any]) -> bool:
    left, right = pair
    if not isinstance(left, str) or not isinstance(right, str):
        return False
    return left in vocabulary and right in vocabulary and left + right in vocabulary
