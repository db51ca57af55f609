"""Slots in PyTorch: rows are adjacent, and passes run on the active rows only.

A finished row leaves a gap, which the next clip fills; without one, the last row moves there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from whisper_flash_attention.engine import torch_decoder
from whisper_flash_attention.engine.layout import DecodeState, length_bucket
from whisper_flash_attention.engine.logits_processors import KernelProcessors
from whisper_flash_attention.engine.sampling import GreedyChooser, are_finite
from whisper_flash_attention.engine.scheduler import (
    DecodeJob,
    FinishedJob,
    finish_job,
    not_finite,
)
from whisper_flash_attention.engine.weights import DecoderWeights

# Steps after which new clips are admitted although no row has finished.
MOST_STEPS = 8


@dataclass
class _Row:
    """A job in a slot; `tokens` include the prompt, `sum_logprob` is of those after it."""

    job: DecodeJob
    chooser: GreedyChooser
    tokens: list[int]
    probe_probability: float | None = None
    sum_logprob: float = 0.0
    has_ended: bool = False


class TorchSlots:
    """Slots whose passes are PyTorch operations."""

    def __init__(self, weights: DecoderWeights, state: DecodeState) -> None:
        self._weights = weights
        self._state = state
        self._rows: list[_Row | None] = []
        self._choosers: dict[KernelProcessors, GreedyChooser] = {}
        # Positions below this are finite in all slots: shorter rows multiply them by zero weights.
        self._zeroed = 0

    def start(self, jobs: Sequence[DecodeJob]) -> None:
        """Run the prompts of jobs, filling gaps first."""
        gaps = [slot for slot, row in enumerate(self._rows) if row is None][: len(jobs)]
        end = len(self._rows)
        slots = [*gaps, *range(end, end + len(jobs) - len(gaps))]
        self._rows += [None] * (len(jobs) - len(gaps))
        for begin, length in _contiguous_runs(slots):
            part, jobs = jobs[:length], jobs[length:]
            self._admit(part, begin)

    def advance_all(self) -> list[FinishedJob]:
        """Take a few steps, until a row finishes."""
        for _ in range(MOST_STEPS):
            ended = self._collect_finished()
            if ended:
                return ended
            self._close_gaps()
            self._step()
        return self._collect_finished()

    def queue_steps(self) -> None:
        """Do nothing: steps are taken at once, and would delay the jobs."""

    def _admit(self, jobs: Sequence[DecodeJob], begin: int) -> None:
        """Run prompts in adjacent slots."""
        weights, device = self._weights, self._state.tokens.device
        longest = max(len(job.prompt) for job in jobs)
        self._zero_cache(longest)
        state = self._state.rows(begin, begin + len(jobs))
        prompt = torch.zeros(len(jobs), longest, dtype=torch.int64)
        for row, job in enumerate(jobs):
            prompt[row, : len(job.prompt)] = torch.tensor(job.prompt)
        torch_decoder.fill_cross(weights, torch.stack([job.states for job in jobs]), state)
        x = torch_decoder.forward(weights, state, prompt.to(device), 0)
        probe_probabilities = self._read_probe(jobs, x)
        self._rows[begin : begin + len(jobs)] = [
            _Row(job, self._chooser(job), list(job.prompt), probability)
            for job, probability in zip(jobs, probe_probabilities, strict=True)
        ]
        lasts = torch.tensor([len(job.prompt) - 1 for job in jobs], device=device)
        self._choose(
            begin, len(jobs), torch_decoder.logits(weights, torch_decoder.rows_at(x, lasts))
        )

    def _read_probe(self, jobs: Sequence[DecodeJob], x: torch.Tensor) -> Sequence[float | None]:
        """Return the probe probabilities from the prompts' residual rows x [B, P, D]."""
        probes = [job.request.probe for job in jobs if job.request.probe is not None]
        if not probes:
            return [None] * len(jobs)
        positions = torch.tensor([position for _, position in probes], device=x.device)
        probabilities = torch_decoder.probability(
            self._weights, torch_decoder.rows_at(x, positions), probes[0][0]
        )
        found: list[float] = probabilities.tolist()
        return found

    def _step(self) -> None:
        """Decode one token in every row."""
        rows = [row for row in self._rows if row is not None]
        if not rows:
            return
        last = [len(row.tokens) - 1 for row in rows]
        device = self._state.tokens.device
        self._zero_cache(max(last) + 1)
        state = self._state.rows(0, len(rows))
        tokens = torch.tensor([row.tokens[-1:] for row in rows], device=device)
        positions: int | torch_decoder.TokenPositions = last[0]
        if any(position != last[0] for position in last):
            positions = torch_decoder.TokenPositions.of(last, device)
        x = torch_decoder.forward(self._weights, state, tokens, positions)
        self._choose(0, len(rows), torch_decoder.logits(self._weights, x[:, -1]))

    def _chooser(self, job: DecodeJob) -> GreedyChooser:
        processors = job.request.processors.kernel_processors
        assert processors is not None  # checked for every job of a stream
        if processors not in self._choosers:
            self._choosers[processors] = GreedyChooser(processors, len(self._weights.embedding))
        return self._choosers[processors]

    def _choose(self, begin: int, count: int, logits: torch.Tensor) -> None:
        """Choose the best token of `count` rows from their logits [N, V]."""
        rows = [row for row in self._rows[begin : begin + count] if row is not None]
        jobs = [row.job for row in rows]
        logits = logits.cpu()
        is_finite = are_finite(logits)
        if not all(is_finite):
            raise not_finite([job for job, good in zip(jobs, is_finite, strict=True) if not good])
        alike: dict[GreedyChooser, list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(row.chooser, []).append(index)
        for chooser, members in alike.items():
            scores = logits if len(members) == count else logits[members]
            tokens, logprobs = chooser.choose(scores, [rows[each].tokens for each in members])
            for member, token, logprob in zip(members, tokens, logprobs, strict=True):
                row, request = rows[member], rows[member].job.request
                row.tokens.append(token)
                row.sum_logprob += logprob
                row.has_ended = token in request.eos or len(row.tokens) >= request.max_length

    def _collect_finished(self) -> list[FinishedJob]:
        """Return the results of finished rows and free their slots."""
        found = []
        for slot, row in enumerate(self._rows):
            if row is not None and row.has_ended:
                total = row.sum_logprob if row.job.request.want_logprobs else 0.0
                total = torch.tensor(total).item()  # float32, as a batch returns it
                found.append(finish_job(row.job, row.tokens, total, row.probe_probability))
                self._rows[slot] = None
        return found

    def _close_gaps(self) -> None:
        """Move rows from the end into gaps."""
        while None in self._rows:
            last = self._rows.pop()
            if last is None:
                continue
            gap = self._rows.index(None)
            self._rows[gap] = last
            self._state.move(len(self._rows), gap, len(last.tokens))

    def _zero_cache(self, end: int) -> None:
        """Zero the keys and values of all slots up to position `end`, once."""
        if end > self._zeroed:
            end = min(length_bucket(end), self._state.layout.positions)
            self._state.keys[:, :, :, self._zeroed : end].zero_()
            self._state.values[:, :, :, self._zeroed : end].zero_()
            self._zeroed = end


def _contiguous_runs(slots: list[int]) -> list[tuple[int, int]]:
    """Slots in ascending order as first slots and lengths of runs without a gap."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs
