"""A run from its plan to its files: probe the machine, measure every job, write rows and reports.

Progress is a bar with the time left on a terminal; elsewhere one line per finished row, and lines
now and then within it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from whisper_flash_attention.benchmark.environment import Environment, describe_environment
from whisper_flash_attention.benchmark.features import FeatureFile, clips_needed, prepare_features
from whisper_flash_attention.benchmark.measure import Measurement, measure, measure_ceilings
from whisper_flash_attention.benchmark.processes import (
    START_TIMEOUT,
    ProcessFailed,
    Workers,
    start_workers,
)
from whisper_flash_attention.benchmark.report import write_outputs
from whisper_flash_attention.benchmark.results import ResultRow, Store, percentile
from whisper_flash_attention.benchmark.roofline import Ceilings, Workload, floor
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, Job
from whisper_flash_attention.errors import BenchmarkError
from whisper_flash_attention.terminal import print_line

# Rough estimates for the progress bar: seconds of a row besides its calls, time of a call over the
# roofline, and the launches of one decoder layer.
START_SECONDS = 2.0
FROM_THE_ROOFLINE = 4.0
LAYER_STEP_SECONDS = 0.0005
WARM_UP_CALLS = 2
LINE_EVERY = 5.0  # seconds within a row, where there is no terminal


def expected_seconds(job: Job, ceilings: Ceilings) -> float:
    """A rough estimate of a job's time, warm-up included, for the progress bar."""
    setting, layers = job.setting, job.row.decoder_layers
    work = Workload.of(MODEL_SIZES[job.row.checkpoint], layers, setting, job.dtype)
    launches = LAYER_STEP_SECONDS * setting.new_tokens * layers
    call = launches + FROM_THE_ROOFLINE * floor(work, ceilings).seconds
    return START_SECONDS + (setting.batches + WARM_UP_CALLS) * call


class Estimate:
    """Progress of a run, in expected seconds, and its time left."""

    def __init__(self, jobs: list[Job], ceilings: Ceilings) -> None:
        self.rows = len(jobs)
        self.finished = 0
        self.total = sum(expected_seconds(job, ceilings) for job in jobs)
        self.done = 0.0
        self._ceilings = ceilings
        self._before = 0.0
        self._begun = time.monotonic()

    def advance(self, job: Job, batches: int) -> None:
        """This many of this job's timed batches are done."""
        calls = (batches + WARM_UP_CALLS) / (job.setting.batches + WARM_UP_CALLS)
        self.done = self._before + calls * expected_seconds(job, self._ceilings)

    def finish(self, job: Job) -> None:
        """This job is over, successful or not."""
        self._before += expected_seconds(job, self._ceilings)
        self.done = self._before
        self.finished += 1

    @property
    def left(self) -> str:
        """The time left at the pace so far, as text."""
        if self.done == 0.0:
            return "? left"
        pace = (time.monotonic() - self._begun) / self.done
        seconds = pace * (self.total - self.done)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


@contextmanager
def show_progress(
    jobs: list[Job], ceilings: Ceilings, console: Console
) -> Iterator[ProgressReporter]:
    """A reporter on this console."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield ProgressReporter(Estimate(jobs, ceilings), progress)


class ProgressReporter:
    """A line per finished row; on a terminal, below them, a bar that every timed batch advances.

    Elsewhere a line says which row begins, and others how many of its batches are done.
    """

    def __init__(
        self,
        estimate: Estimate,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._estimate = estimate
        self._progress = progress
        self._clock = clock
        self._reported_at = 0.0
        self._task = progress.add_task("", total=estimate.total, state="")

    def start(self, job: Job) -> None:
        """This job starts."""
        self._job = job
        self._show(job.title)
        self._tell_row("warming up")

    def advance(self, batches: int) -> None:
        """This many of the job's timed batches are done."""
        self._estimate.advance(self._job, batches)
        self._show(self._job.title)
        if batches < self._job.setting.batches and self._clock() - self._reported_at >= LINE_EVERY:
            total = self._job.setting.batches
            self._tell_row(f"batch {batches} of {total} ({self._estimate.left})")

    def finish(self, row: ResultRow) -> None:
        """The job has ended with this row."""
        estimate = self._estimate
        estimate.finish(self._job)
        self._show("")
        line = outcome(row)
        if self._progress.disable:
            line = f"[{estimate.finished}/{estimate.rows}] {line} ({estimate.left})"
        print_line(self._progress.console, line)

    def _tell_row(self, state: str) -> None:
        """Where there is no terminal, say how far the row is."""
        self._reported_at = self._clock()
        if self._progress.disable:
            estimate = self._estimate
            place = f"[{estimate.finished + 1}/{estimate.rows}] {self._job.title}"
            print_line(self._progress.console, f"{place}: {state}")

    def _show(self, title: str) -> None:
        estimate = self._estimate
        state = f"{estimate.finished}/{estimate.rows} rows, {estimate.left}"
        self._progress.update(self._task, description=title, completed=estimate.done, state=state)


def outcome(row: ResultRow) -> str:
    """A row in one line."""
    title = f"{row.setting} {row.checkpoint} {row.decoder_layers} {row.system}"
    if row.seconds_per_batch is None:
        return f"{title}: {row.status}: {row.error}"
    return f"{title}: {row.seconds_per_batch:.4g} s per batch of {row.batch_size}"


@dataclass(frozen=True)
class Options:
    """How to run: where to write, which speech, seconds per row, whether to keep old rows.

    `commit` is recorded instead of the commit of this checkout.
    """

    output: Path
    features: str = "bundled"
    timeout: float = 1800.0
    resume: bool = True
    commit: str | None = None


@dataclass(frozen=True)
class Outcome:
    """All rows of the output folder, those of this run's jobs, and the files written."""

    rows: list[ResultRow]
    requested: list[ResultRow]
    files: list[Path]


