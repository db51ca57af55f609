"""Slots on an NVIDIA GPU: one recorded step for all of them, prompts beside it.

Newcomers run their prompts in a decoder of their own, the entry, which is as large as one refill
and lives in the memory that other decodes use; then their rows are copied into their slots. So
what is recorded for the slots knows nothing of who is in them, and the others' rows are not
touched.

The host looks at copies of what the slots hold, a few steps behind: the GPU always has steps to
run while the host reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from whisper_flash_attention.engine.cuda_decoder import DeviceDecoder, Starts
from whisper_flash_attention.engine.cuda_graphs import to_device, to_host
from whisper_flash_attention.engine.layout import Layout, entry_layout
from whisper_flash_attention.engine.logits_processors import FusedRules, History
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import (
    Finished,
    Job,
    answer_of,
    by_request,
    not_finite,
)
from whisper_flash_attention.engine.weights import DecoderWeights

# Steps between two looks. A slot that ends is noticed between one and two looks later, and idle
# until then; looks cost a copy of all tokens.
STEPS_PER_LOOK = 4


class DeviceSlots:
    """Slots whose steps are recorded."""

    def __init__(
        self,
        weights: DecoderWeights,
        decoder: DeviceDecoder,
        entry: Callable[[Layout], DeviceDecoder],
        first: Job,
        *,
        slots: int,
        refill: int,
    ) -> None:
        self._weights = weights
        self._decoder = decoder
        self._entry = entry
        self._refill = refill
        self._jobs: list[Job | None] = [None] * slots
        self._request = first.request
        self._pad = first.request.pad
        self._watched = torch.zeros(slots, device=decoder.state.tokens.device)
        self._look: _Look | None = None
        decoder.clear(fused_of(first.request), first.request)

    def start(self, jobs: Sequence[Job]) -> None:
        """Run the prompts of jobs, as many at a time as are started together in a refill."""
        for begin in range(0, len(jobs), self._refill):
            self._enter(jobs[begin : begin + self._refill])

    def go_on(self) -> list[Finished]:
        """A few steps; what had ended before them."""
        for _ in range(STEPS_PER_LOOK):
            self._decoder.step(self._pad)
        before, self._look = self._look, self._look_now()
        return [] if before is None else self._ended(before)

    def _look_now(self) -> _Look:
        """Have everything copied once the steps so far have run."""
        state = self._decoder.state
        held = (state.finished, state.failed, state.sum_logprobs, state.output, self._watched)
        return _Look(list(self._jobs), to_host(*held))

    def _ended(self, look: _Look) -> list[Finished]:
        finished, failed, *said = look.arrived()
        is_over, is_broken = finished.tolist(), failed.tolist()
        # A look may show who was in a slot before those who are there now.
        seen = [
            (slot, job)
            for slot, job in enumerate(self._jobs)
            if job is not None and job is look.jobs[slot]
        ]
        broken = [job for slot, job in seen if is_broken[slot]]
        if broken:
            raise not_finite(broken)
        ended = [(slot, job) for slot, job in seen if is_over[slot]]
        for slot, _ in ended:
            self._jobs[slot] = None
        sums, output, watched = said
        return [
            answer_of(job, output[slot].tolist(), float(sums[slot]), float(watched[slot]))
            for slot, job in ended
        ]

    def _enter(self, jobs: Sequence[Job]) -> None:
        longest = max(len(job.prompt) for job in jobs)
        slots = self._decoder.state.layout
        layout = entry_layout(self._weights, slots, clips=self._refill, prompt=longest)
        entry = self._entry(layout)
        states = torch.stack([job.states for job in jobs])
        starts = starts_of(jobs, longest, slots.vocabulary, slots.device)
        entry.begin(states, starts, fused_of(self._request), self._request)
        free = [slot for slot, job in enumerate(self._jobs) if job is None][: len(jobs)]
        for slot, job in zip(free, jobs, strict=True):
            self._jobs[slot] = job
        into = to_device(np.array(free), slots.device)
        self._decoder.adopt(entry, into, longest)
        if self._request.watch is not None:
            assert entry.watched is not None
            self._watched[into] = entry.watched


@dataclass(frozen=True)
class _Look:
    """Who was in the slots, and the function that gives what they held, once that has arrived."""

    jobs: list[Job | None]
    arrived: Callable[[], tuple[torch.Tensor, ...]]


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
