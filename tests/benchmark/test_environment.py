"""Where the numbers come from, without telling whose computer it was."""

from __future__ import annotations

import getpass
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from whisper_flash_attention._version import __version__
from whisper_flash_attention.benchmark import environment
from whisper_flash_attention.benchmark.environment import (
    commit,
    describe_environment,
    driver_memory,
    package_version,
    source_digest,
)
from whisper_flash_attention.benchmark.measure import measure_ceilings


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.com")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a package of one file, which the module takes for its own."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(environment, "PACKAGE", package)
    return tmp_path


def test_versions_are_those_in_use() -> None:
    found = describe_environment("cpu")
    assert found.torch == torch.__version__
    assert found.transformers == transformers.__version__
    assert found.python == platform.python_version()
    assert found.threads == torch.get_num_threads()
    assert found.device_name == found.cpu
    assert found.driver is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found.date)


def test_nothing_names_the_computer_or_its_folders() -> None:
    text = json.dumps(describe_environment("cpu").as_json())
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert not re.search(r"/\w+/\w+", text)
    host = platform.node()
    assert not host or not re.search(rf"\b{re.escape(host)}\b", text)
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_described_and_changed_code_called_dirty(checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "one")
    clean = commit()
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (checkout / "notes.txt").write_text("results, say")
    assert commit() == clean
    (checkout / "package" / "code.py").write_text("x = 2\n")
    assert commit() == f"{clean}-dirty"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_without_a_commit_falls_back_to_the_version(checkout: Path) -> None:
    git(checkout, "init", "-q")
    assert commit() == f"{__version__} (no git checkout)"


def test_an_installed_package_gives_its_version(checkout: Path) -> None:
    assert commit() == f"{__version__} (no git checkout)"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_commit_that_is_given_counts(checkout: Path) -> None:
    assert commit("0123abcd") == "0123abcd"
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "one")
    assert commit("0123abcd") == "0123abcd" != commit()


def test_the_source_digest_changes_with_the_code(checkout: Path) -> None:
    before = source_digest()
    (checkout / "package" / "data.json").write_text("{}")
    assert source_digest() == before
    (checkout / "package" / "code.py").write_text("x = 2\n")
    assert source_digest() != before


def test_a_missing_package_has_no_version() -> None:
    assert package_version("no-such-package-here") is None
    assert package_version("torch") is not None


def test_a_cpu_has_no_driver_memory() -> None:
    assert driver_memory(torch.device("cpu")) == (None, None)


def test_ceilings_of_this_machine_are_plausible() -> None:
    found = measure_ceilings("cpu", "float32")
    assert 1e8 < found.bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second < 1e15
