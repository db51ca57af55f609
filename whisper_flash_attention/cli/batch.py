"""The command `whisper-flash batch`: an archive in, shards of rows out; stopped, it goes on.

Exit codes: 0 all done; 1 some recordings failed; 2 misuse, or the run cannot go on; 130
interrupted.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from whisper_flash_attention.audio.decoder_pool import DECODE_TIMEOUT
from whisper_flash_attention.batch.model import Model, RunOptions
from whisper_flash_attention.batch.progress import Summary
from whisper_flash_attention.batch.run import Cluster, run_batch
from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Preset,
    TemperatureIncrement,
    decode_options,
    options_of,
    takes,
)
from whisper_flash_attention.options import (
    DECODING_PANEL,
    DecodeOptions,
    ModelOptions,
    SubtitleOptions,
    TranscribeOptions,
)
from whisper_flash_attention.terminal import print_line, report_warnings

result = partial(typer.Option, rich_help_panel="Results")
machine = partial(typer.Option, rich_help_panel="Machines")


@takes("batch", ModelOptions, TranscribeOptions, DecodeOptions, SubtitleOptions)
def batch_command(
    archive: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder, a quoted pattern, or a manifest (csv, jsonl, parquet) with id and "
            "path, and perhaps language, task, prompt, start, end (seconds), channel, "
            "audio_track. All of them local or at a URL (s3://, gs://, https:// ...).",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Local folder of the results."),
    ],
    preset: Preset = "balanced",
    *,
    engine: Annotated[
        str,
        machine(
            metavar="NAME",
            help="local: one model in this process. ray: any number, by Ray Data (extra ray).",
        ),
    ] = "local",
    address: Annotated[
        str | None,
        machine(
            metavar="ADDRESS",
            help="Of a Ray cluster, or auto for the one that this machine is part of. Left out: "
            "one on this machine, for this run.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        machine(
            min=1,
            metavar="N",
            help="ray: models (left out: one per GPU, or per 4 cores). local: processes that "
            "decode recordings ahead (left out: one fewer than there are cores, at most 16).",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        machine(
            min=0.0,
            metavar="N",
            help="ray: GPUs of a model, 0.5 to have two on one. Left out: 1 if there are any.",
        ),
    ] = None,
    group_hours: Annotated[
        float,
        machine(
            metavar="N",
            help="Hours of audio that a model has side by side, 0.23 GB each, besides up to 2 "
            "hours decoded ahead (ray: twice without a GPU, since one group is made while another "
            "is in work; with one, six batches of windows at least).",
        ),
    ] = 4.0,
    group_files: Annotated[
        int | None,
        machine(
            min=1,
            metavar="N",
            help="Largest number of recordings that a model has side by side. Left out: local: as "
            "many as there is room for; ray: 4 times the windows that are decoded at a time, and "
            "on a GPU several groups. Given, each group is by itself, and what is sampled at "
            "temperatures above 0 is the same in every run.",
        ),
    ] = None,
    decode_timeout: Annotated[
        float,
        machine(
            metavar="SECONDS",
            help="Give up a recording whose decoder makes no progress for this long.",
        ),
    ] = DECODE_TIMEOUT,
    resume: Annotated[
        bool,
        result(
            help="Keep what is finished. Otherwise earlier results are moved to a folder in DIR."
        ),
    ] = True,
    retry_errors: Annotated[
        bool,
        result("--retry-errors", help="Retry recordings that failed in earlier runs."),
    ] = False,
    limit: Annotated[
        int | None,
        result(min=1, metavar="N", help="Largest number of recordings in this run."),
    ] = None,
    output_format: Annotated[
        str,
        result(
            "--format", metavar="NAME", help="Of the shards: jsonl, or parquet (extra parquet)."
        ),
    ] = "jsonl",
    subtitles: Annotated[
        str | None,
        result(
            metavar="NAMES",
            help="srt, vtt, ass, or several with commas: files in DIR/subtitles beside the shards.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Windows or chunks that are decoded at a time.",
            rich_help_panel=DECODING_PANEL,
        ),
    ] = 16,
    temperature_increment_on_fallback: TemperatureIncrement = None,
    **given: Any,
) -> None:
    """Transcribe a whole archive, on this machine or on many.

    Results are rows (id, path, text, language, segments, seconds, error ...) in shards: whole files
    DIR/part-*.jsonl or .parquet. Whatever stops the run, the same command goes on after the last
    shard; no recording is there twice. DIR/summary.json is written at the end.

    \b
    Examples:
      whisper-flash batch recordings --output texts
      whisper-flash batch 'talks/**/*.mp3' --output texts --subtitles srt,vtt
      whisper-flash batch calls.csv --output texts --preset fast --format parquet
      whisper-flash batch s3://bucket/calls --output texts --engine ray --address auto
      whisper-flash batch calls.csv --output texts --limit 100  (a trial; then without)

    Exit codes: 0 all done; 1 some recordings failed (they have rows with their error); 2
    misuse, or the run cannot go on (no model, a full disk); 130 interrupted.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    run_options = RunOptions(
        options_of(TranscribeOptions, given),
        decode_options(preset, given, temperature_increment_on_fallback),
        batch_size,
    )
    try:
        with report_warnings(lambda line: print_line(console, line)):
            summary = run_batch(
                archive,
                output,
                model=Model(**asdict(options_of(ModelOptions, given))),
                run_options=run_options,
                engine=engine,
                cluster=Cluster(address, gpus_per_worker),
                workers=workers,
                group_hours=group_hours,
                group_files=group_files,
                output_format=output_format,
                subtitles=[name.strip() for name in subtitles.split(",")] if subtitles else (),
                subtitle_options=options_of(SubtitleOptions, given),
                resume=resume,
                retry_errors=retry_errors,
                limit=limit,
                decode_timeout=decode_timeout,
                console=console,
            )
    except KeyboardInterrupt as error:
        print_line(console, "interrupted: the same command goes on")
        raise typer.Exit(EXIT_INTERRUPTED) from error
    _show(summary, console)
    if not summary.all_well:
        raise typer.Exit(EXIT_FAILED)


def _show(summary: Summary, console: Console) -> None:
    console.print(summary.table())
    if summary.failed:
        print_line(console, "the same command with --retry-errors retries what failed")
