"""Slots on an NVIDIA GPU: one recorded step for all slots, prompts in a separate decoder.

Prompts of new clips run in a prefill decoder, which is as large as one refill and uses the memory
of other decodes; their rows are then copied into free slots. The recorded step therefore does not
depend on which clips are in the slots, and the other rows are not touched.

The host reads copies of the slots' state a few steps late, so that the GPU always has work queued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from whisper_flash_attention.engine.cuda_decoder import CudaDecoder, RaggedPrompts
from whisper_flash_attention.engine.cuda_graphs import to_device, to_host
from whisper_flash_attention.engine.layout import Layout, prefill_layout
from whisper_flash_attention.engine.logits_processors import KernelProcessors
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import (
    DecodeJob,
    FinishedJob,
    finish_job,
    not_finite,
)
from whisper_flash_attention.engine.weights import DecoderWeights

# Steps between two polls, at least. A finished slot is noticed one to two polls later and idle
# until then; each poll copies all tokens. Where the device has nothing queued when the host comes
# to queue more, there are more, up to the second number.
STEPS_PER_POLL, MOST_STEPS = 4, 16
# Further steps before jobs are prepared, which takes the host longer than the device takes for
# those of a poll.
STEPS_AHEAD = 8
# Columns of a table of prompts, after the tokens: places, settings and limits of `RaggedPrompts`.
RAGGED_COLUMNS = (3, 8, 4)


class CudaSlots:
    """Slots whose steps are CUDA graphs."""

    def __init__(
        self,
        weights: DecoderWeights,
        decoder: CudaDecoder,
        prefill: Callable[[Layout], CudaDecoder],
        first: DecodeJob,
        *,
        slots: int,
        refill: int,
    ) -> None:
        self._weights = weights
        self._decoder = decoder
        self._prefill = prefill
        self._refill = refill
        self._jobs: list[DecodeJob | None] = [None] * slots
        self._request = first.request
        self._pad = first.request.pad
        self._poll: _Poll | None = None
        self._steps = STEPS_PER_POLL
        # After all work that was queued so far; None on a CPU.
        self._queued: torch.cuda.Event | None = None
        if decoder.state.finished.is_cuda:
            self._queued = torch.cuda.Event()  # type: ignore[no-untyped-call]
        decoder.clear(kernel_processors_of(first.request), first.request)

    def start(self, jobs: Sequence[DecodeJob]) -> None:
        """Run the prompts of jobs, at most `refill` at a time."""
        for begin in range(0, len(jobs), self._refill):
            self._admit(jobs[begin : begin + self._refill])
        self._mark()

    def advance_all(self) -> list[FinishedJob]:
        """Take a few steps; return the jobs that had finished before them."""
        ran_dry = self._queued is not None and self._queued.query()  # type: ignore[no-untyped-call]
        self._steps = (
            min(MOST_STEPS, 2 * self._steps) if ran_dry else max(STEPS_PER_POLL, self._steps - 1)
        )
        self._queue(self._steps)
        before, self._poll = self._poll, self._start_poll()
        return [] if before is None else self._ended(before)

    def queue_steps(self) -> None:
        """Queue a few steps; the next poll shows the jobs that they finish."""
        self._queue(STEPS_AHEAD)

    def _queue(self, steps: int) -> None:
        for _ in range(steps):
            self._decoder.step(self._pad)
        self._mark()

    def _mark(self) -> None:
        if self._queued is not None:
            self._queued.record()

    def _start_poll(self) -> _Poll:
        """Start copying the slots' state to the host, after the steps so far."""
        state = self._decoder.state
        held = (
            state.finished,
            state.failed,
            state.sum_logprobs,
            state.output,
            self._decoder.adopted_probability,
        )
        return _Poll(list(self._jobs), to_host(*held))

    def _ended(self, poll: _Poll) -> list[FinishedJob]:
        finished, failed, sums, output, probe_probability = (each.numpy() for each in poll.wait())
        is_finished, has_failed = finished.tolist(), failed.tolist()
        # A poll may show an earlier job of a slot.
        current = [
            (slot, job)
            for slot, job in enumerate(self._jobs)
            if job is not None and job is poll.jobs[slot]
        ]
        failed_jobs = [job for slot, job in current if has_failed[slot]]
        if failed_jobs:
            raise not_finite(failed_jobs)
        ended = [(slot, job) for slot, job in current if is_finished[slot]]
        for slot, _ in ended:
            self._jobs[slot] = None
        return [
            finish_job(
                job, output[slot].tolist(), float(sums[slot]), float(probe_probability[slot])
            )
            for slot, job in ended
        ]

    def _admit(self, jobs: Sequence[DecodeJob]) -> None:
        longest = max(len(job.prompt) for job in jobs)
        slots = self._decoder.state.layout
        layout = prefill_layout(self._weights, slots, clips=self._refill, prompt=longest)
        prefill = self._prefill(layout)
        free = [slot for slot, job in enumerate(self._jobs) if job is None][: len(jobs)]
        prompts = ragged_prompts(jobs, free, slots.vocabulary, slots.device)
        states = torch.stack([job.states for job in jobs])
        prefill.begin(states, prompts, kernel_processors_of(self._request), self._request)
        self._decoder.adopt(prefill, prompts, self._request)
        for slot, job in zip(free, jobs, strict=True):
            self._jobs[slot] = job


@dataclass(frozen=True)
class _Poll:
    """The jobs in the slots, and a function that waits for copies of the slots' state."""

    jobs: list[DecodeJob | None]
    wait: Callable[[], tuple[torch.Tensor, ...]]


def ragged_prompts(
    jobs: Sequence[DecodeJob], slots: Sequence[int], vocabulary: int, device: torch.device
) -> RaggedPrompts:
    """Build the prompts and tables of jobs for `slots` on the host, and copy them at once.

    Each operation of PyTorch gives other threads the interpreter, which then has to be awaited.
    """
    longest = max(len(job.prompt) for job in jobs)
    table = np.zeros((len(jobs), longest + sum(RAGGED_COLUMNS)), np.int64)
    for row, job, slot in zip(table, jobs, slots, strict=True):
        request, length = job.request, len(job.prompt)
        processors, place = kernel_processors_of(request), request.probe[1] if request.probe else 0
        row[:length] = job.prompt
        row[longest:] = (
            *(slot, length - longest, place + longest - length),
            *processors.settings(vocabulary, request.max_length),
            *processors.next_limits(job.prompt, vocabulary),
        )
    prompt, places, settings, limits = torch.split(
        to_device(table, device), [longest, *RAGGED_COLUMNS], dim=1
    )
    into, first_positions, probe_positions = places.unbind(1)
    return RaggedPrompts(prompt, into, first_positions, probe_positions, settings, limits)


def kernel_processors_of(request: Request) -> KernelProcessors:
    """Return the request's processors as kernel data; the caller has checked that they fit."""
    processors = request.processors.kernel_processors
    assert processors is not None
    return processors
