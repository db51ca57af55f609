"""A live server with real tiny.en; nothing is collected without the packages of serve."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from whisper_flash_attention.audio import BundledClip

if TYPE_CHECKING:
    from tests.serve.live_server import Live
    from whisper_flash_attention.transcribe import Transcriber

# Of the extra serve, and of its tests.
NEEDED = ("fastapi", "httpx", "openai", "prometheus_client", "python_multipart", "uvicorn")
if any(find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def remembered(windows_are_encoded_once: None) -> None:
    """The encoder computes each window once for all tests of this folder."""


@pytest.fixture(scope="session")
def live(transcriber: Transcriber) -> Iterator[Live]:
    from tests.serve.live_server import serving

    with serving(transcriber) as found:
        yield found


@pytest.fixture
def clip(bundled_recordings: tuple[BundledClip, ...]) -> bytes:
    """The shortest of the recordings, 3 s."""
    return min(bundled_recordings, key=lambda each: each.seconds).path.read_bytes()
