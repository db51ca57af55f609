"""The generation configurations are those of the repositories on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

from whisper_flash_attention.weights import read_checkpoint
from whisper_flash_attention.weights.tokens import SpecialTokens, generation_values


def make(vocabulary: int) -> GenerationConfig:
    tokens = SpecialTokens.of_vocabulary(vocabulary)
    assert tokens is not None
    return GenerationConfig(**generation_values(tokens, max_length=448))


def test_english_only_has_no_languages_and_no_tasks(tiny_en: str) -> None:
    checkpoint = read_checkpoint(tiny_en)
    assert checkpoint is not None
    found = checkpoint.generation_config
    assert not found.is_multilingual
    assert not hasattr(found, "lang_to_id")
    assert not hasattr(found, "task_to_id")
    assert found.alignment_heads == [
        [1, 0], [2, 0], [2, 5], [3, 0], [3, 1], [3, 2], [3, 3], [3, 4]
    ]  # fmt: skip
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (50257, 50256, 50256)
    assert (found.decoder_start_token_id, found.no_timestamps_token_id) == (50257, 50362)
    assert (found.prev_sot_token_id, found.max_initial_timestamp_index) == (50360, 50)
    assert (found.max_length, found.return_timestamps) == (448, False)
    assert found.begin_suppress_tokens == [220, 50256]
    assert len(found.suppress_tokens) == 90


def test_multilingual_has_99_languages_and_both_tasks(base: str) -> None:
    checkpoint = read_checkpoint(base)
    assert checkpoint is not None
    found = checkpoint.generation_config
    assert found.is_multilingual
    assert len(found.lang_to_id) == 99
    assert (found.lang_to_id["<|en|>"], found.lang_to_id["<|su|>"]) == (50259, 50357)
    assert found.task_to_id == {"translate": 50358, "transcribe": 50359}
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (50257, 50257, 50257)
    assert (found.decoder_start_token_id, found.no_timestamps_token_id) == (50258, 50363)
    assert found.prev_sot_token_id == 50361
    assert found.begin_suppress_tokens == [220, 50257]
    assert len(found.suppress_tokens) == 88


def test_large_v3_has_100_languages() -> None:
    found = make(51866)
    assert len(found.lang_to_id) == 100
    assert found.lang_to_id["<|yue|>"] == 50358
    assert found.task_to_id == {"translate": 50359, "transcribe": 50360}
    assert found.forced_decoder_ids == [[1, None], [2, 50360]]


def test_alignment_heads_are_absent_where_they_are_unknown() -> None:
    assert not hasattr(make(51865), "alignment_heads")


@pytest.mark.parametrize("vocabulary", [51864, 51865, 51866])
def test_what_is_saved_is_what_loads(vocabulary: int, tmp_path: Path) -> None:
    made = make(vocabulary)
    made.save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path).to_dict()
    assert loaded == {**made.to_dict(), "_from_model_config": loaded["_from_model_config"]}
