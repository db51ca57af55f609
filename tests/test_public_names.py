"""The public surface: what is exported, what an import costs, who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import whisper_flash_attention

PACKAGE = Path(whisper_flash_attention.__file__).parent

# Folder -> what it must not import. Imports go one way.
ABOVE = (
    "weights",
    "audio",
    "transcribe",
    "benchmark",
    "cli",
    "doctor",
    "modeling",
    "hf",
    "batch",
)
FORBIDDEN = {
    "kernels": (*ABOVE, "engine", "flash_attention"),
    "flash_attention": (*ABOVE, "engine", "kernels"),
    "engine": ABOVE,
    "hf": tuple(name for name in ABOVE if name != "hf"),
    "weights": (*ABOVE[1:], "engine", "kernels", "flash_attention"),
    "audio": (*ABOVE[2:], "engine", "kernels", "flash_attention", "weights"),
    "transcribe": ("benchmark", "cli", "doctor", "batch"),
    "benchmark": ("cli", "doctor", "batch"),
    "terminal": (*ABOVE, "engine", "kernels", "flash_attention", "parity"),
    "batch": ("benchmark", "cli", "doctor", "engine", "hf", "modeling", "weights"),
}


PUBLIC_NAMES = {
    "DecodeOptions",
    "Segment",
    "Transcriber",
    "Transcription",
    "WhisperFlashAttentionForConditionalGeneration",
    "Word",
    "attend",
    "load_processor",
}


def test_the_names_that_users_import_are_at_the_top_of_the_package() -> None:
    assert set(whisper_flash_attention.__all__) >= PUBLIC_NAMES


def test_every_public_name_can_be_had() -> None:
    for name in whisper_flash_attention.__all__:
        assert getattr(whisper_flash_attention, name) is not None
    assert sorted(whisper_flash_attention.__all__) == dir(whisper_flash_attention)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = whisper_flash_attention.nothing


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, whisper_flash_attention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("whisper_flash_attention.") for name in names if "whisper_" in name}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    files = list((PACKAGE / folder).glob("**/*.py"))
    assert files
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        for name in imported_modules(path)
        if name.split(".")[0].startswith(FORBIDDEN[folder])
    ]
    assert not wrong


def test_environment_variables_are_read_in_one_place() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.glob("**/*.py")
        if re.search(r"environ\.get|environ\[|getenv", path.read_text())
    }
    assert readers <= {"options.py"}
