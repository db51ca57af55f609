"""What a run says while it goes: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from whisper_flash_attention.benchmark.results import ResultRow
from whisper_flash_attention.benchmark.roofline import Ceilings, Workload, floor
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, Job
from whisper_flash_attention.terminal import print_line

# Rough, and only for the shares of the bar: what a row costs beside its calls, how far calls stay
# from the roofline, and what launching the work of one decoder layer costs.
START_SECONDS = 2.0
FROM_THE_ROOFLINE = 4.0
LAYER_STEP_SECONDS = 0.0005
WARM_UP_CALLS = 2


def expected_seconds(job: Job, ceilings: Ceilings) -> float:
    """A guess of how long a job takes, warm-up included, good enough to share out a bar."""
    setting, layers = job.setting, job.row.decoder_layers
    work = Workload.of(MODEL_SIZES[job.row.checkpoint], layers, setting, job.dtype)
    launches = LAYER_STEP_SECONDS * setting.new_tokens * layers
    call = launches + FROM_THE_ROOFLINE * floor(work, ceilings).seconds
    return START_SECONDS + (setting.batches + WARM_UP_CALLS) * call


class Narrator(Protocol):
    """Listens to a run."""

    def start(self, job: Job) -> None:
        """This job starts."""

    def advance(self, batches: int) -> None:
        """So many of the job's timed batches are done."""

    def finish(self, row: ResultRow) -> None:
        """The job has ended with this row."""


class Course:
    """How far a run has come, in expected seconds, and how long the rest will take."""

    def __init__(self, jobs: list[Job], ceilings: Ceilings) -> None:
        self.rows = len(jobs)
        self.finished = 0
        self.total = sum(expected_seconds(job, ceilings) for job in jobs)
        self.done = 0.0
        self._ceilings = ceilings
        self._before = 0.0
        self._begun = time.monotonic()

    def advance(self, job: Job, batches: int) -> None:
        """So many of this job's timed batches are done."""
        calls = (batches + WARM_UP_CALLS) / (job.setting.batches + WARM_UP_CALLS)
        self.done = self._before + calls * expected_seconds(job, self._ceilings)

    def finish(self, job: Job) -> None:
        """This job is over, whatever came of it."""
        self._before += expected_seconds(job, self._ceilings)
        self.done = self._before
        self.finished += 1

    @property
    def left(self) -> str:
        """The time left at the pace so far, in words."""
        if self.done == 0.0:
            return "? left"
        pace = (time.monotonic() - self._begun) / self.done
        seconds = pace * (self.total - self.done)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


@contextmanager
def narrate(jobs: list[Job], ceilings: Ceilings, console: Console) -> Iterator[Narrator]:
    """A narrator for this console."""
    course = Course(jobs, ceilings)
    if not console.is_terminal:
        yield Lines(course, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as progress:
        yield Bar(course, progress)


class Lines:
    """One line per finished row."""

    def __init__(self, course: Course, console: Console) -> None:
        self._course = course
        self._console = console
        self._job: Job | None = None

    def start(self, job: Job) -> None:
        self._job = job

    def advance(self, batches: int) -> None:
        pass

    def finish(self, row: ResultRow) -> None:
        assert self._job is not None, "finish without start"
        self._course.finish(self._job)
        count = f"[{self._course.finished}/{self._course.rows}]"
        print_line(self._console, f"{count} {outcome(row)} ({self._course.left})")


class Bar:
    """A bar that advances with every timed batch; finished rows stay above it as lines."""

    def __init__(self, course: Course, progress: Progress) -> None:
        self._course = course
        self._progress = progress
        self._task = progress.add_task("", total=course.total, state="")
        self._job: Job | None = None

    def start(self, job: Job) -> None:
        self._job = job
        self._show(job.title)

    def advance(self, batches: int) -> None:
        assert self._job is not None, "advance without start"
        self._course.advance(self._job, batches)
        self._show(self._job.title)

    def finish(self, row: ResultRow) -> None:
        assert self._job is not None, "finish without start"
        self._course.finish(self._job)
        self._show("")
        print_line(self._progress.console, outcome(row))

    def _show(self, title: str) -> None:
        course = self._course
        state = f"{course.finished}/{course.rows} rows, {course.left}"
        self._progress.update(self._task, description=title, completed=course.done, state=state)


def outcome(row: ResultRow) -> str:
    """A row in one line."""
    title = f"{row.setting} {row.checkpoint} {row.decoder_layers} {row.system}"
    if row.seconds_per_batch is None:
        return f"{title}: {row.status}: {row.error}"
    return f"{title}: {row.seconds_per_batch:.4g} s per batch of {row.batch_size}"
