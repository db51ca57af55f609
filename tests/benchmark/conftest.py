"""One thread for what runs in this process: the models here are too small to share out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.benchmark import children
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(autouse=True, scope="module")
def known_ceilings() -> Iterator[None]:
    """Runs do not measure the ceilings of a CPU, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "whisper_flash_attention.benchmark.runner.measure_ceilings", children.known_ceilings
        )
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModelSize:
    """ "tiny" is smaller still."""
    size = ModelSize(128, 2, 1, 2, 128)
    monkeypatch.setitem(MODEL_SIZES, "tiny", size)
    return size
