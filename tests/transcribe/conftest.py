"""The encoder computes each window once for all tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def remembered(windows_are_encoded_once: None) -> None:
    """For every test here."""
