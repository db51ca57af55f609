"""Processors from anywhere work like those of the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from tests.weights.writers import small_whisper, to_ctranslate2, to_openai, write_folder
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import load_processor, packaged_source
from whisper_flash_attention.weights.tokenizer import check_tokenizer_files

# Source, id of <|startoftranscript|>, and ids of " Hello" and " world" as OpenAI's tokenizers say.
KNOWN = {"package:tiny.en": (50257, 18435, 995), "package:base": (50258, 2425, 1002)}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is out of reach, and nobody waits for it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def processors() -> dict[str, WhisperProcessor]:
    return {source: load_processor(source) for source in KNOWN}


@pytest.fixture(params=KNOWN)
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def processor(source: str, processors: dict[str, WhisperProcessor]) -> WhisperProcessor:
    return processors[source]


@pytest.fixture
def ids(source: str, processor: WhisperProcessor) -> list[int]:
    """A transcript with its prompt and two segments: 0 s to 1 s, 1 s to 2.5 s."""
    start, hello, world = KNOWN[source]
    zero = processor.tokenizer.convert_tokens_to_ids("<|0.00|>")
    return [start, zero, hello, zero + 50, zero + 50, world, zero + 125, start - 1]


def test_the_vocabulary_ends_with_thirty_seconds(source: str, processor: WhisperProcessor) -> None:
    size = {"package:tiny.en": 51864, "package:base": 51865}[source]
    tokenizer = processor.tokenizer
    assert len(tokenizer) == size
    assert tokenizer.convert_tokens_to_ids("<|0.00|>") == size - 1501
    assert tokenizer.convert_tokens_to_ids("<|30.00|>") == size - 1
    assert tokenizer.timestamp_ids()[:2] == [size - 1501, size - 1500]


def test_text_is_decoded_without_special_tokens_and_timestamps(
    processor: WhisperProcessor, ids: list[int]
) -> None:
    assert processor.batch_decode([ids, ids], skip_special_tokens=True) == [" Hello world"] * 2
    assert processor.decode(torch.tensor(ids), skip_special_tokens=True) == " Hello world"


def test_timestamps_are_decoded_on_request(processor: WhisperProcessor, ids: list[int]) -> None:
    found = processor.decode(ids, skip_special_tokens=True, decode_with_timestamps=True)
    assert found == "<|0.00|> Hello<|1.00|><|1.00|> world<|2.50|>"


def test_offsets_are_decoded_on_request(processor: WhisperProcessor, ids: list[int]) -> None:
    found = processor.decode(ids, skip_special_tokens=True, output_offsets=True)
    assert found == {
        "text": " Hello world",
        "offsets": [
            {"text": " Hello", "timestamp": (0.0, 1.0)},
            {"text": " world", "timestamp": (1.0, 2.5)},
        ],
    }


def test_prompts_begin_with_their_marker(source: str, processor: WhisperProcessor) -> None:
    _, hello, world = KNOWN[source]
    marker = processor.tokenizer.convert_tokens_to_ids("<|startofprev|>")
    assert processor.get_prompt_ids("Hello world").tolist() == [marker, hello, world]


def test_decoder_prompts_name_language_and_task(processors: dict[str, WhisperProcessor]) -> None:
    processor = processors["package:base"]
    found = processor.get_decoder_prompt_ids(language="german", task="translate")
    assert found == [(1, 50261), (2, 50358), (3, 50363)]


def test_features_are_those_of_the_model(processor: WhisperProcessor) -> None:
    found = processor(np.zeros(16000), sampling_rate=16000, return_tensors="pt").input_features
    assert found.shape == (1, 80, 3000)


def test_a_saved_processor_loads_in_transformers_and_here(
    source: str, processor: WhisperProcessor, ids: list[int], tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    for again in (WhisperProcessor.from_pretrained(tmp_path), load_processor(tmp_path)):
        assert again.decode(ids, decode_with_timestamps=True) == processor.decode(
            ids, decode_with_timestamps=True
        )
        assert again.tokenizer.all_special_ids == processor.tokenizer.all_special_ids


def test_large_v3_has_128_mel_bins(tmp_path: Path, processors: dict[str, WhisperProcessor]) -> None:
    model = small_whisper(vocab_size=51866, d_model=4, encoder_attention_heads=1, num_mel_bins=128)
    folder = write_folder(tmp_path, to_ctranslate2(model))
    content = tokenizer_of("base")
    following = [token for token in content["added_tokens"] if token["id"] > 50357]
    for token in following:
        token["id"] += 1
    content["added_tokens"].append(
        {**content["added_tokens"][2], "content": "<|yue|>", "id": 50358}
    )
    (folder / "tokenizer.json").write_text(json.dumps(content))
    processor = load_processor(folder)
    assert processor.feature_extractor.feature_size == 128
    assert processor.tokenizer.convert_tokens_to_ids("<|yue|>") == 50358
    assert processor.tokenizer.convert_tokens_to_ids("<|0.00|>") == 50365


def tokenizer_of(name: str) -> dict[str, Any]:
    content = (packaged_source(name).folder / "tokenizer.json").read_text()
    loaded: dict[str, Any] = json.loads(content)
    return loaded


@pytest.fixture
def folder(smallest: WhisperForConditionalGeneration, tmp_path: Path) -> Path:
    """A CTranslate2 folder with the tokenizer of tiny.en."""
    write_folder(tmp_path / "model", to_ctranslate2(smallest))
    tokenizer = packaged_source("tiny.en").folder / "tokenizer.json"
    shutil.copy(tokenizer, tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


def test_a_vocabulary_alone_is_not_enough(folder: Path, tiny_en: str) -> None:
    (folder / "tokenizer.json").rename(folder / "vocabulary.txt")
    with pytest.raises(WeightsError, match=r"no tokenizer\.json; a vocabulary alone .* tokenizer="):
        load_processor(folder)
    assert len(load_processor(folder, tokenizer=tiny_en).tokenizer) == 51864


def test_a_tokenizer_may_lie_in_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "tokenizer.json").rename(alone / "tokenizer.json")
    assert len(load_processor(folder, tokenizer=alone).tokenizer) == 51864


def test_a_tokenizer_of_another_model_is_refused(folder: Path, base: str) -> None:
    with pytest.raises(WeightsError, match="they do not belong together"):
        load_processor(folder, tokenizer=base)


@pytest.mark.usefixtures("offline")
def test_an_openai_checkpoint_takes_its_tokenizer_from_elsewhere(
    smallest: WhisperForConditionalGeneration, tiny_en: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save(to_openai(smallest), path)
    processor = load_processor(path, tokenizer=tiny_en)
    assert processor.feature_extractor.feature_size == 80
    assert len(processor.tokenizer) == 51864
    with pytest.raises(WeightsError, match=r"openai/whisper-tiny\.en: .* tokenizer="):
        load_processor(path)
    with pytest.raises(WeightsError, match="an OpenAI checkpoint holds no tokenizer"):
        load_processor(tiny_en, tokenizer=path)


@pytest.mark.usefixtures("offline")
def test_a_hub_id_out_of_reach_is_one_clear_line() -> None:
    with pytest.raises(WeightsError, match="nobody/nothing: Transformers cannot load") as caught:
        load_processor("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_short_names_mean_the_hub() -> None:
    with pytest.raises(WeightsError, match="openai/whisper-small: Transformers cannot load"):
        load_processor("small")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"model": None}, "no 'model' or no 'added_tokens'"),
    "no added tokens": ({"added_tokens": None}, "no 'model' or no 'added_tokens'"),
    "another kind": ({"model": {"type": "Unigram", "vocab": []}}, "no 'vocab' or no 'merges'"),
    "an id that is no number": (
        {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
        "token a has the id b",
    ),
    "a merge of unknown tokens": (
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        "merge .* is of unknown tokens",
    ),
    "a merge of three": (
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a a"]}},
        "merge a a a is of unknown tokens",
    ),
    "a nameless token": ({"added_tokens": [{"id": 1}]}, "added token .* has no content or no id"),
    "no special tokens": ({"added_tokens": []}, r"has no <\|startoftranscript\|>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_refused(name: str, folder: Path) -> None:
    changes, message = BROKEN[name]
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer_of("tiny.en"), **changes}))
    with pytest.raises(WeightsError, match=message):
        load_processor(folder)


def test_a_truncated_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"tokenizer\.json: not JSON"):
        load_processor(folder)


@pytest.mark.parametrize("longest", ["32", [32], {}, True])
def test_a_longest_text_that_is_no_number_is_refused(longest: object, tmp_path: Path) -> None:
    """Transformers compares it to a number when it encodes the first prompt."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": longest}))
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json: model_max_length is"):
        check_tokenizer_files(tmp_path)
