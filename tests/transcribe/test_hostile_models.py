"""Damaged Transformers folders through the command: text, or one line and exit code 2."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.weights.bombs import BOMBS
from tests.weights.hostile import (
    FOLDER_FILES,
    SMALL_VOCABULARY,
    damaged_folder_file,
    write_transformers_folder,
)
from whisper_flash_attention.cli import app
from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)
from whisper_flash_attention.transcribe import Transcriber


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    write_transformers_folder(folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import wave

    path = tmp_path_factory.mktemp("recording") / "a.wav"
    noise = np.random.default_rng(0).normal(0, 3000, 16_000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(noise.tobytes())
    return path


def run(folder: Path, recording: Path) -> Any:
    arguments = ["transcribe", str(recording), "--model", str(folder), "--device", "cpu"]
    return CliRunner().invoke(app, [*arguments, "--language", "en", "--temperature", "0"])


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(intact, copy)
    return copy


def test_the_intact_folder_transcribes(intact: Path, recording: Path) -> None:
    assert run(intact, recording).exit_code == 0


def attack(intact: Path, folder: Path, recording: Path, seeds: range) -> None:
    for seed in seeds:
        name = FOLDER_FILES[seed % len(FOLDER_FILES)]
        original = (intact / name).read_bytes()
        (folder / name).write_bytes(damaged_folder_file(random.Random(seed), name, original))
        result = run(folder, recording)
        what = (seed, name, result.stderr, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), what
        assert result.exit_code in (0, 1, 2), what
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (result.exit_code == 2), what
        (folder / name).write_bytes(original)


@pytest.mark.filterwarnings("ignore")  # Transformers warns of odd values; they are raised as errors
def test_damage_is_one_line_and_exit_code_2(intact: Path, folder: Path, recording: Path) -> None:
    attack(intact, folder, recording, range(40))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_much_damage_is_one_line_and_exit_code_2(
    intact: Path, folder: Path, recording: Path
) -> None:
    attack(intact, folder, recording, range(40, 640))


def change(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "a thousand million layers": ("config.json", {"encoder_layers": 10**9}),
    "as many by another name": ("config.json", {"num_hidden_layers": 10**9}),
    "a width that the files cannot hold": ("config.json", {"d_model": 16_384}),
    "no heads": ("config.json", {"decoder_attention_heads": 0}),
    "a string for a number": ("config.json", {"d_model": "64"}),
    "an unknown activation": ("config.json", {"activation_function": "nothing"}),
    "an unknown dtype": ("config.json", {"dtype": "float3"}),
    "a quantisation of no kind": ("config.json", {"quantization_config": {"bits": 4}}),
    "a quantisation whose package is missing": (
        "config.json",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ),
    "one layer more": ("config.json", {"encoder_layers": 2}),
    "another vocabulary": ("config.json", {"vocab_size": 1000}),
    "weights of another folder": ("config.json", {"transformers_weights": "../x.safetensors"}),
    "languages that are a number": ("generation_config.json", {"lang_to_id": 5}),
    "an end that is a list of strings": ("generation_config.json", {"eos_token_id": ["a"]}),
    "no task to transcribe": ("generation_config.json", {"task_to_id": {"translate": 5}}),
    "no timestamps": ("generation_config.json", {"no_timestamps_token_id": SMALL_VOCABULARY - 1}),
    "features of another model": ("preprocessor_config.json", {"feature_size": 79}),
    "a filter bank of any size": ("preprocessor_config.json", {"feature_size": 10**9}),
    "no hop": ("preprocessor_config.json", {"hop_length": 0}),
    "padding to a thousand million": (
        "tokenizer.json",
        {"padding": {"strategy": {"Fixed": 10**9}, "pad_id": 0}},
    ),
    "a post-processor of no kind": ("tokenizer.json", {"post_processor": {"type": "x"}}),
    "arguments of the tokenizer": ("tokenizer_config.json", {"init_inputs": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_value_is_a_weights_error(name: str, folder: Path) -> None:
    file, values = CHANGES[name]
    change(folder, file, **values)
    with pytest.raises(WeightsError) as caught:
        Transcriber.from_pretrained(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_one_layer_less_than_the_weights_have_is_refused(folder: Path) -> None:
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    more = {
        name.replace("encoder.layers.0", "encoder.layers.1"): tensor.clone()
        for name, tensor in state.items()
    }
    save_file(state | more, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"has layers that its config\.json lacks"):
        Transcriber.from_pretrained(str(folder), device="cpu")


def torch_weights(folder: Path) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    return path


def test_plain_torch_weights_load(folder: Path) -> None:
    torch_weights(folder)
    Transcriber.from_pretrained(str(folder), device="cpu")


@pytest.mark.parametrize("bomb", BOMBS)
def test_torch_weights_are_checked_before_torch_reads_them(bomb: str, folder: Path) -> None:
    path = torch_weights(folder)
    path.write_bytes(BOMBS[bomb])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        WhisperFlashAttentionForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", 5, "x.pt", "gone.bin"]
)
def test_an_index_names_files_beside_it_only(name: object, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="its weight_map names"):
        WhisperFlashAttentionForConditionalGeneration.from_pretrained(folder)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"names model-1\.safetensors, which is missing"):
        WhisperFlashAttentionForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_a_named_pipe_is_refused_at_once(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(WeightsError, match="is a named pipe, expected a regular file"):
        Transcriber.from_pretrained(str(folder), device="cpu")
