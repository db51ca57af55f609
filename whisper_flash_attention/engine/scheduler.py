"""Decode many clips in few slots: a finished row is refilled while the others continue.

A slot is a row of the batch, with a prompt, a position and lengths of its own. `run_slots`
keeps the slots busy; `torch_slots` (PyTorch, every device) and `cuda_slots` (kernels and CUDA
graphs) implement its `Slots` protocol.

Clips are requested only when slots are free, so that few encoder states are held at a time.
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
    """A clip to decode.

    Args:
        states: the encoder's, [S, D].
        prompt: at least one token.
        request: greedy, with processors that the kernels support. Requests of one stream may differ
            in lengths and positions (`max_length`, `begin_index`, `probe`), not in tokens.
        tag: identifies the job for the caller and in error messages.
    """

    states: Tensor
    prompt: Sequence[int]
    request: Request
    tag: Any = None


@dataclass(frozen=True)
class FinishedJob:
    """The result of a job.

    Args:
        job: the job.
        tokens: generated tokens, the end included if it came before the maximum length.
        sum_logprob: sum of their log-probabilities under the processed scores.
        probe_probability: probability of the token of `Request.probe`.
    """

    job: DecodeJob
    tokens: tuple[int, ...]
    sum_logprob: float
    probe_probability: float | None = None


class Slots(Protocol):
    """The slots of a stream, and the passes over them."""

    def start(self, jobs: Sequence[DecodeJob]) -> None:
        """Run the prompts of at most as many jobs as there are free slots."""

    def advance_all(self) -> list[FinishedJob]:
        """Decode a few more tokens; return the finished jobs, whose slots are free now.

        Raises:
            NotFinite: NaN or infinity in the logits of a job.
        """

    def queue_steps(self) -> None:
        """Queue steps for the device to take while the host prepares jobs."""


def run_slots(
    jobs: Sequence[DecodeJob],
    more: Callable[[int], Sequence[DecodeJob]],
    rows: Slots,
    *,
    slots: int,
    refill: int,
    check: Callable[[DecodeJob], None],
    exclusive: Callable[[], AbstractContextManager[Any]],
    is_waiting: Callable[[int], bool] = lambda free: False,
) -> Iterator[FinishedJob]:
    """Decode `jobs` and those that `more` returns; yield results as they complete.

    Args:
        jobs: the first ones, at most `slots`.
        more: returns at most the given number of jobs, or none for now. It is called again after
            results were consumed, and for the last time when no slot is busy.
        refill: number of free slots before `more` is called. Starting a clip is a separate pass
            that delays the other slots, so a GPU starts several clips together.
        check: raises an error if a job does not fit the stream.
        exclusive: context manager for every use of the device.
        is_waiting: whether `more` would return jobs for this number of slots now. They are then
            started before the results of the last steps are yielded, so that a GPU has work while
            the host takes these.
    """
    busy = 0
    finished: list[FinishedJob] = []
    while True:
        for job in jobs:
            check(job)
        if jobs:
            with exclusive():
                rows.start(jobs)
            busy += len(jobs)
        yield from finished
        if not busy:
            return
        with exclusive():
            finished = rows.advance_all()
        busy -= len(finished)
        free = slots - busy
        if busy and free >= refill and is_waiting(free):
            with exclusive():
                rows.queue_steps()
        else:
            yield from finished
            finished = []
        jobs = more(free) if free >= refill or not busy else ()


class StreamChecker:
    """Check that jobs match the first job of their stream."""

    def __init__(self, first: DecodeJob, max_length: int) -> None:
        self._max_length = max_length
        self._shape = first.states.shape
        self._key = stream_key(first.request)

    def __call__(self, job: DecodeJob) -> None:
        """Raise `OptionError` if a job does not fit."""
        length, most = len(job.prompt), min(job.request.max_length, self._max_length)
        if not 0 < length < most:
            raise OptionError(
                f"a prompt of {length} tokens leaves no room for new tokens in {most}"
            )
        if job.request.max_length > self._max_length:
            raise OptionError(
                f"max_length {job.request.max_length} is more than the stream's {self._max_length}"
            )
        if job.states.shape != self._shape:
            raise OptionError(
                f"states {list(job.states.shape)} do not match the stream's {list(self._shape)}"
            )
        if stream_key(job.request) != self._key:
            raise OptionError("the requests of a stream may differ only in lengths and positions")


def stream_key(request: Request) -> tuple[object, ...]:
    """Return what all requests of a stream must share.

    Raises:
        OptionError: slots do not support the request.
    """
    processors = request.processors.kernel_processors
    if processors is None or not stays_on_device(request):
        raise OptionError(
            "slots decode greedily, with logits processors that the kernels support, without scores"
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
    """Cut the generated tokens out of a row: after the prompt, up to the first end."""
    tokens = row[len(job.prompt) : job.request.max_length]
    ends = [tokens.index(end) for end in job.request.eos if end in tokens]
    if ends:
        tokens = tokens[: min(ends) + 1]
    return FinishedJob(
        job, tuple(tokens), sum_logprob, probe_probability if job.request.probe else None
    )
