"""Whisper's tokenizer, read from its files: text of ids by a table, ids of text by `tokenizers`.

It gives what Transformers' `WhisperTokenizer` gives, at a fraction of the time that building one
takes. Files whose meaning depends on the code of Transformers are left to it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.files import (
    LARGEST_TOKENIZER,
    cannot_load,
    read_json,
)
from whisper_flash_attention.weights.tokenizer_files import (
    SPECIAL_LISTS,
    check_tokenizer_files,
)
from whisper_flash_attention.weights.tokens import SpecialTokens, timestamp_names

END_OF_TEXT = "<|endoftext|>"
_START = "<|startoftranscript|>"
_PREVIOUS = "<|startofprev|>"
_TIMESTAMP = re.compile(r"<\|(\d+\.\d+)\|>")
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
        self._bpe = (vocabulary, merges)
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

        vocabulary, merges = self._bpe
        split = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        pairs = [(left, right) for left, right in split]
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
    check_tokenizer_files(folder)
    if not path.exists():
        return None
    content = read_json(path, LARGEST_TOKENIZER)
    vocabulary = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    settings = _settings(folder)
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
        and _added_by_name(folder).items() <= ids.items()
        and _text(settings.get("eos_token", END_OF_TEXT)) == END_OF_TEXT
    )
    if not is_plain:
        return None
    _parse_the_rest(path, content)
    ordered = [added[index] for index in sorted(added)]
    prefix = bool(settings.get("add_prefix_space", False))
    return Tokenizer(vocabulary, content["model"]["merges"], ordered, add_prefix_space=prefix)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name, LARGEST_TOKENIZER)
    return settings


def _added_by_name(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    return read_json(path, LARGEST_TOKENIZER) if path.exists() else {}


def _named(settings: Mapping[str, Any]) -> Iterable[str]:
    """Texts of all special tokens that the configuration of a tokenizer names."""
    for name, value in settings.items():
        if name in SPECIAL_LISTS:
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
