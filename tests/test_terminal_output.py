"""Standard output that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
SCRIPT = """
import sys
from whisper_flash_attention.terminal import StandardOutput
try:
    getattr(StandardOutput(), sys.argv[1])("text")
except BrokenPipeError:
    print("nobody reads", file=sys.stderr)
    sys.stdout = None
except OSError as error:
    print(error.strerror, file=sys.stderr)
"""


@needs_full
@pytest.mark.parametrize("method", ["write", "write_json"])
def test_a_full_disk_is_told_once_and_not_again_at_the_end(method: str) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, method], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0
    assert done.stderr == "No space left on device\n"


def test_a_pipe_without_a_reader_is_left_to_the_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "write"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.stderr == "nobody reads\n"
