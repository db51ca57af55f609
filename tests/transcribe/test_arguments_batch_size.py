"""How many windows go side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.arguments import automatic_batch_size, parse_batch_size


def test_a_number_or_auto() -> None:
    assert parse_batch_size("auto") is None and parse_batch_size(" AUTO ") is None
    assert parse_batch_size("1") == 1 and parse_batch_size("256") == 256
    for text in ("0", "-1", "1.5", "", "many", "²", "10001", "9" * 5000):
        with pytest.raises(OptionError, match="give a whole number, 1 to 10000, or auto"):
            parse_batch_size(text)


class Model:
    """Of which `each` bytes go into every clip of a batch."""

    def __init__(self, device: str, each: float = 1e8) -> None:
        self.device, self.each = torch.device(device), each
        self.config = SimpleNamespace(max_target_positions=448)
        self.requested: dict[str, Any] = {}

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(250_000_000, device="meta")]  # 1 GB

    def plan(self, *, memory_gb: float, **requested: Any) -> SimpleNamespace:
        self.requested = requested
        fits = int((memory_gb * 1e9 - 1e9) / self.each)
        if fits < 1:
            raise OptionError("too small for one clip")
        return SimpleNamespace(batch_size=fits)


def test_few_on_a_cpu() -> None:
    assert automatic_batch_size(Model("cpu"), "batched") == 4
    assert automatic_batch_size(SimpleNamespace(device=torch.device("cuda")), "batched") == 4


@pytest.mark.parametrize(
    ("free", "mode", "expected"),
    [(4e9, "batched", 20), (4e9, "sequential", 20), (40e9, "sequential", 32), (1e8, "batched", 4)],
)
def test_what_fits_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: float, mode: str, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    model = Model("cuda")
    assert automatic_batch_size(model, mode, beams=5) == expected
    assert model.requested == {"max_new_tokens": 444, "prompt_tokens": 4, "num_beams": 5}
