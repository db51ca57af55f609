"""Start and end a process of the command line quickly."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path


def hurry(arguments: Sequence[str]) -> None:
    """Prepare for what these arguments will import.

    The collector looks for no garbage until `settle` is called: importing PyTorch makes hundreds of
    thousands of objects, of which none is any.
    """
    if not _is_transcription(arguments):
        return
    gc.disable()
    # PyTorch would look through all installed packages for devices that the command does not offer.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if sys.platform == "linux":
        threading.Thread(target=_load_library).start()


def settle() -> None:
    """Give back memory that loading took, and look for garbage again, if `hurry` stopped that.

    What is there by now is looked at no more.
    """
    if gc.isenabled():
        return
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries report what is left at the end
    gc.enable()
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


def leave(arguments: Sequence[str], code: object) -> None:
    """End the process of these arguments with an exit code, without taking apart what it imported.

    What was registered for the end is called, and output is flushed. Where that is not all that
    the end of a process has to do, this returns.
    """
    others = [
        each
        for each in threading.enumerate()
        if each is not threading.main_thread() and not each.daemon
    ]
    is_watched = sys.getprofile() is not None or sys.gettrace() is not None
    if not _is_transcription(arguments) or not isinstance(code, int | None) or others or is_watched:
        return
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # it is reported when Python ends
        return
    os._exit(code or 0)


def _is_transcription(arguments: Sequence[str]) -> bool:
    return arguments[:1] == ["transcribe"] and not {"-h", "--help"}.intersection(arguments)


def _load_library() -> None:
    """Load the library of PyTorch for CPUs, without the interpreter's lock.

    `import torch` finds it loaded. Builds for GPUs have an order of their own for what it needs.
    """
    spec = find_spec("torch")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        folder = Path(place, "lib")
        if not (folder / "libtorch_cuda.so").exists():
            with suppress(OSError):  # `import torch` reports it
                ctypes.CDLL(str(folder / "libtorch_cpu.so"))
