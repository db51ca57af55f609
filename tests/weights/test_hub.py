"""Requests to the Hub, answered by a stand-in for its client."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from whisper_flash_attention.errors import WeightsError
from whisper_flash_attention.terminal import report_warnings
from whisper_flash_attention.transcribe.loading import load
from whisper_flash_attention.weights.hub import PATIENCE, Hub

FILES = {
    "README.md": 9_000_000,
    "config.json": 1_000,
    "tokenizer.json": 2_000_000,
    "model.safetensors": 965_000_000,
    "pytorch_model.bin": 966_000_000,
}


class ConnectTimeout(Exception):
    """Of some HTTP library."""


class FakeHub:
    """The functions of the client that are called, with a cache of some files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.cached: set[str] = set()
        self.error: Exception | None = None
        self.requests: list[dict[str, Any]] = []
        self.downloads: list[dict[str, Any]] = []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cached_file)

    def model_info(self, name: str, **options: Any) -> Any:
        self.requests.append(options)
        if self.error is not None:
            raise self.error
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
        return SimpleNamespace(siblings=files)

    def cached_file(self, name: str, file: str, folder: str | None) -> str | None:
        return file if file in self.cached else None

    def snapshot_download(self, name: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.downloads.append(options)
        for pattern in allow_patterns:
            if pattern in FILES:
                (self.folder / pattern).touch()
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    return FakeHub(monkeypatch, tmp_path)


def test_a_download_is_announced_with_its_size(hub: FakeHub) -> None:
    messages: list[str] = []
    with report_warnings(messages.append):
        assert Hub().repository_folder("openai/whisper-small") == hub.folder
    # Without the README and the second kind of weights.
    assert messages == ["downloading openai/whisper-small: 967 MB"]
    assert all(each["tqdm_class"] is not None for each in hub.downloads)
    assert hub.requests == [{"files_metadata": True, "timeout": PATIENCE}]
    hub.cached = set(FILES)
    messages.clear()
    with report_warnings(messages.append):
        Hub().repository_folder("openai/whisper-small")
    assert messages == []


def test_a_hub_that_does_not_reply_is_one_line_after_one_request(hub: FakeHub) -> None:
    hub.error = ConnectTimeout("timed out")
    with pytest.raises(WeightsError) as caught:
        load("small", device="cpu")
    message = str(caught.value)
    assert message.startswith("cannot load model 'openai/whisper-small': ")
    assert "cannot be reached (timed out)" in message and "package:tiny.en" in message
    assert "\n" not in message and len(hub.requests) == 1 and not hub.downloads
    assert PATIENCE <= 5


def test_what_is_in_the_cache_does_without_the_hub(
    hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.error, hub.cached = ConnectTimeout(""), set(FILES)
    with caplog.at_level(logging.WARNING, "whisper_flash_attention"):
        Hub().repository_folder("openai/whisper-small")
    assert "openai/whisper-small is taken from the cache" in caplog.text
    assert all(each["local_files_only"] for each in hub.downloads)
    hub.requests.clear()
    Hub("models", local_files_only=True).repository_folder("openai/whisper-small")
    assert not hub.requests
    expected = {"cache_dir": "models", "local_files_only": True, "tqdm_class": None}
    assert hub.downloads[-1] == expected
