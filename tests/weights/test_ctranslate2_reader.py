"""CTranslate2 folders: every quantisation comes back, and wrong files are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from tests.weights.writers import (
    ALIASES,
    Variables,
    logits,
    model_bin,
    quantize,
    to_ctranslate2,
    write_folder,
)
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights import Checkpoint, read_checkpoint
from whisper_flash_attention.weights.ctranslate2_reader import VariableReader, read_ctranslate2
from whisper_flash_attention.weights.files import JoinedFiles

QKV = "encoder/layer_0/self_attention/linear_0/weight"
FFN = "decoder/layer_0/ffn/linear_1/weight"


def read(folder: Path, variables: Variables, config: dict[str, object] | None = None) -> Checkpoint:
    checkpoint = read_checkpoint(write_folder(folder, variables, config))
    assert checkpoint is not None
    return checkpoint


def load(checkpoint: Checkpoint) -> WhisperForConditionalGeneration:
    model = WhisperForConditionalGeneration(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict)  # strict: no key missing, none unexpected
    return model.eval()


def test_float32_comes_back_exactly(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    checkpoint = read(tmp_path, to_ctranslate2(model))
    assert (checkpoint.source, checkpoint.format) == (str(tmp_path), "ctranslate2")
    expected = model.state_dict()
    assert checkpoint.state_dict.keys() == expected.keys()
    for name, tensor in checkpoint.state_dict.items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(load(checkpoint)), logits(model))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_comes_back_as_it_was_rounded(
    kind: str, model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    checkpoint = read(tmp_path, quantize(to_ctranslate2(model), kind))
    assert not checkpoint.is_int8
    dtype = getattr(torch, kind)
    for name, expected in model.state_dict().items():
        assert torch.equal(checkpoint.state_dict[name], expected.to(dtype)), name


@pytest.mark.parametrize(
    ("kind", "levels"),
    [("int8", 127), ("int8_float16", 127), ("int8_bfloat16", 127), ("int16", 2**10)],
)
def test_integers_come_back_within_half_a_step(
    kind: str, levels: int, model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    checkpoint = read(tmp_path, quantize(to_ctranslate2(model), kind))
    assert checkpoint.is_int8 == (kind != "int16")
    floats = getattr(torch, kind.partition("_")[2] or "float32")
    for name, expected in model.state_dict().items():
        found = checkpoint.state_dict[name]
        assert found.dtype == torch.float32
        if expected.dim() == 2 and "embed_positions" not in name:
            largest = (
                expected.abs().amax(dim=1, keepdim=True)
                if levels == 127
                else stack_max(model, name)
            )
            assert ((found - expected).abs() <= largest / levels * 0.501).all(), name
        else:
            assert torch.equal(found, expected.to(floats).float()), name


def stack_max(model: WhisperForConditionalGeneration, name: str) -> torch.Tensor:
    """The largest value of everything that shares one int16 scale with a parameter."""
    state = model.state_dict()
    groups = {"q": "qkv", "k": "qkv", "v": "qkv"} if "self_attn" in name else {"k": "kv", "v": "kv"}
    stem, part, rest = name.rpartition("_proj")
    letters = groups.get(stem[-1], "") if part else ""
    names = [f"{stem[:-1]}{letter}_proj{rest}" for letter in letters] or [name]
    return torch.stack([state[other].abs().max() for other in names]).max()


def test_int8_logits_stay_near(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    found = logits(load(read(tmp_path, quantize(to_ctranslate2(model), "int8"))))
    expected = logits(model)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.999


def test_quantised_convolutions_are_scaled_by_output_channel(
    model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    variables = to_ctranslate2(model)
    weight = variables["encoder/conv1/weight"]
    scale = 127 / weight.abs().amax(dim=(1, 2))
    variables["encoder/conv1/weight"] = (weight * scale[:, None, None]).round().to(torch.int8)
    variables["encoder/conv1/weight_scale"] = scale
    found = read(tmp_path, variables).state_dict["model.encoder.conv1.weight"]
    assert ((found - weight).abs() <= 0.501 / scale[:, None, None]).all()


def test_int16_without_a_scale_has_ctranslate2s_old_one(
    variables: Variables, tmp_path: Path
) -> None:
    variables[FFN] = (variables[FFN] * 1000).round().to(torch.int16)
    found = read(tmp_path, variables).state_dict["model.decoder.layers.0.fc2.weight"]
    assert torch.equal(found, variables[FFN].float() / 1000)


def test_equal_vectors_may_be_one_by_aliases(variables: Variables, tmp_path: Path) -> None:
    gamma = "encoder/layer_0/ffn/layer_norm/gamma"
    del variables[gamma]
    content = model_bin(variables, ALIASES | {gamma: "encoder/layer_norm/gamma"})
    (tmp_path / "model.bin").write_bytes(content)
    state = read_ctranslate2(tmp_path).state_dict
    found = state["model.encoder.layers.0.final_layer_norm.weight"]
    assert torch.equal(found, variables["encoder/layer_norm/gamma"])
    assert found.data_ptr() != state["model.encoder.layer_norm.weight"].data_ptr()


def test_a_bias_of_the_keys_is_dropped_and_changes_nothing(
    model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    variables = to_ctranslate2(model)
    width = model.config.d_model
    variables["encoder/layer_0/self_attention/linear_0/bias"][width : 2 * width] = 3.0
    assert torch.equal(logits(load(read(tmp_path, variables))), logits(model))


def test_dimensions_come_from_shapes_and_scalars(
    model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    found = read(tmp_path, to_ctranslate2(model)).config
    for name in (
        *("vocab_size", "d_model", "num_mel_bins", "max_source_positions", "max_target_positions"),
        *("encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
        *("decoder_layers", "decoder_attention_heads", "decoder_ffn_dim"),
    ):
        assert getattr(found, name) == getattr(model.config, name), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_the_number_of_heads_may_have_any_width(
    dtype: torch.dtype, model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    variables = to_ctranslate2(model)
    variables["decoder/num_heads"] = torch.tensor(4, dtype=dtype)
    assert read(tmp_path, variables).config.decoder_attention_heads == 4


def test_lists_come_from_config_json(variables: Variables, tmp_path: Path) -> None:
    config: dict[str, object] = {
        "suppress_ids": [1, 2],
        "suppress_ids_begin": [220],
        "alignment_heads": [[0, 0]],
        "lang_ids": [1, 2, 3],
    }
    found = read(tmp_path, variables, config).generation_config
    assert (found.suppress_tokens, found.begin_suppress_tokens) == ([1, 2], [220])
    assert found.alignment_heads == [[0, 0]]
    assert not hasattr(found, "lang_to_id")


def test_without_config_json_openais_lists_are_used(variables: Variables, tmp_path: Path) -> None:
    found = read(tmp_path, variables).generation_config
    assert len(found.suppress_tokens) == 90
    assert found.begin_suppress_tokens == [220, 50256]
    assert not hasattr(found, "alignment_heads")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (json.dumps({"suppress_ids": [51864]}).encode(), "suppress_ids is not a list of token ids"),
        (json.dumps({"suppress_ids": [True]}).encode(), "suppress_ids is not a list of token ids"),
        (json.dumps({"suppress_ids_begin": "a"}).encode(), "suppress_ids_begin is not a list"),
        (json.dumps({"alignment_heads": [[0, 1]]}).encode(), r"below \[1, 1\]"),
        (json.dumps({"alignment_heads": [[0]]}).encode(), "alignment_heads is not a list"),
        (json.dumps({"alignment_heads": [0]}).encode(), "alignment_heads is not a list"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else "",
)
def test_a_wrong_config_json_is_refused(
    content: bytes, message: str, variables: Variables, tmp_path: Path
) -> None:
    write_folder(tmp_path, variables)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert "config.json" in str(caught.value)


WRONG = {
    "no embeddings": ({"decoder/embeddings/weight": None}, "decoder/embeddings/weight is missing"),
    "no heads": ({"decoder/num_heads": None}, "variable decoder/num_heads is missing"),
    "no layers": ({"encoder/layer_0/ffn/linear_0/weight": None}, "linear_0/weight is missing"),
    "heads that do not divide": (
        {"encoder/num_heads": torch.tensor(3, dtype=torch.int8)},
        "3 encoder_attention_heads do not divide 4 columns",
    ),
    "negative heads": (
        {"encoder/num_heads": torch.tensor(-1, dtype=torch.int8)},
        "encoder_attention_heads is -1",
    ),
    "a fraction of heads": ({"encoder/num_heads": torch.tensor(1.5)}, "num_heads is no whole numb"),
    "a list of heads": (
        {"encoder/num_heads": torch.tensor([1, 1], dtype=torch.int8)},
        "num_heads is no whole number",
    ),
    "another activation": (
        {"decoder/activation": torch.tensor(0, dtype=torch.int8)},
        "decoder/activation is 0; Whisper's is 3",
    ),
    "another width": (
        {"encoder/conv2/bias": torch.zeros(3)},
        r"conv2/bias is \[3\] instead of \[4\]",
    ),
    "another rank": ({"encoder/conv1/weight": torch.zeros(4, 80)}, "conv1/weight is .* rank 3"),
    "no columns": ({"decoder/embeddings/weight": torch.zeros(51864, 0)}, "d_model is 0"),
    "another vocabulary": (
        {"decoder/embeddings/weight": torch.zeros(7, 4)},
        "a vocabulary of 7 tokens, expected 51864",
    ),
    "an unexpected variable": (
        {"decoder/projection/bias": torch.zeros(4)},
        "1 unexpected: decoder/projection/bias",
    ),
    "a missing bias": ({"encoder/conv1/bias": None}, "1 missing: encoder/conv1/bias"),
    "a gap in the layers": (
        {"encoder/layer_7/ffn/linear_0/weight": torch.zeros(3, 4)},
        "missing: encoder/layer_1/",
    ),
    "whole numbers for weights": (
        {"encoder/conv1/bias": torch.zeros(4, dtype=torch.int32)},
        "encoder/conv1/bias is of type torch.int32",
    ),
    "int8 without a scale": (
        {FFN: torch.zeros(4, 5, dtype=torch.int8)},
        f"variable {FFN}_scale is missing",
    ),
    "a zero scale": (
        {FFN: torch.zeros(4, 5, dtype=torch.int8), f"{FFN}_scale": torch.zeros(4)},
        "_scale .at byte [0-9]+. holds a scale that is zero",
    ),
    "a scale that is not a number": (
        {FFN: torch.zeros(4, 5, dtype=torch.int8), f"{FFN}_scale": torch.full((4,), math.nan)},
        "holds a scale that is zero, negative or not a number",
    ),
    "a scale per column": (
        {FFN: torch.zeros(4, 5, dtype=torch.int8), f"{FFN}_scale": torch.ones(5)},
        r"is \[5\] of torch.float32, expected one floating scale or 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variables_are_refused(name: str, variables: Variables, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    kept = {**variables, **changes}
    (tmp_path / "model.bin").write_bytes(
        model_bin({name: tensor for name, tensor in kept.items() if tensor is not None})
    )
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert str(tmp_path / "model.bin") in str(caught.value)


def test_a_matrix_may_not_be_shared_between_layers(variables: Variables, tmp_path: Path) -> None:
    del variables["decoder/layer_0/attention/linear_2/weight"]
    alias = {
        "decoder/layer_0/attention/linear_2/weight": "decoder/layer_0/attention/linear_0/weight"
    }
    (tmp_path / "model.bin").write_bytes(model_bin(variables, alias))
    with pytest.raises(WeightsError, match="is the same matrix as decoder/layer_0/attention"):
        read_checkpoint(tmp_path)


def test_an_output_projection_of_its_own_is_refused(variables: Variables, tmp_path: Path) -> None:
    variables["decoder/projection/weight"] = variables["decoder/embeddings/weight"] + 1
    (tmp_path / "model.bin").write_bytes(model_bin(variables))
    with pytest.raises(WeightsError, match="decoder/projection/weight is not tied"):
        read_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def whole(
    smallest: WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an intact int8 model, beside which broken ones may lie."""
    variables = quantize(to_ctranslate2(smallest), "int8")
    return write_folder(tmp_path_factory.mktemp("ctranslate2") / "whole", variables)


