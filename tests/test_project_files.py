"""Files for people who work on the project name commands, Pythons and versions that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from whisper_flash_attention import __version__

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (REPOSITORY / name).read_text("utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))["project"]


def test_targets_of_make_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    texts = [read(".ci/run"), *(path.read_text("utf-8") for path in WORKFLOWS)]
    named = re.findall(r"^.*?\bmake ([a-z -]+?)(?: [A-Z]+=.*)?$", "\n".join(texts), re.MULTILINE)
    named += [[each] for each in re.findall(r"`make ([a-z-]+)", read("CONTRIBUTING.md"))]
    words = {word for each in named for word in (each.split() if isinstance(each, str) else each)}
    assert {"lint", "types", "test", "docs"} <= words <= targets


def test_ci_runs_every_python_that_is_admitted() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    admitted = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert jobs["test"]["strategy"]["matrix"]["python"] == admitted
    assert len(jobs["other-systems"]["strategy"]["matrix"]["os"]) == 2


def test_files_in_yaml_can_be_read() -> None:
    for path in (*REPOSITORY.glob(".github/**/*.yml"), REPOSITORY / ".pre-commit-config.yaml"):
        assert yaml.safe_load(path.read_text("utf-8")), path


def test_hooks_before_a_commit_are_the_checks_of_make() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    hooks = {
        hook["entry"].removeprefix(".venv/bin/").split(" --")[0] for hook in repository["hooks"]
    }
    checks = re.findall(
        r"^\t\$\(BIN\)/((?:ruff|mypy).*?)(?: --check)?(?: \.)?$", read("Makefile"), re.M
    )
    assert hooks == set(checks)


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert f"## [{__version__}]" in read("CHANGELOG.md")


def test_the_source_distribution_carries_what_its_tests_need(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("benchmarks", "docs", "examples", "tests", "tools", ".github")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    tracked |= {".ci/run", ".pre-commit-config.yaml", "CONTRIBUTING.md", "mkdocs.yml", "Makefile"}
    assert tracked <= names


@pytest.mark.slow
def test_the_source_distribution_passes_its_own_tests(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # All can be collected; those that read files of the repository pass.
    for arguments in (
        ["--collect-only", "tests"],
        ["tests/test_readme.py", "tests/test_documents.py", "tests/test_imports.py"],
    ):
        done = subprocess.run(
            [*run, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]


def test_the_metadata_name_people_systems_and_extras() -> None:
    metadata = project()
    assert metadata["authors"]
    systems = [each for each in metadata["classifiers"] if each.startswith("Operating System")]
    assert len(systems) == 3
    extras = metadata["optional-dependencies"]
    [everything] = extras["all"]
    named = set(re.findall(r"\[(.*)\]", everything)[0].split(","))
    assert named <= set(extras) and {"vad", "demo", "parquet", "ray"} <= named


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_tests_of_make_quick_exist() -> None:
    command = ["make", "--dry-run", "--directory", str(REPOSITORY), "quick"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = re.findall(r"tests/\S+", shown)
    assert len(paths) > 20
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
