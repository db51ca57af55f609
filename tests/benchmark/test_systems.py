"""The registry of systems, and why some cannot run here."""

from __future__ import annotations

import pytest
import torch

from whisper_flash_attention.benchmark.settings import DEFAULT_SYSTEMS
from whisper_flash_attention.benchmark.systems import SYSTEMS, backend_systems, named
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.flash_attention import backend_names

CPU = torch.device("cpu")


def test_every_attention_backend_is_a_system() -> None:
    assert set(backend_systems()) == set(backend_names()) - {"auto"}
    for backend, system in backend_systems().items():
        assert system.name == f"flash:{backend}"
        assert named(system.name) == system


def test_default_systems_exist() -> None:
    assert [named(name).name for name in DEFAULT_SYSTEMS] == list(DEFAULT_SYSTEMS)


@pytest.mark.parametrize("name", ["", "Orig", "flash:", "flash:auto", "flash:nonsense", "x:sdpa"])
def test_an_unknown_name_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(OptionError, match="flash:sdpa_flash"):
        named(name)


def test_stock_systems_and_ours_with_the_oracle_run_everywhere() -> None:
    for name in (*SYSTEMS, "flash:reference"):
        assert named(name).why_not(CPU, torch.float32) is None


@pytest.mark.parametrize("backend", ["sdpa_cudnn", "xformers", "flash_attn"])
def test_a_gpu_backend_has_a_reason_why_it_cannot_run_on_a_cpu(backend: str) -> None:
    reason = named(f"flash:{backend}").why_not(CPU, torch.float32)
    assert reason is not None
    assert f"{backend} cannot run encoder self-attention: needs a CUDA GPU" in reason


def test_only_our_systems_are_ours() -> None:
    assert {name for name, system in SYSTEMS.items() if system.is_ours} == {"flash"}
    assert all(system.is_ours for system in backend_systems().values())
