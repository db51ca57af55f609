"""Many clips through few slots: a row that ends makes room for the next clip, others go on.

A slot is a row of the batch, with a prompt, a position and lengths of its own. `run_slots`
keeps the slots busy; `torch_slots` (PyTorch, every device) and `cuda_slots` (kernels and CUDA
graphs) implement its `Slots` protocol.

Clips are asked for when slots are free and not before, so that the encoder runs for the next ones
while the states of few are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from whisper_flash_attention.engine.request import Request, stays_on_device
from whisper_flash_attention.errors import NotFinite, OptionError


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """A clip to be decoded.

    Args:
        states: the encoder's, [S, D].
        prompt: at least one token.
        request: greedy, with rules that the kernels know. Those of one stream may differ in lengths
            and places (`max_length`, `begin_index`, where a token is watched), not in tokens.
        tag: whatever the caller wants to know the answer by.
    """

    states: Tensor
    prompt: Sequence[int]
    request: Request
    tag: Any = None


@dataclass(frozen=True)
class FinishedJob:
    """What a clip says.

    Args:
        job: whose answer it is.
        tokens: without the prompt; the end is the last, if it came before the maximum length.
        sum_logprob: of these tokens, under the scores after the rules.
        probe_probability: probability of the token of `Request.probe`.
    """

    job: DecodeJob
    tokens: tuple[int, ...]
    sum_logprob: float
    probe_probability: float | None = None


class Slots(Protocol):
    """The slots of a stream, and the passes over them."""

    def start(self, jobs: Sequence[DecodeJob]) -> None:
        """Run the prompts of jobs, of which there are at most as many as free slots."""

    def advance_all(self) -> list[FinishedJob]:
        """Decode a few more tokens; what has finished, whose slots are free now.

        Raises:
            NotFinite: NaN or infinity in the logits of a job.
        """


def run_slots(
    jobs: Sequence[DecodeJob],
    more: Callable[[int], Sequence[DecodeJob]],
    rows: Slots,
    *,
    slots: int,
    refill: int,
    check: Callable[[DecodeJob], None],
    exclusive: Callable[[], AbstractContextManager[Any]],
) -> Iterator[FinishedJob]:
    """Decode `jobs` and what `more` gives, and give answers as they are done.

    Args:
        jobs: the first ones, at most `slots`.
        more: gives so many jobs or fewer; none if there are none now. It is asked again when
            answers have been taken, and for the last time when no slot is busy.
        refill: how many slots must be free, or all, before more is asked for. Starting a clip is
            a pass of its own that the other slots wait for, so that on a GPU a few clips are
            started together.
        check: raises an error if a job does not belong into this stream.
        exclusive: entered for every use of the device.
    """
    busy = 0
    while True:
        for job in jobs:
            check(job)
        if jobs:
            with exclusive():
                rows.start(jobs)
            busy += len(jobs)
        if not busy:
            return
        with exclusive():
            finished = rows.advance_all()
        busy -= len(finished)
        yield from finished
        free = slots - busy
        jobs = more(free) if free >= refill or not busy else ()


class StreamChecker:
    """What all jobs of a stream must have in common with the first."""

    def __init__(self, first: DecodeJob, max_length: int) -> None:
        self._max_length = max_length
        self._shape = first.states.shape
        self._key = _stream_key(first.request)

    def __call__(self, job: DecodeJob) -> None:
        """Raise `OptionError` if a job does not fit."""
        length, most = len(job.prompt), min(job.request.max_length, self._max_length)
        if not 0 < length < most:
            raise OptionError(f"a prompt of {length} tokens leaves no room for an answer in {most}")
        if job.request.max_length > self._max_length:
            raise OptionError(
                f"max_length {job.request.max_length} is more than the stream's {self._max_length}"
            )
        if job.states.shape != self._shape:
            raise OptionError(
                f"states {list(job.states.shape)} do not go with states {list(self._shape)}"
            )
        if _stream_key(job.request) != self._key:
            raise OptionError("the requests of a stream must differ in their lengths alone")


def _stream_key(request: Request) -> tuple[object, ...]:
    """What the requests of a stream have in common.

    Raises:
        OptionError: its tokens cannot be chosen in slots.
    """
    processors = request.processors.kernel_processors
    if processors is None or not stays_on_device(request):
        raise OptionError(
            "slots decode greedily under rules that the kernels know, and keep no scores"
        )
    probe_token = None if request.probe is None else request.probe[0]
    form = request.cross_attention
    return (
        processors.token_bits(request.eos),
        request.pad,
        request.want_logprobs,
        probe_token,
        form,
    )


def not_finite(jobs: Sequence[DecodeJob]) -> NotFinite:
    """The error of jobs whose logits hold NaN or infinity."""
    names = ", ".join(str(job.tag) for job in jobs[:8])
    return NotFinite(
        f"the decoder's logits are not finite in {names}: the features or the weights hold NaN or "
        "infinity, or the dtype's range is too small (try bfloat16 or float32)"
    )


def finish_job(
    job: DecodeJob, row: list[int], sum_logprob: float, probe_probability: float | None
) -> FinishedJob:
    """The answer in a row of tokens, behind the prompt; padding follows its end."""
    answer = row[len(job.prompt) : job.request.max_length]
    ends = [answer.index(end) for end in job.request.eos if end in answer]
    said = answer[: min(ends) + 1] if ends else answer
    return FinishedJob(
        job, tuple(said), sum_logprob, probe_probability if job.request.probe else None
    )


def group_by_request(jobs: Sequence[DecodeJob]) -> dict[Request, list[int]]:
    """Which of the jobs have the same request."""
    found: dict[Request, list[int]] = {}
    for index, job in enumerate(jobs):
        found.setdefault(job.request, []).append(index)
    return found
