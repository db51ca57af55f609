"""The plain Whisper of a Transformers folder, read without Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.weights.checkpoint import Checkpoint
from whisper_flash_attention.weights.files import JoinedFiles
from whisper_flash_attention.weights.transformers_reader import read_transformers


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.fixture
def folder(model: WhisperForConditionalGeneration, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def read(folder: Path) -> Checkpoint:
    found = read_transformers(folder, "here", as_it_is)
    assert isinstance(found, Checkpoint), found
    return found


def check_same(checkpoint: Checkpoint, model: WhisperForConditionalGeneration) -> None:
    expected = model.state_dict()
    assert checkpoint.state_dict.keys() == expected.keys()
    for name, tensor in checkpoint.state_dict.items():
        assert torch.equal(tensor, expected[name]), name
    assert (
        checkpoint.state_dict["proj_out.weight"]
        is (checkpoint.state_dict["model.decoder.embed_tokens.weight"])
    )


def test_parameters_and_dimensions(folder: Path, model: WhisperForConditionalGeneration) -> None:
    found = read(folder)
    check_same(found, model)
    assert (found.source, found.format) == ("here", "transformers")
    assert found.dimensions.decoder_ffn_dim == model.config.decoder_ffn_dim
    assert found.generation == json.loads((folder / "generation_config.json").read_text())


def test_tensors_lie_in_the_mapped_file_and_the_file_is_not_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "model.safetensors"
    before, counts = path.read_bytes(), []
    read_bytes = JoinedFiles.read

    def counted(self: JoinedFiles, position: int, count: int) -> bytearray:
        counts.append(count)
        return read_bytes(self, position, count)

    monkeypatch.setattr(JoinedFiles, "read", counted)
    state = read(folder).state_dict
    header = int.from_bytes(before[:8], "little")
    assert set(counts) == {8, header}
    for tensor in state.values():
        tensor.add_(1)
    assert path.read_bytes() == before


def test_tensors_are_converted_one_by_one(
    folder: Path, model: WhisperForConditionalGeneration
) -> None:
    found = read_transformers(folder, "here", lambda tensor: tensor.half())
    assert isinstance(found, Checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict[name], tensor.half()), name


def test_shards(tmp_path: Path, model: WhisperForConditionalGeneration) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    check_same(read(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_torch_weights(
    tied: bool, folder: Path, model: WhisperForConditionalGeneration
) -> None:
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    if not tied:
        del state["proj_out.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    check_same(read(folder), model)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another activation": ({"activation_function": "relu"}, "activation_function relu"),
    "scaled embeddings": ({"scale_embedding": True}, "scale_embedding True"),
    "an output of its own": ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    "quantised": ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
    "a size by two names": ({"num_hidden_layers": 1}, "another num_hidden_layers"),
    "one layer less": ({"encoder_layers": 1, "num_hidden_layers": 1}, "its tensors are not those"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_plain_is_left_to_transformers(name: str, folder: Path) -> None:
    values, reason = CONFIGS[name]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    found = read_transformers(folder, "here", as_it_is)
    assert isinstance(found, str) and reason in found


def test_an_adapter_is_left_to_transformers(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert read_transformers(folder, "here", as_it_is) == "there is an adapter beside it"


def test_other_tensors_are_left_to_transformers(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.encoder.conv1.weight"
    changes: dict[str, dict[str, torch.Tensor]] = {
        "its tensors are not those": {"more": torch.zeros(1)},
        "not dense ones": {name: state[name].to(torch.int8)},
        "is not its token embeddings": {
            "proj_out.weight": state["model.decoder.embed_tokens.weight"] + 1
        },
    }
    for reason, change in changes.items():
        save_file(state | change, path, metadata={"format": "pt"})
        found = read_transformers(folder, "here", as_it_is)
        assert isinstance(found, str) and reason in found


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        read(folder)
