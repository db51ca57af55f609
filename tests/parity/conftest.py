from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.checkpoints import ENGLISH_ONLY, MULTILINGUAL, write_checkpoint, write_features
from whisper_flash_attention.parity.cases import read_features
from whisper_flash_attention.parity.models import Models, load_models
from whisper_flash_attention.terminal import quiet_transformers


@pytest.fixture(autouse=True)
def quiet() -> object:
    """Stock logs much about options that a random model's configuration repeats."""
    with quiet_transformers():
        yield


@pytest.fixture(scope="session")
def english_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("english"), ENGLISH_ONLY)


@pytest.fixture(scope="session")
def multilingual_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("multilingual"), MULTILINGUAL)


@pytest.fixture(scope="session")
def feature_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("features") / "clips.npz")


@pytest.fixture(scope="session")
def random_models(english_folder: Path) -> Models:
    """A random English-only model in float32, three times on the CPU."""
    return load_models(
        str(english_folder), device="cpu", dtype="float32", attention="auto", needs_extractor=False
    )


@pytest.fixture(scope="session")
def random_features(feature_file: Path) -> torch.Tensor:
    """`[3, 80, 200]`."""
    clips = read_features(feature_file, (80, 200), print).clips
    return torch.stack([torch.from_numpy(clip.features) for clip in clips])
