"""The comparison of Transformers' own tests with the stock class and with ours."""

from __future__ import annotations

from typing import Any

import pytest

from tools import hf_suite as suite


@pytest.fixture
def stock() -> dict[str, dict[str, Any]]:
    return {"test_a": {"outcome": "passed"}, "test_b": {"outcome": "failed", "error": "E"}}


def test_a_test_that_passes_with_stock_alone_fails_the_suite(stock: dict[str, Any]) -> None:
    ours = stock | {"test_a": {"outcome": "failed", "error": "AssertionError"}}
    ours["test_b"] = {"outcome": "passed", "engine_decodes": 1}
    summary = suite.summarise(stock, ours)
    assert summary["passed_with_stock_only"] == {"test_a": "UNEXPLAINED: AssertionError"}
    assert summary["failed_with_stock_only"] == ["test_b"]
    assert not suite.is_passed(summary)


@pytest.mark.parametrize("decodes", [0, 3])
def test_the_suite_passes_only_if_the_engine_ran(stock: dict[str, Any], decodes: int) -> None:
    ours = stock | {"test_a": {"outcome": "passed", "engine_decodes": decodes}}
    summary = suite.summarise(stock, ours)
    assert summary["failed_with_both"] == {"test_b": "E"}
    assert suite.is_passed(summary) == (decodes > 0)


def test_a_known_difference_is_explained(
    stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(suite.DIFFERENCES, "test_a", "reason")
    ours = {"test_a": {"outcome": "skipped"}, "test_b": {"engine_decodes": 1}}
    summary = suite.summarise(stock, ours)
    assert summary["passed_with_stock_only"] == {"test_a": "reason"}
    assert suite.is_passed(summary)
