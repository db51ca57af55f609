"""What back-ends ask about the machine: its GPUs, and which optional packages it has.

Back-ends hold a `Machine`, so that their reasons can be tested for machines that are not there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import lru_cache
from typing import Protocol

import torch

Capability = tuple[int, int]


class Machine(Protocol):
    """The questions that back-ends ask."""

    def capability(self, index: int) -> Capability | None:
        """CUDA compute capability of GPU `index`; None if there is no such GPU."""

    def version(self, module: str) -> str | None:
        """Version of the installed package that provides `module`; None if there is none."""

    def import_failure(self, module: str) -> str | None:
        """Why `module`, which is installed, cannot be imported; None if it can."""


class ThisMachine:
    """The machine that we run on."""

    def capability(self, index: int) -> Capability | None:
        """What PyTorch says; None too where PyTorch was built without CUDA."""
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            return None
        return torch.cuda.get_device_capability(index)

    def version(self, module: str) -> str | None:
        """Looked up without importing: optional packages take seconds to import."""
        return _version(module)

    def import_failure(self, module: str) -> str | None:
        """Imports it: whether a compiled package fits this PyTorch shows only then."""
        return _import_failure(module)


THIS_MACHINE = ThisMachine()


@lru_cache
def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    distributions = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(distributions[0]) if distributions else "of unknown version"


@lru_cache
def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return " ".join(str(error).split())
    return None
