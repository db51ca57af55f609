"""`benchmarks/memory.py`: what it computes from snapshots and phases, and a run without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from tests.scripts.loading import load_script
from whisper_flash_attention.benchmark.processes import ProcessFailed
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


def account(system: str, driver: int, peak: int, plan: dict[str, int] | None) -> dict[str, Any]:
    def phase(name: str, process: int, reserved: int) -> dict[str, Any]:
        sizes = {"process": process, "reserved": reserved, "peak": peak}
        return {"phase": name, "device": None} | {k: v * 10**6 for k, v in sizes.items()}

    return {
        "checkpoint": "tiny",
        "layers": 4,
        "system": system,
        "variant": memory.AS_IT_IS,
        "batch": 1,
        "weights": 80_000_000,
        "plan": plan,
        "seconds": [0.003, 0.001, 0.002],
        "phases": [
            phase("context", 500, 0),
            phase("first kernel", 602, 2),
            phase("weights", 700, 100),
            phase("calls", driver, 150),
            phase("calls, released", 720, 90),
        ],
    }


def test_a_summary_has_parts_and_shares_of_stock() -> None:
    plan = {"total": 140_000_000}
    accounts = [account("orig", 1000, 180, None), account("flash", 800, 130, plan)]
    stock, row = memory.compared([memory.summary(each) for each in accounts])
    assert (row["context"], row["weights"], row["holes"], row["call"]) == (600, 80, 20, 50)
    assert (row["driver"], row["outside"], row["aside"], row["ms"]) == (800, 50, 50, 2.0)
    assert row["calls, released"] == 720 and row["before, released"] is None
    assert (row["of_driver"], row["of_aside"]) == (0.8, 0.5)
    assert "of_driver" not in stock and row["planned_peak"] == 140


def test_what_is_left_after_a_release_is_compared_with_a_fresh_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = account("flash", 800, 130, None)
    later = fresh | {"phases": [dict(each) for each in fresh["phases"]]}
    for name, process in (("before", 1500), ("before, released", 760)):
        later["phases"].append(later["phases"][-1] | {"phase": name, "process": process * 10**6})
    summary = memory.compared([memory.summary(each) for each in (fresh, later)])
    assert summary[1]["of_fresh"] == 0.95 and "of_fresh" not in summary[0]
    memory.show({"summary": summary, "failures": []}, memory.RELEASE_COLUMNS)
    assert "95.0%" in capsys.readouterr().out


def test_rows_are_shown_as_they_come_and_failures_with_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that takes too long ends as a row; rows come back in the order of the tasks."""
    tasks = [memory.Task("tiny", 4, name) for name in ("orig", "flash")]
    tasks.append(memory.Task("base", 6, "flash"))

    class Workers:
        def call(self, function: Any, task: Any, timeout: float) -> dict[str, Any]:
            assert function is memory.account and timeout == 7
            if task.checkpoint == "base":
                raise ProcessFailed("took longer than 7 s", "noise\nTraceback\n  in our_code\n")
            return asdict(task) | account(task.system, 900, 150, None)

    monkeypatch.setattr(memory, "require_cuda", lambda: None)
    monkeypatch.setattr(memory, "start_workers", lambda device: Workers())
    found = memory.run_all(tasks, with_libraries=False, jobs=2, limit=7)
    assert [row["system"] for row in found["summary"]] == ["orig", "flash"]
    assert found["failures"][0]["reason"] == "took longer than 7 s"
    shown = capsys.readouterr().out
    for text in ("tiny 4 orig, as it is: driver 900", "tiny 4 flash", "took longer", "our_code"):
        assert text in shown
    memory.show(found)
    assert "took longer than 7 s" in capsys.readouterr().out


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
    variant = memory.CUBLAS
    monkeypatch.setattr(memory.Account, "patch", lambda _: patched.append(variant))
    task = memory.Task("tiny", 1, "flash", variant, new_tokens=2, calls=1, before=(2, 3))
    found = memory.account(task)
    assert [phase["phase"] for phase in found["phases"]] == [
        *("context", "first kernel", "weights", "before", "before, released"),
        *("calls", "calls, released"),
    ]
    assert len(found["seconds"]) == 1 and patched == [variant]
    row = memory.summary(found)
    assert row["driver"] == pytest.approx(30e-6) and row["before, released"] is not None
