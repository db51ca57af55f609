"""The start of a process of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import gc, sys, threading
from whisper_flash_attention.cli.process import hurry, settle
hurry(sys.argv[1:])
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
is_loaded = "libtorch_cpu" in open("/proc/self/maps").read()
print(gc.isenabled(), is_loaded, "torch" in sys.modules)
import torch
settle()
print(gc.isenabled(), int(torch.ones(2, 2).mm(torch.ones(2, 2)).sum()))
"""
IS_FOR_CPUS = not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is mapped")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["transcribe", "talk.mp3"], f"False {IS_FOR_CPUS} False"),
        (["transcribe", "--help"], "True False False"),
        (["doctor"], "True False False"),
    ],
)
def test_a_transcription_loads_pytorch_ahead_and_collects_garbage_later(
    arguments: list[str], expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [expected, "True 8"]


END = """
import atexit, sys
from whisper_flash_attention.cli import main
from whisper_flash_attention.cli.process import leave
atexit.register(print, "registered")
leave(["doctor"], 3)
leave(["transcribe", "--help"], 3)
leave(["transcribe"], "a message")
print("still here")
leave(["transcribe", "talk.mp3"], 3)
print("never")
"""


def test_a_transcription_ends_with_what_was_registered_and_its_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["still here", "registered"]


def test_an_error_has_its_exit_code_and_needs_neither_rich_nor_pydantic() -> None:
    script = (
        "import atexit, sys; from whisper_flash_attention.cli import main\n"
        "atexit.register(lambda: print({'rich', 'pydantic'} & set(sys.modules)))\n"
        "main()"
    )
    command = [sys.executable, "-c", script, "transcribe", "no-such-file.mp3", "-f", "srt"]
    command += ["--output-dir", "subtitles", "--model", "package:tiny.en", "--word-timestamps"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert done.stderr == "error: no-such-file.mp3: there is no such file\n"


@pytest.mark.parametrize("arguments", [["doctor"], ["transcribe", "talk.mp3"]])
def test_nothing_is_reported_as_leaked_at_the_end(arguments: list[str]) -> None:
    pytest.importorskip("triton")
    script = (
        "import sys; from whisper_flash_attention.cli.process import hurry, settle\n"
        "hurry(sys.argv[1:])\nimport torch, triton\nsettle()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
