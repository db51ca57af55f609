"""What only a GPU can show: forked processes that use CUDA, and memory as the driver counts it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.measure import measure_ceilings
from whisper_flash_attention.benchmark.processes import cuda_is_spent, start_workers
from whisper_flash_attention.benchmark.runner import Options, run
from whisper_flash_attention.benchmark.settings import Job, Row, Setting

pytestmark = pytest.mark.gpu


def test_a_forked_process_can_use_the_gpu() -> None:
    workers = start_workers("cuda")
    assert workers.context.get_start_method() == "forkserver"
    assert not workers.call(cuda_is_spent, timeout=60)
    assert workers.call(torch.cuda.device_count, timeout=60) >= 1


def test_a_row_has_driver_memory_and_the_allocators_peak(tmp_path: Path) -> None:
    setting = Setting("default", batch_size=2, new_tokens=5, batches=3)
    jobs = [
        Job(setting, 100, Row("tiny", 2), system, "cuda", "float16") for system in ("orig", "flash")
    ]
    outcome = run(jobs, Options(tmp_path), Console(file=io.StringIO()))
    for row in outcome.rows:
        assert row.status == "ok", row.error
        assert row.tokens_checked == 30
        assert row.vram_allocated_gb is not None
        assert row.vram_driver_gb is not None
        assert row.parameters * 2 / 1e9 < row.vram_allocated_gb < row.vram_driver_gb
        assert row.seconds_per_batch is not None
        assert row.seconds_per_batch > row.roofline_seconds_per_batch


def test_the_environment_names_gpu_and_driver() -> None:
    found = describe_environment("cuda")
    assert found.device_name == torch.cuda.get_device_name()
    assert found.driver is not None
    assert found.cuda == torch.version.cuda


def test_ceilings_are_those_of_a_gpu() -> None:
    found = measure_ceilings("cuda", "float16")
    assert found.bytes_per_second > 1e11
    assert found.flops_per_second > 1e13