@dataclass(frozen=True)
class Site:
    """The machine, its ceilings, and the features on its disk."""

    environment: Environment
    ceilings: Ceilings
    features: dict[int, FeatureFile]


def run(jobs: Sequence[Job], options: Options, console: Console) -> Outcome:
    """Measure the jobs that have no finished row yet, and write all outputs.

    On KeyboardInterrupt the current row is dropped, the outputs of the others are written, and the
    exception is raised.

    Raises:
        BenchmarkError: the folder, the machine or the features are not usable.
    """
    store = Store(options.output)
    workers = start_workers(jobs[0].device)
    with tempfile.TemporaryDirectory(prefix="whisper-flash-features-") as folder:
        site = survey_site(jobs, options, workers, Path(folder), console)
        requested = {blank_row(job, site).slot for job in jobs}
        finished = store.finished() if options.resume else set()
        todo = [job for job in jobs if blank_row(job, site).key not in finished]
        if len(todo) < len(jobs):
            kept = len(jobs) - len(todo)
            print_line(
                console, f"{kept} of {len(jobs)} rows were measured before; --no-resume repeats"
            )
        try:
            with show_progress(todo, site.ceilings, console) as reporter:
                for job in todo:
                    run_job(job, site, store, workers, options, reporter)
        finally:
            rows = store.rows()
            files = write_outputs(rows, options.output, console)
    return Outcome(rows, [row for row in rows if row.slot in requested], files)


def survey_site(
    jobs: Sequence[Job], options: Options, workers: Workers, folder: Path, console: Console
) -> Site:
    """Describe the machine, measure its ceilings and compute the features, each in a process.

    The console shows what is done, since that takes a while on a CPU.

    Raises:
        BenchmarkError: one of them failed; the message has the reason.
    """
    device, dtype = jobs[0].device, jobs[0].dtype
    clips = clips_needed([job.setting for job in jobs])
    try:
        print_line(console, "measuring this machine's ceilings (a copy and a product)")
        environment = workers.call(
            describe_environment, device, options.commit, timeout=START_TIMEOUT
        )
        ceilings = workers.call(measure_ceilings, device, dtype, timeout=START_TIMEOUT)
    except ProcessFailed as error:
        raise BenchmarkError(f"{device} cannot be measured in {dtype}: {error.reason}") from error
    print_line(console, f"computing features of speech ({options.features})")
    features = {}
    for mel_bins in sorted({MODEL_SIZES[job.row.checkpoint].mel_bins for job in jobs}):
        path = folder / f"features-{mel_bins}.npy"
        try:
            features[mel_bins] = workers.call(
                prepare_features, options.features, mel_bins, clips, path, timeout=START_TIMEOUT
            )
        except ProcessFailed as error:
            raise BenchmarkError(
                f"features {options.features!r} cannot be had: {error.reason}"
            ) from error
    return Site(environment, ceilings, features)


def run_job(
    job: Job,
    site: Site,
    store: Store,
    workers: Workers,
    options: Options,
    reporter: ProgressReporter,
) -> ResultRow:
    """Measure one job in a process of its own and store its row, also that of a failure."""
    reporter.start(job)
    tokens: tuple[tuple[int, ...], ...] = ()
    try:
        measured = workers.call(
            measure,
            job,
            site.features[MODEL_SIZES[job.row.checkpoint].mel_bins],
            timeout=options.timeout,
            on_progress=reporter.advance,
        )
    except ProcessFailed as error:
        row = replace(blank_row(job, site), error=error.reason)
        store.keep_log(job.title, error.log)
    else:
        row, tokens = filled_row(blank_row(job, site), measured), measured.tokens
    store.add(row, tokens)
    reporter.finish(row)
    return row


def blank_row(job: Job, site: Site) -> ResultRow:
    """The row of a job before its measurement, with the status "failed"."""
    size, setting, layers = MODEL_SIZES[job.row.checkpoint], job.setting, job.row.decoder_layers
    least = floor(Workload.of(size, layers, setting, job.dtype), site.ceilings)
    parameters = size.parameters(layers)
    return ResultRow(
        status="failed",
        setting=setting.name,
        checkpoint=job.row.checkpoint,
        decoder_layers=layers,
        system=job.system,
        device=job.device,
        dtype=job.dtype,
        batch_size=setting.batch_size,
        new_tokens=setting.new_tokens,
        batches=setting.batches,
        setting_batches=job.setting_batches,
        parameters=parameters,
        compression=size.parameters(size.decoder_layers) / parameters,
        features=site.features[size.mel_bins].description,
        environment=site.environment.as_json(),
        ceilings=asdict(site.ceilings),
        roofline_seconds_per_batch=least.seconds,
        roofline_projected_seconds=least.projected,
        roofline_absorbed_seconds=least.absorbed,
    )


def filled_row(blank: ResultRow, measured: Measurement) -> ResultRow:
    """The row with what was measured."""
    if measured.skipped is not None:
        return replace(blank, status="skipped", error=measured.skipped)
    seconds = measured.seconds
    return replace(
        blank,
        status="ok",
        batches=len(seconds),
        seconds_total=sum(seconds),
        seconds_per_batch=percentile(seconds, 0.5),
        seconds_p10=percentile(seconds, 0.1),
        seconds_p90=percentile(seconds, 0.9),
        seconds=list(seconds),
        first_call_seconds=measured.first_call_seconds,
        vram_driver_gb=measured.vram_driver_gb,
        vram_source=measured.vram_source,
        vram_allocated_gb=measured.vram_allocated_gb,
        rss_peak_gb=measured.rss_peak_gb,
        tokens_checked=measured.tokens_checked,
        attention=measured.attention,
    )
