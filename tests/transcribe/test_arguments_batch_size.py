"""How many windows go side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from whisper_flash_attention.engine import memory_plan
from whisper_flash_attention.engine.memory_plan import PlanRequest
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.arguments import automatic_batch_size, parse_batch_size

GIGABYTE = 10**9


def test_a_number_or_auto() -> None:
    assert parse_batch_size("auto") is None and parse_batch_size(" AUTO ") is None
    assert parse_batch_size("1") == 1 and parse_batch_size("256") == 256
    for text in ("0", "-1", "1.5", "", "many", "²", "10001", "9" * 5000):
        with pytest.raises(OptionError, match="give a whole number, 1 to 10000, or auto"):
            parse_batch_size(text)


def engine_on(device: str) -> Any:
    decoder = SimpleNamespace(positions=torch.zeros(448, 1))
    weights = SimpleNamespace(device=torch.device(device), dtype=torch.float16, decoder=decoder)
    return SimpleNamespace(weights=weights)


def test_few_on_a_cpu() -> None:
    assert automatic_batch_size(engine_on("cpu"), "batched") == 4
    assert automatic_batch_size(None, "batched") == 4


@pytest.mark.parametrize(
    ("free", "mode", "expected"),
    [(4e9, "batched", 20), (4e9, "sequential", 20), (40e9, "sequential", 32), (1e8, "batched", 4)],
)
def test_what_fits_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: float, mode: str, expected: int
) -> None:
    """Weights take 1 GB, and every window 0.1 GB."""
    requests: list[PlanRequest] = []

    def plan(weights: Any, request: PlanRequest, budget: int) -> SimpleNamespace:
        requests.append(request)
        fits = (budget - GIGABYTE) // (GIGABYTE // 10)
        if fits < 1:
            raise OptionError("too small for one clip")
        return SimpleNamespace(batch_size=fits)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    monkeypatch.setattr(memory_plan, "weight_bytes", lambda weights, request: GIGABYTE)
    monkeypatch.setattr(memory_plan, "largest_plan", plan)
    assert automatic_batch_size(engine_on("cuda"), mode, beams=5) == expected
    [request] = requests
    assert (request.max_new_tokens, request.prompt_tokens, request.num_beams) == (444, 4, 5)
    assert (request.device.type, request.dtype) == ("cuda", torch.float16)
