"""`benchmarks/memory.py`: what it computes from snapshots and phases, and a run without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from tests.scripts.loading import load_script
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, ModelSize

memory = load_script("memory")
SMALL = ModelSize(d_model=64, heads=1, encoder_layers=1, decoder_layers=1, ffn=96)


def segment(pool: tuple[int, int], total: int, allocated: int) -> dict[str, Any]:
    return {"segment_pool_id": pool, "total_size": total, "allocated_size": allocated}


def test_holes_are_in_segments_that_others_use() -> None:
    found = memory.pools_of([segment((0, 0), 20, 15), segment((0, 0), 8, 0), segment((0, 1), 6, 6)])
    assert found["0:0"] == {
        "segments": 2, "reserved": 28, "allocated": 15, "requested": 0, "holes": 5
    }  # fmt: skip
    assert found["0:1"]["holes"] == 0


def test_what_no_event_explains_is_the_rest() -> None:
    def phase(name: str, process: int, reserved: int, **events: int) -> dict[str, Any]:
        return {
            "phase": name,
            "process": process * 10**6,
            "device": None,
            "reserved": reserved * 10**6,
            "peak": reserved * 10**6,
            "events": {event: size * 10**6 for event, size in events.items()},
        }

    row = memory.summary(
        {
            "checkpoint": "tiny",
            "layers": 4,
            "system": "flash",
            "variant": memory.AS_IT_IS,
            "weights": 80_000_000,
            "plan": {"total": 140_000_000},
            "seconds": [0.003, 0.001, 0.002],
            "phases": [
                phase("context", 500, 0),
                phase("weights", 630, 100),
                phase(
                    "calls", 800, 150, graphs=10, **{"Triton's kernels": 40, "the first call": 5}
                ),
                phase("calls, released", 720, 90),
            ],
        }
    )
    assert (row["driver"], row["weight_holes"], row["call"], row["aside"]) == (800, 20, 50, 70)
    assert (row["kernels"], row["graphs"], row["rest"]) == (40, 10, 95)
    assert (row["released"], row["before"], row["plan"], row["ms"]) == (720, None, 140, 2.0)


def test_rows_are_those_of_the_benchmark() -> None:
    assert memory.parse_rows(["base:2"], ["tiny:4"]) == [("base", 2)]
    assert memory.parse_rows(None, ["tiny:4"]) == [("tiny", 4)]
    with pytest.raises(typer.BadParameter, match="possible: 4, 2"):
        memory.parse_rows(["tiny:3"], [])


def test_an_account_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the script does itself, on a device that counts nothing."""
    monkeypatch.setitem(MODEL_SIZES, "tiny", SMALL)
    monkeypatch.setattr(memory, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("init", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (70, 100))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(memory.Events, "install", lambda _: None)
    patched: list[str] = []
    variant = "own products, dense weights"
    monkeypatch.setattr(memory.Account, "patch", lambda _: patched.append(variant))
    task = memory.Task("tiny", 1, "flash", variant, new_tokens=2, calls=1, before=(2, 3))
    found = memory.account(task)
    assert [phase["phase"] for phase in found["phases"]] == [
        *("context", "first kernel", "weights", "before", "before, released"),
        *("calls", "calls, released"),
    ]
    assert len(found["seconds"]) == 1 and patched == [variant]
    assert memory.summary(found)["driver"] == pytest.approx(30e-6)
    memory.show({"rows": [found]})
