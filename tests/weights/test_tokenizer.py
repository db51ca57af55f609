"""Our reader of tokenizers gives the ids and the text that Transformers' gives, or leaves them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperTokenizer

from tests.weights.hostile import write_transformers_folder
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import load_processor, packaged_source
from whisper_flash_attention.weights.tokenizer import Tokenizer, read_tokenizer

TEXTS = (
    *("", " ", "Hello world", " Hello, world!", "1,000.50 \u20ac", "don't we'll"),
    *("\u00fcber na\u00efve caf\u00e9s", "\u65e5\u672c\u8a9e", "\u0645\u0631\u062d\u0628\u0627"),
    *("\U0001f600 \n\ttabs", "<|en|>", "a<|endoftext|>b", "before <|0.00|> after"),
    *("<|startofprev|>", "<|nonsense|>"),
)


@pytest.fixture(scope="module", params=["tiny.en", "base"])
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, WhisperTokenizer]:
    ours = read_tokenizer(packaged_source(request.param).folder, is_converted=True)
    assert ours is not None
    return ours, load_processor(f"package:{request.param}").tokenizer


def test_names_and_ids_are_transformers(pair: tuple[Tokenizer, WhisperTokenizer]) -> None:
    ours, theirs = pair
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.eos_token_id == theirs.eos_token_id
    everything = range(len(theirs))
    assert ours.convert_ids_to_tokens(everything) == theirs.convert_ids_to_tokens(everything)
    for name in ("<|startofprev|>", "<|0.02|>", "no such token"):
        assert ours.convert_tokens_to_ids(name) == theirs.convert_tokens_to_ids(name)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_by_transformers(
    pair: tuple[Tokenizer, WhisperTokenizer], text: str
) -> None:
    ours, theirs = pair
    found = ours.encode(text, add_special_tokens=False)
    assert found == theirs.encode(text, add_special_tokens=False)


def test_ids_are_decoded_as_by_transformers(pair: tuple[Tokenizer, WhisperTokenizer]) -> None:
    ours, theirs = pair
    rng = random.Random(0)
    end, size = theirs.eos_token_id, len(theirs)
    prompt = theirs.convert_tokens_to_ids("<|startofprev|>")
    for _ in range(100):
        ids = [
            rng.randrange(end) if rng.random() < 0.7 else rng.randrange(end, size)
            for _ in range(rng.randrange(12))
        ]
        for row in (ids, [prompt, *ids], [prompt, *ids, end + 1, *ids]):
            for skip in (False, True):
                assert ours.decode(row, skip_special_tokens=skip) == theirs.decode(
                    row, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_transformers_folder(tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def test_a_transformers_folder_is_read_as_by_transformers(folder: Path) -> None:
    theirs = WhisperTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder, is_converted=False)
    assert ours is not None
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode("abc ab", add_special_tokens=False) == theirs.encode(
        "abc ab", add_special_tokens=False
    )


def test_a_folder_of_earlier_releases_is_read_as_by_transformers(folder: Path) -> None:
    """They wrote names of tokens, and ids of added ones, into files of their own."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "added_tokens.json", **{token["content"]: token["id"] for token in added})
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False}
    change(folder / "special_tokens_map.json", eos_token=end, unk_token="")
    ours = read_tokenizer(folder, is_converted=False)
    assert ours is not None
    assert ours.get_vocab() == WhisperTokenizer.from_pretrained(folder).get_vocab()


LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "a token without an id": ("tokenizer_config.json", {"mask_token": "<|mask|>"}),
    "such an additional one": ("special_tokens_map.json", {"extra_special_tokens": ["<|x|>"]}),
    "another end": ("tokenizer_config.json", {"eos_token": "<|startoftranscript|>"}),
    "another id": ("added_tokens.json", {"<|en|>": 3}),
    "an id for two": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"258": {"content": "<|other|>", "special": True}}},
    ),
    "a gap": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"99999": {"content": "<|other|>", "special": True}}},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_ids_that_transformers_chooses_are_left_to_it(name: str, folder: Path) -> None:
    file, values = LEFT[name]
    change(folder / file, **values)
    assert read_tokenizer(folder, is_converted=False) is None


def test_without_the_file_of_all_it_is_left_to_transformers(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert read_tokenizer(folder, is_converted=False) is None
    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        read_tokenizer(folder, is_converted=True)


def test_what_only_the_parser_of_the_file_knows_is_checked_by_it(folder: Path) -> None:
    change(folder / "tokenizer.json", decoder={"type": "nonsense"})
    with pytest.raises(WeightsError, match=r"tokenizer\.json: cannot load its tokenizer"):
        read_tokenizer(folder, is_converted=False)