@pytest.fixture(scope="module")
def past_embeddings(whole: Path) -> int:
    """Where the embeddings end: most of a file is their data, in which every byte is valid."""
    with JoinedFiles([whole / "model.bin"]) as file:
        scale = VariableReader(file).variables["decoder/embeddings/weight_scale"]
    return scale.position + scale.size


def broken_copy(whole: Path, content: bytes) -> Path:
    folder = whole.with_name("broken")
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    return folder


def test_every_truncation_is_refused(whole: Path, past_embeddings: int) -> None:
    content = (whole / "model.bin").read_bytes()
    beginnings = range(0, past_embeddings, 9973)
    for length in [*beginnings, *range(past_embeddings, len(content), 17), len(content) - 1]:
        folder = broken_copy(whole, content[:length])
        with pytest.raises(WeightsError, match="broken"):
            read_ctranslate2(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_give_weights_or_a_clear_error(
    whole: Path, past_embeddings: int, data: st.DataObject
) -> None:
    broken = bytearray((whole / "model.bin").read_bytes())
    places = st.integers(0, 100) | st.integers(past_embeddings, len(broken) - 1)
    flips = data.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=4))
    for place, mask in flips.items():
        broken[place] ^= mask
    folder = broken_copy(whole, bytes(broken))
    try:
        checkpoint = read_ctranslate2(folder)
    except WeightsError as error:
        assert str(folder) in str(error)
    else:  # Each int8 has become a float32.
        assert sum(t.nbytes for t in checkpoint.state_dict.values()) < 10 * len(broken)


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=300))
def test_noise_after_a_true_beginning_is_refused(whole: Path, noise: bytes) -> None:
    beginning = (whole / "model.bin").read_bytes()[:25]
    folder = broken_copy(whole, beginning + noise)
    with pytest.raises(WeightsError, match="broken"):
        read_ctranslate2(folder)
