"""A transcriber for all tests of this folder, whose encoder computes each window once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from whisper_flash_attention.transcribe import Transcriber


@pytest.fixture(scope="session")
def transcriber(tiny_en: str) -> Transcriber:
    return Transcriber.from_pretrained(tiny_en, device="cpu")


@pytest.fixture(scope="session")
def multilingual(base: str) -> Transcriber:
    return Transcriber.from_pretrained(base, device="cpu")


@pytest.fixture(autouse=True)
def windows_are_encoded_once() -> Iterator[None]:
    try:
        from tests.remembered import encode_once
    except ImportError:  # no PyTorch, and so no encoder: `tools/matrix.py --without-pytorch`
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        encode_once(patch)
        yield
