"""The public surface: what is exported, and what an import costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import whisper_flash_attention

PACKAGE = Path(whisper_flash_attention.__file__).parent

PUBLIC_NAMES = {
    "DecodeOptions",
    "Segment",
    "SubtitleOptions",
    "Transcriber",
    "Transcription",
    "WhisperFlashAttentionForConditionalGeneration",
    "Word",
    "attend",
    "load_processor",
    "write",
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


@pytest.mark.parametrize(
    ("option", "avoided"),
    [("--version", {"typer"}), ("--help", {"numpy", "rich", "torch", "transformers"})],
)
def test_a_quick_answer_imports_nothing_heavy(option: str, avoided: set[str]) -> None:
    program = f"""
import contextlib, sys
from whisper_flash_attention.cli import main
sys.argv = ["whisper-flash", {option!r}]
with contextlib.suppress(SystemExit):
    main()
sys.exit(sorted({avoided!r} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_environment_variables_are_read_in_one_place() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.glob("**/*.py")
        if re.search(r"environ\.get|environ\[|getenv", path.read_text())
    }
    assert readers <= {"options.py"}
