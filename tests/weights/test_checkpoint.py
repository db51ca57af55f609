"""The table of parameters, and the checks that every converted checkpoint passes."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import (
    Checkpoint,
    assemble,
    check_shapes,
    make_dimensions,
    parameter_shapes,
    shorten,
)
from whisper_flash_attention.weights.tokens import SpecialTokens, generation_values

DIMENSIONS = {
    "vocab_size": 51866,
    "d_model": 16,
    "num_mel_bins": 128,
    "max_source_positions": 20,
    "max_target_positions": 12,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 40,
}


def test_the_table_of_parameters_is_stocks(model: WhisperForConditionalGeneration) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del expected["proj_out.weight"]
    assert parameter_shapes(model.config) == expected


def test_a_configuration_carries_the_special_ids_of_its_vocabulary() -> None:
    dimensions, tokens = make_dimensions("here", **DIMENSIONS)
    values = generation_values(tokens, max_length=12)
    config = Checkpoint("here", "openai", dimensions, values, {}).config
    assert config.num_mel_bins == 128
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (50257,) * 3
    assert config.decoder_start_token_id == tokens.start_of_transcript == 50258
    assert config.begin_suppress_tokens == [220, 50257]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"d_model": 2}, "d_model is 2, expected an even number from 4 on"),
        ({"d_model": 15}, "d_model is 15, expected an even number from 4 on"),
        ({"decoder_layers": -1}, "decoder_layers is -1"),
        ({"encoder_attention_heads": 3}, "3 encoder_attention_heads do not divide 16"),
        ({"vocab_size": 51867}, "a vocabulary of 51867 tokens"),
    ],
)
def test_impossible_dimensions_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(WeightsError, match=f"^here: {message}"):
        make_dimensions("here", **(DIMENSIONS | change))


def test_the_first_wrong_tensors_are_listed() -> None:
    expected = {name: (2, 3) for name in "abcde"}
    found = {"e": (3, 2), "x\n": (1,)}
    with pytest.raises(WeightsError) as caught:
        check_shapes("here", expected, found)
    assert str(caught.value) == (
        "here: not the tensors of a Whisper of this size (4 missing: a, b, c, and 1 more; "
        "1 unexpected: x\\n; 1 of the wrong shape: e is [3, 2] instead of [2, 3])"
    )


def test_names_from_files_are_printed_in_one_short_line() -> None:
    assert shorten("a\x1b[31m\nb" + 1000 * "c").startswith("a\\x1b[31m\\nb")
    assert len(shorten(1000 * "\n")) <= 80


def test_mixed_dtypes_become_float32_and_the_projection_is_tied() -> None:
    dimensions, tokens = make_dimensions("here", **DIMENSIONS)
    half = torch.ones(2, dtype=torch.float16)
    embeddings = torch.ones(3)
    tensors = {"a": half, "model.decoder.embed_tokens.weight": embeddings}
    generation = generation_values(tokens, max_length=12)
    state = assemble("here", "openai", dimensions, generation, tensors).state_dict
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert state["proj_out.weight"] is state["model.decoder.embed_tokens.weight"]


def test_a_vocabulary_of_another_size_is_unknown() -> None:
    assert SpecialTokens.of_vocabulary(0) is None
