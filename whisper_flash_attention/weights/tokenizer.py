"""Whisper's tokenizer, read from its files: text of ids by a table, ids of text by `tokenizers`.

It gives what Transformers' `WhisperTokenizer` gives, at a fraction of the time that building one
takes. Files whose meaning depends on the code of Transformers are left to it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain, repeat
from operator import add
from pathlib import Path
from typing import Any

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import shorten
from whisper_flash_attention.weights.files import (
    LARGEST_TOKENIZER,
    cannot_load,
    open_regular,
    read_json,
)
from whisper_flash_attention.weights.tokens import SpecialTokens, timestamp_names

END_OF_TEXT = "<|endoftext|>"
_START = "<|startoftranscript|>"
_PREVIOUS = "<|startofprev|>"
_TIMESTAMP = re.compile(r"<\|(\d+\.\d+)\|>")
# Whisper has 51,866 tokens.
_MOST_TOKENS = 1 << 20
_LONGEST_PADDING = 1 << 12
_LONGEST_TOKEN = 1 << 10  # characters
# Lists of special tokens, by their names in Transformers 4 and 5.
_SPECIAL_LISTS = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
# What `AddedToken` takes beside the text.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """A byte-level BPE tokenizer with added tokens, by the names of Transformers' methods.

    Args:
        vocabulary: ids of text tokens by name, from 0 without gaps.
        merges: pairs of names, joined by a blank or not.
        added: tokens with `content`, `id` and the flags of `AddedToken`, in the order of their ids,
            which follow those of the vocabulary where they are not in it.
        add_prefix_space: whether encoded text gets a blank before it.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[str | list[str]],
        added: Sequence[Mapping[str, Any]],
        *,
        add_prefix_space: bool = False,
    ) -> None:
        # Kept small, since few texts are encoded: no token has a blank or the end of a line in it.
        self._size = len(vocabulary)
        self._merges = "\n".join(
            each if isinstance(each, str) else " ".join(each) for each in merges
        )
        self._added = added
        self._add_prefix_space = add_prefix_space
        added_ids: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._ids = vocabulary | added_ids
        self._names = [""] * len(self._ids)
        for name, index in self._ids.items():
            self._names[index] = name
        self._special = frozenset(token["id"] for token in added if token.get("special"))

    def __len__(self) -> int:
        return len(self._names)

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens by name."""
        return self._ids

    @property
    def eos_token_id(self) -> int:
        """The id of <|endoftext|>."""
        return self._ids[END_OF_TEXT]

    def convert_tokens_to_ids(self, name: str) -> int:
        """The id of a token; that of <|endoftext|> if there is none of this name."""
        return self._ids.get(name, self.eos_token_id)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """The names of tokens."""
        return [self._names[index] for index in ids]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of text; those of a prompt around it (`add_special_tokens`) are never added."""
        assert not add_special_tokens
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _encoder(self) -> Any:
        import tokenizers

        vocabulary = {name: index for index, name in enumerate(self._names[: self._size])}
        lines = self._merges.split("\n") if self._merges else []
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=self._add_prefix_space)
        made.pre_tokenizer = byte_level
        made.add_tokens(
            [
                tokenizers.AddedToken(
                    each["content"], **{flag: each[flag] for flag in _FLAGS if flag in each}
                )
                for each in self._added
            ]
        )
        return made

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """The text of ids without timestamps; with `skip_special_tokens` without a prompt, too."""
        assert not clean_up_tokenization_spaces
        kept = list(ids)
        if skip_special_tokens:
            if kept[:1] == [self._ids[_PREVIOUS]]:
                start = self._ids[_START]
                kept = kept[kept.index(start) :] if start in kept else []
            kept = [index for index in kept if index not in self._special]
        data = b"".join(_bytes_of(self._names[each]) for each in kept if each < len(self._names))
        return _TIMESTAMP.sub("", data.decode("utf-8", errors="replace"))


def token_bytes(name: str) -> bytes:
    """The bytes of the text that a token stands for, by its name in the vocabulary."""
    disguised = _disguised_bytes()
    return bytes(disguised[character] for character in name)


def _bytes_of(name: str) -> bytes:
    """As `token_bytes`; an added token may have characters that stand for themselves."""
    return token_bytes(name) if _disguised_bytes().keys() >= set(name) else name.encode()


