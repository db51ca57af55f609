"""What PyTorch's allocator takes from the driver, by a snapshot of what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from whisper_flash_attention.engine.device_memory import reserved_bytes, segment_bytes
from whisper_flash_attention.engine.layout import block_bytes

MIB = 2**20
GPU = torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("size", "taken"),
    [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 1, 20), (10 * MIB, 10), (10 * MIB + 1, 12)],
)
def test_segments(size: int, taken: int) -> None:
    assert segment_bytes(size) == taken * MIB


def test_an_arena_has_a_segment_of_its_own() -> None:
    assert block_bytes(torch.device("cpu"), 700) == 700
    assert [block_bytes(GPU, size * MIB) / MIB for size in (1, 9, 10, 11)] == [10, 10, 10, 12]


def test_tensors_go_into_holes_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(total: int, *free: int, pool: tuple[int, int] = (0, 0), on: int = 1) -> Any:
        blocks = [{"size": size * MIB, "state": "inactive"} for size in free]
        blocks.append({"size": (total - sum(free)) * MIB, "state": "active_allocated"})
        kind = "small" if total == 2 else "large"
        found = {"device": on, "segment_pool_id": pool, "total_size": total * MIB}
        return found | {"blocks": blocks, "segment_type": kind}

    held = [segment(20, 3, 6), segment(2, 1), segment(40, 30, pool=(0, 1)), segment(30, 20, on=0)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: held)
    assert reserved_bytes(GPU, []) == 22 * MIB
    assert reserved_bytes(GPU, [3 * MIB, 4 * MIB, 2 * MIB]) == 22 * MIB
    assert reserved_bytes(GPU, [3 * MIB, 4 * MIB, 3 * MIB]) == 42 * MIB
    assert reserved_bytes(GPU, [7 * MIB, 13 * MIB]) == 42 * MIB
    assert reserved_bytes(GPU, [11 * MIB]) == 34 * MIB
    assert reserved_bytes(GPU, [MIB]) == 22 * MIB
    assert reserved_bytes(GPU, [MIB, MIB]) == 24 * MIB
