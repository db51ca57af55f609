"""Looking at flags: never too early, and in the end."""

from __future__ import annotations

import pytest
import torch

from whisper_flash_attention.engine.cuda_graphs import CompletionPoll


@pytest.mark.gpu
def test_waiting_sees_what_held_at_the_last_look() -> None:
    flags = torch.zeros(3, dtype=torch.bool, device="cuda")
    look = CompletionPoll(flags)
    assert not look.all_true(wait=True)
    flags.fill_(True)
    assert not look.all_true(wait=True)
    torch.cuda._sleep(10_000_000)
    assert look.all_true(wait=True)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flags_are_seen_when_all_hold_and_not_before(name: str) -> None:
    flags = torch.zeros(3, dtype=torch.bool, device=name)
    look = CompletionPoll(flags)
    for index in range(3):
        assert not look.all_true()
        flags[index] = True
    if name == "cuda":
        look.all_true()  # asks for a copy
        torch.cuda.synchronize()
        look.all_true()  # may still have been an earlier one
        torch.cuda.synchronize()
    assert look.all_true()
