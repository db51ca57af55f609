"""What `make matrix` tries is what pyproject.toml declares."""

from __future__ import annotations

import tomllib

from tests.conftest import REPOSITORY
from tools.matrix import PYTHONS, SMALL, SMALL_TESTS, TESTS

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_every_declared_python_is_tried() -> None:
    prefix = "Programming Language :: Python :: 3."
    declared = [c.split()[-1] for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert list(PYTHONS) == declared


def test_the_tests_that_it_runs_are_there() -> None:
    for path in (*TESTS, *SMALL_TESTS):
        assert (REPOSITORY / path).exists(), path


def test_what_it_installs_without_pytorch_has_the_declared_bounds() -> None:
    declared = {each.split(";")[0] for each in PROJECT["dependencies"]}
    for requirement in SMALL:
        if any(character in requirement for character in "<>"):
            assert requirement in declared
