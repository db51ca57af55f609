"""Rows with fixed numbers, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from whisper_flash_attention.benchmark.results import ResultRow

ENVIRONMENT: dict[str, Any] = {
    "commit": "v0.1.0",
    "source": "0123456789ab",
    "device_name": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "python": "3.12.3",
    "os": "Linux 6.1 x86_64",
    "cpu": "Some CPU",
    "threads": 16,
    "date": "2026-01-01T00:00:00+00:00",
}


def make_row(system: str = "orig", seconds: float = 0.08, **changes: Any) -> ResultRow:
    """A row of the default setting of tiny on an H100 that took `seconds` per batch."""
    environment = ENVIRONMENT | changes.pop("environment", {})
    values: dict[str, Any] = {
        "status": "ok",
        "setting": "default",
        "checkpoint": "tiny",
        "decoder_layers": 4,
        "system": system,
        "device": "cuda",
        "dtype": "float16",
        "batch_size": 1,
        "new_tokens": 25,
        "batches": 100,
        "setting_batches": 100,
        "parameters": 37_760_640,
        "compression": 1.0,
        "features": "bundled: clips",
        "environment": environment,
        "ceilings": {"bytes_per_second": 3.02e12, "flops_per_second": 766e12},
        "roofline_seconds_per_batch": 0.0006,
        "roofline_projected_seconds": 0.0006,
        "roofline_absorbed_seconds": 0.0007,
        "seconds_total": 100 * seconds,
        "seconds_per_batch": seconds,
        "seconds_p10": seconds,
        "seconds_p90": seconds,
        "seconds": [seconds] * 100,
        "first_call_seconds": 1.0,
        "vram_driver_gb": 2.8,
        "vram_source": "process (NVML)",
        "vram_allocated_gb": 2.1,
        "rss_peak_gb": 3.0,
        "tokens_checked": 2500,
        "attention": {"all": "eager"},
    }
    return ResultRow(**(values | changes))


def failed_row(system: str, error: str, **changes: Any) -> ResultRow:
    """A row that came to nothing."""
    nothing = {"seconds": [], "tokens_checked": 0, "attention": {}, "status": "failed"}
    nothing |= dict.fromkeys(
        ("seconds_total", "seconds_per_batch", "seconds_p10", "seconds_p90", "first_call_seconds")
    )
    return make_row(system, error=error, **(nothing | changes))
