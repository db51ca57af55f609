"""Kernel tests run natively on a GPU (`-m gpu`), and in Triton's interpreter without one."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tests.interpreter import quick_interpreter as quick_interpreter

# Triton looks at this when it is imported, and again when a kernel's module is.
TOO_LATE = "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, where kernels are interpreted, or the GPU, where they are compiled."""
    from whisper_flash_attention.kernels.launch import interpreted

    chosen = torch.device(request.param)
    if (chosen.type == "cpu") != interpreted():
        pytest.skip("kernels are either interpreted or compiled, not both in one process")
    if interpreted() and TOO_LATE:
        pytest.fail("Triton was imported before TRITON_INTERPRET was set: set it in tests/conftest")
    return chosen
