"""What all tests share: real weights, real recordings, one thread count, no network."""

from __future__ import annotations

import atexit
import gc
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

try:
    import torch
except ImportError:  # `tools/matrix.py --without-pytorch` runs the tests that need none
    torch = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from transformers import WhisperConfig

    from whisper_flash_attention.transcribe import Transcriber

# Read when huggingface_hub is first imported, which must therefore not happen above.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's processes give way to all others, and would wait for minutes beside other tests.
os.environ.setdefault("RAY_worker_niceness", "0")
# Read when Triton is first imported, which Transformers may do: without a GPU, kernels run in its
# interpreter.
if torch is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, so that it tells of the code and not of its luck. Others are
# looked for with `--hypothesis-profile default`. Kernels' tests do without hypothesis.
with suppress(ImportError):
    from hypothesis import settings

    # A machine at work elsewhere stalls for longer than any deadline.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.load_profile("same")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # One thread per process: the suite runs a process per core, and threads that wait for each
    # other on a crowded machine are many times slower.
    if torch is not None:
        torch.set_num_threads(1)
    # The same for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell has what it starts in the background ignore Ctrl-C, for which tests would wait.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while modules and tests are imported: it takes seconds and finds none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries report what is left at the end
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch is not None and torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def tiny_en() -> str:
    """Source of the real tiny.en weights; `make test` installs the package that carries them."""
    from whisper_flash_attention.weights import packaged_source

    packaged_source("tiny.en")
    return "package:tiny.en"


@pytest.fixture(scope="session")
def base() -> str:
    """Source of the real multilingual base weights; `make test` installs them."""
    from whisper_flash_attention.weights import packaged_source

    packaged_source("base")
    return "package:base"


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    """More recordings, with the ids that stock Whisper gives; only on machines that have them."""
    folder = REPOSITORY.parent / "shared" / "audio"
    if not (folder / "index.json").is_file():
        pytest.skip("the recordings beside the repository are not on this machine")
    return folder


@pytest.fixture(scope="session")
def bundled_recordings() -> tuple[object, ...]:
    """The recordings that the package carries, as `audio.bundled_clips.BundledClip`."""
    from whisper_flash_attention.audio.bundled_clips import bundled_recordings

    return bundled_recordings()


@pytest.fixture(scope="session")
def transcriber(tiny_en: str) -> Transcriber:
    from whisper_flash_attention.transcribe import Transcriber

    return Transcriber.from_pretrained(tiny_en, device="cpu")


@pytest.fixture(scope="session")
def multilingual(base: str) -> Transcriber:
    from whisper_flash_attention.transcribe import Transcriber

    return Transcriber.from_pretrained(base, device="cpu")


@pytest.fixture(scope="session")
def without_engine(tiny_en: str) -> Transcriber:
    """A transcriber whose model the engine does not run."""
    from whisper_flash_attention.transcribe import Transcriber

    return Transcriber.from_pretrained(tiny_en, device="cpu", attention="sdpa_flash")


@pytest.fixture(scope="module")
def windows_are_encoded_once() -> Iterator[None]:
    """On a CPU, our encoder computes each window once for all modules with this fixture."""
    if torch is None:
        yield
        return
    from tests.remembered import encode_once

    with pytest.MonkeyPatch.context() as patch:
        encode_once(patch)
        yield


@pytest.fixture
def small_config() -> WhisperConfig:
    """A Whisper of a few thousand parameters, with the special ids of the multilingual models."""
    from tests.random_whisper import small_whisper_config

    return small_whisper_config()
