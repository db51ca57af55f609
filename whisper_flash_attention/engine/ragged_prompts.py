"""How rows begin that enter slots together: their prompts, and the tables that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from whisper_flash_attention.engine.fused_rules import FusedRules
from whisper_flash_attention.engine.logits_processors import History
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import Job, by_request
from whisper_flash_attention.engine.transfer import to_device


@dataclass(frozen=True)
class Starts:
    """Prompts of rows that begin together, each with a length and rules of its own.

    Args:
        prompt: [B, P] int64, padded at the ends of rows.
        lengths: of the rows, [B] int64.
        places: positions in the prompts behind which a token is watched, [B] int64.
        settings: [B, 8] int32, and limits: [B, 4] int32, as the kernels `logits` and `pick` read
            them.
    """

    prompt: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    settings: torch.Tensor
    limits: torch.Tensor


def starts_of(jobs: Sequence[Job], longest: int, vocabulary: int, device: torch.device) -> Starts:
    """Prompts and tables of jobs, made on the host."""
    prompt = torch.zeros(len(jobs), longest, dtype=torch.int64)
    settings = torch.zeros(len(jobs), 8, dtype=torch.int32)
    limits = torch.zeros(len(jobs), 4, dtype=torch.int32)
    lengths = [len(job.prompt) for job in jobs]
    for row, job in enumerate(jobs):
        prompt[row, : lengths[row]] = torch.tensor(job.prompt)
    for request, rows in by_request(jobs).items():
        rules = fused_of(request)
        history = History(prompt[rows], torch.tensor([lengths[row] for row in rows]))
        settings[rows] = torch.tensor(
            rules.settings(vocabulary, request.max_length), dtype=torch.int32
        )
        limits[rows] = rules.limits(history, vocabulary)
    places = torch.tensor([job.request.watch[1] if job.request.watch else 0 for job in jobs])
    tables = (prompt, torch.tensor(lengths), places, settings, limits)
    return Starts(*(to_device(each.numpy(), device) for each in tables))


def fused_of(request: Request) -> FusedRules:
    """Its rules as the kernels take them; there are such."""
    rules = request.rules.fused
    assert rules is not None
    return rules
