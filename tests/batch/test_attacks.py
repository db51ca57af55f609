"""What is hostile or odd is refused in one line, set aside, or an error of its own row."""

from __future__ import annotations

import os
import sys

import pytest

from tests.batch.attacks import ATTACKS, SLOW, attack

# How many of each kind are tried in every run; of files that are read, FILES.
COUNTS = {"ids": 200, "command line": 200, "whole run": 20}
FILES = 2_000

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and names of bytes are POSIX's")


def needs(kind: str) -> None:
    if "parquet" in kind:
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")


@posix
@pytest.mark.parametrize("kind", ATTACKS)
def test_no_attack_gets_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(kind)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # disks are not attacked
    assert attack(kind, COUNTS.get(kind, FILES)).total() == COUNTS.get(kind, FILES)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTACKS)
def test_no_attack_of_many_gets_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(kind)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    count = 2_000 if kind in SLOW else 20_000
    outcomes = attack(kind, count, seed=1)
    assert outcomes.total() == count
    print(f"{kind}: {dict(outcomes)}", file=sys.stderr)