@cache
def _disguised_bytes() -> dict[str, int]:
    """GPT-2's byte for each character of a token's name (OpenAI's `gpt-2/src/encoder.py`).

    Bytes that print stand for themselves; the others, in order, for the characters from 256 on.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def tokenizer_path(folder: Path) -> Path:
    """The `tokenizer.json` of a folder that must have one; raises `WeightsError`."""
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise WeightsError(
            f"{folder}: no tokenizer.json; a vocabulary alone cannot encode text. Say with "
            "tokenizer= where a tokenizer is, such as openai/whisper-tiny"
        )
    return path


def read_tokenizer(folder: Path, *, is_converted: bool) -> Tokenizer | None:
    """The tokenizer of a folder with `tokenizer.json`; None if Transformers must read it.

    Args:
        is_converted: the folder needs no other file of a tokenizer, and timestamps that are missing
            are added.

    Raises:
        WeightsError: a file is missing, damaged, or not what its name says.
    """
    path = tokenizer_path(folder) if is_converted else folder / "tokenizer.json"
    contents = check_tokenizer_files(folder)
    content = contents.get("tokenizer.json")
    if content is None:
        return None
    vocabulary = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    settings = {
        **contents.get("special_tokens_map.json", {}),
        **contents.get("tokenizer_config.json", {}),
    }
    for index, token in settings.get("added_tokens_decoder", {}).items():
        if added.get(int(index), token)["content"] != token["content"]:
            return None
        added[int(index)] = {"id": int(index), **token}
    ids = vocabulary | {token["content"]: index for index, token in added.items()}
    following = [name for name in timestamp_names() if name not in ids] if is_converted else []
    for index, name in enumerate(following, len(ids)):
        added[index] = {"content": name, "id": index, "special": False, "normalized": True}
        ids[name] = index
    is_plain = (
        # Transformers gives a number of its own to what has none, or another one.
        sorted(ids.values()) == list(range(len(ids)))
        and max(vocabulary.values(), default=-1) < len(vocabulary)
        and ids.keys() >= set(_named(settings)) - {""}
        and contents.get("added_tokens.json", {}).items() <= ids.items()
        and _text(settings.get("eos_token", END_OF_TEXT)) == END_OF_TEXT
    )
    if not is_plain:
        return None
    _parse_the_rest(path, content)
    ordered = [added[index] for index in sorted(added)]
    prefix = bool(settings.get("add_prefix_space", False))
    return Tokenizer(vocabulary, content["model"]["merges"], ordered, add_prefix_space=prefix)


def _named(settings: Mapping[str, Any]) -> Iterable[str]:
    """Texts of all special tokens that the configuration of a tokenizer names."""
    for name, value in settings.items():
        if name in _SPECIAL_LISTS:
            values = value.values() if isinstance(value, dict) else value or ()
            yield from map(_text, values)
        elif name.endswith("_token") and not name.startswith("add_") and value is not None:
            yield _text(value)


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _parse_the_rest(path: Path, content: Mapping[str, Any]) -> None:
    """Have `tokenizers` parse what is not a token, so that it raises what it would raise."""
    import tokenizers

    model = {**content["model"], "vocab": {}, "merges": [], "unk_token": None}
    rest = json.dumps({**content, "model": model, "added_tokens": []})
    try:
        tokenizers.Tokenizer.from_str(rest)
    except Exception as error:  # the package raises no class of its own
        raise WeightsError(cannot_load(path, "tokenizer")(error)) from error


def check_text(source: object, tokenizer: Any) -> None:
    """Require an end of the text, the marker of a prompt, and every text token.

    Args:
        tokenizer: `Tokenizer`, or Transformers' `WhisperTokenizer`.
    """
    vocabulary = tokenizer.get_vocab()
    for name in (END_OF_TEXT, _START, _PREVIOUS):
        if name not in vocabulary:
            raise WeightsError(f"{source}: its tokenizer has no {name}")
    end = vocabulary[END_OF_TEXT]
    if tokenizer.eos_token_id != end:
        raise WeightsError(f"{source}: its tokenizer ends text with {tokenizer.eos_token_id}")
    missing = end - sum(index < end for index in vocabulary.values())
    if missing:
        raise WeightsError(f"{source}: its tokenizer has no text for {missing} ids below {end}")


def check_ids(source: object, tokenizer: Any, tokens: SpecialTokens) -> None:
    """Require the special and timestamp tokens to have the ids that the model was trained on."""
    names = timestamp_names()
    # Those between have had other names over time ("iw" for "he").
    languages = tokens.language_ids
    first_language, *_, last_language = languages
    expected = {
        END_OF_TEXT: tokens.end_of_text,
        _START: tokens.start_of_transcript,
        first_language: languages[first_language],
        last_language: languages[last_language],
        "<|translate|>": tokens.translate,
        "<|transcribe|>": tokens.transcribe,
        _PREVIOUS: tokens.start_of_previous,
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


# Checks of files before `tokenizers` and Transformers read them: their readers raise exceptions of
# any type, and the Rust part aborts with a panic printed to standard error, where a value is not
# what they expect. What is only stored (descriptions, versions) may be anything.


def check_tokenizer_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Check all files of a folder that Transformers reads for a Whisper tokenizer.

    Returns:
        What its JSON files hold, by their names.

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
    contents = {}
    for name, check in checks.items():
        path = folder / name
        if os.path.lexists(path):
            contents[name] = read_json(path, LARGEST_TOKENIZER)
            check(str(path), contents[name])
    path = folder / "merges.txt"
    if os.path.lexists(path):
        with open_regular(path) as file:
            data = file.read(LARGEST_TOKENIZER + 1)
        check_merges(str(path), data)
    return contents


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
    odd = set("".join(vocabulary)) - _disguised_bytes().keys()
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
        elif name in _SPECIAL_LISTS and value is not None:
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
        if set(map(len, merges)) != {2}:
            return False
        parts = list(chain.from_iterable(merges))
        if set(map(type, parts)) != {str}:
            return False
    elif kinds == {str}:
        if set(map(str.count, merges, repeat(" "))) != {1}:
            return False
        parts = " ".join(merges).split(" ")
    else:
        return not merges
    merged = map(add, parts[::2], parts[1::2])
    return all(map(vocabulary.__contains__, chain(parts, merged)))


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
