"""Repositories on the Hub, as they lie in the cache of its client; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.weights.hostile import write_transformers_folder
from whisper_flash_attention.weights.hub import repository_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cached snapshot of the repository me/mine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--mine"
    write_transformers_folder(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("weights", [True, False])
def test_a_cached_repository_is_its_snapshot(snapshot: Path, weights: bool) -> None:
    assert repository_folder("me/mine", weights=weights) == snapshot


def test_weights_of_any_name_will_do(snapshot: Path) -> None:
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert repository_folder("me/mine") == snapshot


def test_what_is_not_there_is_an_error_of_the_client(snapshot: Path) -> None:
    with pytest.raises(OSError, match="Cannot find"):
        repository_folder("me/another")
