"""A pytest plugin for `hf_suite.py`: which class the tests use, and what each test did.

With `HF_SUITE=ours` in the environment the tests get this package's class in place of stock's. The
report, a JSON file at `HF_SUITE_REPORT`, has for each test its outcome; with our class also its
calls of `generate`, the decodes that the engine finished, and why calls left the engine.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

# Of Whisper's testers: attention heads of 64 values, the only width that the engine runs.
SIZES = {"hidden_size": 128, "num_attention_heads": 2}
OURS = os.environ["HF_SUITE"] == "ours"

tests: dict[str, dict[str, Any]] = {}
running: dict[str, Any] = {}


class Reasons(logging.Handler):
    """Keeps why calls of the running test fell back to Transformers; each is logged once."""

    def emit(self, record: logging.LogRecord) -> None:
        running.setdefault("fell_back", []).append(str(record.args[-1]))


def substitute() -> type:
    """Put our class where `import` finds stock's, and count what it does."""
    import transformers.models.whisper.modeling_whisper as modeling

    from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours
    from whisper_flash_attention.engine.engine import Engine
    from whisper_flash_attention.hf import fast_path

    # Transformers makes itself anew while it is imported, and some tests import it by its path;
    # every such module takes the class from here.
    modeling.WhisperForConditionalGeneration = Ours
    sys.modules["transformers"].WhisperForConditionalGeneration = Ours

    def counted(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            running[name] = running.get(name, 0) + 1
            return result

        setattr(owner, method, wrapper)

    counted(fast_path, "generate", "generate_calls")
    counted(Engine, "decode", "engine_decodes")
    logger = logging.getLogger("whisper_flash_attention")
    logger.setLevel(logging.INFO)
    logger.addHandler(Reasons())
    return Ours


Class = substitute() if OURS else None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for module in {item.module for item in items}:
        if OURS:
            assert module.WhisperForConditionalGeneration is Class
            assert Class in module.WhisperModelTest.all_model_classes
        else:
            assert module.WhisperForConditionalGeneration.__module__.startswith("transformers.")
        tester = module.WhisperModelTester.__init__
        if tester.__defaults__:
            names = list(inspect.signature(tester).parameters)[-len(tester.__defaults__) :]
            given = dict(zip(names, tester.__defaults__, strict=True)) | SIZES
            tester.__defaults__ = tuple(given[name] for name in names)


@pytest.fixture(autouse=True)
def each_test(request: pytest.FixtureRequest) -> Iterator[None]:
    running.clear()
    transformers.set_seed(0)
    yield
    tests.setdefault(request.node.name, {}).update(running)


def pytest_runtest_logreport(report: Any) -> None:
    name = report.nodeid.rpartition("::")[2]
    found = tests.setdefault(name, {})
    if report.failed:
        found["outcome"] = "failed"
        # Of the error, the first line.
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        found.setdefault("error", message.partition("\n")[0])
    elif found.get("outcome") != "failed" and not hasattr(report, "context"):
        # A subtest has a context; it can only fail its test.
        if report.skipped:
            found["outcome"] = "skipped"
        elif report.when == "call":
            found["outcome"] = "passed"


def pytest_warning_recorded(warning_message: Any, nodeid: str) -> None:
    if warning_message.category.__name__ == "EngineBypassed":
        name = nodeid.rpartition("::")[2]
        tests.setdefault(name, {}).setdefault("bypassed", []).append(str(warning_message.message))


def pytest_sessionfinish() -> None:
    Path(os.environ["HF_SUITE_REPORT"]).write_text(json.dumps(tests, indent=1))
