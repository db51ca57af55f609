"""Damaged files of every kind: a checkpoint or a `WeightsError` comes of them, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import WhisperForConditionalGeneration

from tests.weights.hostile import Loader, attack, loaders

NAMES = (
    "OpenAI .pt, bytes",
    "OpenAI .pt, instructions",
    "pytorch_model.bin",
    "CTranslate2 model.bin",
    "CTranslate2 config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "safetensors",
    "safetensors index",
)


@pytest.fixture(scope="module")
def attacked(
    smallest: WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loader]:
    return loaders(smallest, tmp_path_factory.mktemp("intact"))


def test_every_loader_is_attacked(attacked: dict[str, Loader]) -> None:
    assert tuple(attacked) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_intact_file_is_read(name: str, attacked: dict[str, Loader], tmp_path: Path) -> None:
    loader = attacked[name]
    path = tmp_path / loader.file
    path.write_bytes(loader.intact)
    loader.read(path)


@pytest.mark.parametrize("name", NAMES)
def test_damage_gives_weights_or_a_clear_error(
    name: str, attacked: dict[str, Loader], tmp_path: Path
) -> None:
    outcomes = attack(attacked[name], tmp_path, range(200))
    assert outcomes["refused"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_much_damage_gives_weights_or_a_clear_error(
    name: str, attacked: dict[str, Loader], tmp_path: Path
) -> None:
    attack(attacked[name], tmp_path, range(200, 22_000))
