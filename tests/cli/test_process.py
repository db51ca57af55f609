"""The start of a process of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import gc, sys, threading
from importlib.util import find_spec
from whisper_flash_attention.cli.process import hurry, settle
for arguments in (["doctor"], ["transcribe", "--help"], ["transcribe", "talk.mp3"]):
    hurry(arguments)
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()
    is_loaded = "libtorch_cpu" in open("/proc/self/maps").read()
    print(gc.isenabled(), is_loaded, "torch" in sys.modules)
import torch
if find_spec("triton"):
    import triton
settle()
print(gc.isenabled(), int(torch.ones(2, 2).mm(torch.ones(2, 2)).sum()))
"""
IS_FOR_CPUS = not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is mapped")
def test_only_a_transcription_loads_pytorch_ahead_and_collects_garbage_later() -> None:
    """At its end nothing is reported as leaked."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    others = ["True False False"] * 2
    assert done.stdout.splitlines() == [*others, f"False {IS_FOR_CPUS} False", "True 8"]


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
