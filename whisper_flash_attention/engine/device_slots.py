"""Slots on an NVIDIA GPU: one recorded step for all of them, prompts beside it.

Newcomers run their prompts in a decoder of their own, the entry, which is as large as one refill
and lives in the memory that other decodes use; then their rows are copied into their slots. So
what is recorded for the slots knows nothing of who is in them, and the others' rows are not
touched.

The host looks at copies of what the slots hold, a few steps behind: the GPU always has steps to
run while the host reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whisper_flash_attention.engine import plan
from whisper_flash_attention.engine.buffers import Buffers
from whisper_flash_attention.engine.device import DeviceDecoder, Starts
from whisper_flash_attention.engine.fused_rules import FusedRules
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.rules import History
from whisper_flash_attention.engine.slots import Finished, Job, answer_of, by_request, not_finite
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
        entry: Buffers,
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
        self._looks = [_Look(decoder, self._watched) for _ in range(2)]
        decoder.clear(_fused(first.request), first.request)

    def start(self, jobs: Sequence[Job]) -> None:
        """Run the prompts of jobs, as many at a time as are started together in a refill."""
        for begin in range(0, len(jobs), self._refill):
            self._enter(jobs[begin : begin + self._refill])

    def go_on(self) -> list[Finished]:
        """A few steps; what had ended before them."""
        for _ in range(STEPS_PER_LOOK):
            self._decoder.step(self._pad)
        now, before = self._looks
        now.take(self._jobs)
        self._looks = [before, now]
        return self._ended(before)

    def _ended(self, look: _Look) -> list[Finished]:
        finished, failed = look.read()
        # A look may show who was in a slot before those who are there now.
        seen = [
            (slot, job)
            for slot, job in enumerate(self._jobs)
            if job is not None and job is look.jobs[slot]
        ]
        broken = [job for slot, job in seen if failed[slot]]
        if broken:
            raise not_finite(broken)
        ended = [(slot, job) for slot, job in seen if finished[slot]]
        for slot, _ in ended:
            self._jobs[slot] = None
        return [look.answer(slot, job) for slot, job in ended]

    def _enter(self, jobs: Sequence[Job]) -> None:
        longest = max(len(job.prompt) for job in jobs)
        slots = self._decoder.state.layout
        layout = plan.entry_layout(self._weights, slots, clips=self._refill, prompt=longest)
        entry = self._entry.device_decoder(layout)
        states = torch.stack([job.states for job in jobs])
        starts = _starts(jobs, longest, slots.vocabulary, slots.device)
        entry.begin(states, starts, _fused(self._request), self._request)
        free = [slot for slot, job in enumerate(self._jobs) if job is None][: len(jobs)]
        for slot, job in zip(free, jobs, strict=True):
            self._jobs[slot] = job
        into = torch.tensor(free, device=slots.device)
        self._decoder.adopt(entry, into, longest)
        if self._request.watch is not None:
            assert entry.watched is not None
            self._watched[into] = entry.watched


class _Look:
    """Copies on the host of what the slots held, and who was in them."""

    def __init__(self, decoder: DeviceDecoder, watched: torch.Tensor) -> None:
        state = decoder.state
        self._sources = (state.finished, state.failed, state.sum_logprobs, state.output, watched)
        self._copies = [
            torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            for source in self._sources
        ]
        self._event: torch.cuda.Event | None = None
        self.jobs: list[Job | None] = [None] * len(watched)

    def take(self, jobs: list[Job | None]) -> None:
        """Have everything copied once the steps so far have run."""
        self.jobs = list(jobs)
        for source, copy in zip(self._sources, self._copies, strict=True):
            copy.copy_(source, non_blocking=True)
        if self._sources[0].is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> tuple[list[bool], list[bool]]:
        """Which slots had ended, and which had failed; waits for the copies."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies[0].tolist(), self._copies[1].tolist()

    def answer(self, slot: int, job: Job) -> Finished:
        """What a slot that had ended says."""
        _, _, sums, output, watched = self._copies
        return answer_of(job, output[slot].tolist(), float(sums[slot]), float(watched[slot]))


def _starts(jobs: Sequence[Job], longest: int, vocabulary: int, device: torch.device) -> Starts:
    """Prompts and tables of jobs, made on the host."""
    prompt = torch.zeros(len(jobs), longest, dtype=torch.int64)
    settings = torch.zeros(len(jobs), 8, dtype=torch.int32)
    limits = torch.zeros(len(jobs), 4, dtype=torch.int32)
    lengths = [len(job.prompt) for job in jobs]
    for row, job in enumerate(jobs):
        prompt[row, : lengths[row]] = torch.tensor(job.prompt)
    for request, rows in by_request(jobs).items():
        rules = _fused(request)
        history = History(prompt[rows], torch.tensor([lengths[row] for row in rows]))
        settings[rows] = torch.tensor(
            rules.settings(vocabulary, request.max_length), dtype=torch.int32
        )
        limits[rows] = rules.limits(history, vocabulary)
    places = torch.tensor([job.request.watch[1] if job.request.watch else 0 for job in jobs])
    tables = (prompt, torch.tensor(lengths), places, settings, limits)
    return Starts(*(each.to(device) for each in tables))


def _fused(request: Request) -> FusedRules:
    rules = request.rules.fused
    assert rules is not None
    return rules
