"""A run from its plan to its files: probe the machine, measure every job, write what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from whisper_flash_attention.benchmark.ceilings import measure_ceilings
from whisper_flash_attention.benchmark.environment import Environment, describe_environment
from whisper_flash_attention.benchmark.features import FeatureFile, clips_needed, prepare_features
from whisper_flash_attention.benchmark.measure import Measurement, measure
from whisper_flash_attention.benchmark.output import write_outputs
from whisper_flash_attention.benchmark.processes import (
    START_TIMEOUT,
    ProcessFailed,
    Workers,
    start_workers,
)
from whisper_flash_attention.benchmark.progress import Narrator, narrate
from whisper_flash_attention.benchmark.results import ResultRow, Store, percentile
from whisper_flash_attention.benchmark.roofline import Ceilings, Workload, floor
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, Job
from whisper_flash_attention.errors import BenchmarkError
from whisper_flash_attention.terminal import print_line


@dataclass(frozen=True)
class Options:
    """How to run: where to write, which speech, seconds per row, whether to keep old rows.

    `commit` is recorded instead of what git says of this checkout.
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
    asked: list[ResultRow]
    files: list[Path]


@dataclass(frozen=True)
class Site:
    """Where jobs are measured: the machine, its ceilings, and the features on its disk."""

    environment: Environment
    ceilings: Ceilings
    features: dict[int, FeatureFile]


def run(jobs: Sequence[Job], options: Options, console: Console) -> Outcome:
    """Measure the jobs that have no finished row yet, and write all outputs.

    On KeyboardInterrupt the row in hand is given up, the outputs of the others are written, and
    the exception goes on to the caller.

    Raises:
        BenchmarkError: the folder, the machine or the features are not usable.
    """
    store = Store(options.output)
    workers = start_workers(jobs[0].device)
    with tempfile.TemporaryDirectory(prefix="whisper-flash-features-") as folder:
        site = survey_site(jobs, options, workers, Path(folder))
        asked = {blank_row(job, site).slot for job in jobs}
        finished = store.finished() if options.resume else set()
        todo = [job for job in jobs if blank_row(job, site).key not in finished]
        if len(todo) < len(jobs):
            kept = len(jobs) - len(todo)
            print_line(
                console, f"{kept} of {len(jobs)} rows were measured before; --no-resume repeats"
            )
        try:
            with narrate(todo, site.ceilings, console) as narrator:
                for job in todo:
                    run_job(job, site, store, workers, options, narrator)
        finally:
            rows = store.rows()
            files = write_outputs(rows, options.output, console)
    return Outcome(rows, [row for row in rows if row.slot in asked], files)


def survey_site(jobs: Sequence[Job], options: Options, workers: Workers, folder: Path) -> Site:
    """Look at the machine, measure its ceilings, and compute the features, each in a process.

    Raises:
        BenchmarkError: one of them failed; the message has the reason.
    """
    device, dtype = jobs[0].device, jobs[0].dtype
    clips = clips_needed([job.setting for job in jobs])
    try:
        environment = workers.call(
            describe_environment, device, options.commit, timeout=START_TIMEOUT
        )
        ceilings = workers.call(measure_ceilings, device, dtype, timeout=START_TIMEOUT)
    except ProcessFailed as error:
        raise BenchmarkError(f"{device} cannot be measured in {dtype}: {error.reason}") from error
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
    narrator: Narrator,
) -> ResultRow:
    """Measure one job in a process of its own and store its row, whatever comes of it."""
    narrator.start(job)
    tokens: tuple[tuple[int, ...], ...] = ()
    try:
        measured = workers.call(
            measure,
            job,
            site.features[MODEL_SIZES[job.row.checkpoint].mel_bins],
            timeout=options.timeout,
            on_progress=narrator.advance,
        )
    except ProcessFailed as error:
        row = replace(blank_row(job, site), error=error.reason)
        store.keep_log(job.title, error.log)
    else:
        row, tokens = filled_row(blank_row(job, site), measured), measured.tokens
    store.add(row, tokens)
    narrator.finish(row)
    return row


def blank_row(job: Job, site: Site) -> ResultRow:
    """The row of a job of which nothing is known but its plan; it counts as failed."""
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
