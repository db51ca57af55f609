"""The command `benchmark throughput`: how much faster than real time recordings become text.

Exit codes: 0 every row is ok; 1 some are not; 2 the options are invalid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from whisper_flash_attention import validation as check
from whisper_flash_attention.benchmark.processes import ended_by_sigterm
from whisper_flash_attention.benchmark.results import Keeper
from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    Commit,
    RowsOutput,
    file,
    named,
    number,
    options_of,
    takes,
)
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import MOST_THREADS, ModelOptions
from whisper_flash_attention.terminal import error_console, print_line, table_console

if TYPE_CHECKING:
    from whisper_flash_attention.benchmark.throughput import ThroughputRow

FILES_PANEL = "From files"


@takes("throughput", ModelOptions)
@ended_by_sigterm()
def throughput_command(
    *,
    checkpoint: Annotated[
        list[str] | None,
        named(
            help="tiny, base, small, medium, large-v3 or large-v3-turbo. Repeatable. Left out: "
            "tiny."
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, number(help="Windows at a time. Repeatable. Left out: 16; 2 on a CPU.")
    ] = None,
    new_tokens: Annotated[int, number(help="Tokens of every window of 30 s.")] = 100,
    minutes: Annotated[
        float | None, number(help="Sound to transcribe. Left out: four batches of it.")
    ] = None,
    audio: Annotated[
        list[Path] | None,
        file(help="Recordings to take, over and over. Repeatable. Left out: this package's own."),
    ] = None,
    word_timestamps: Annotated[
        bool, typer.Option("--word-timestamps", help="Measure each row with words' times, too.")
    ] = False,
    system: Annotated[
        list[str] | None,
        named(
            help="flash (this package, from samples to text) or sdpa (stock Transformers, from "
            "features to text). Repeatable. Left out: flash."
        ),
    ] = None,
    repeats: Annotated[int, number(help="Timed runs.")] = 3,
    source: Annotated[
        str,
        named(
            "--from",
            help="memory (windows of 30 s), or files (from files on disk to written text).",
        ),
    ] = "memory",
    entry: Annotated[
        list[str] | None,
        named(
            help="From files: memory (the same recordings as arrays), transcribe, transcribe_each, "
            "command, batch-local or batch-ray. Repeatable. Left out: all but batch-ray.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        named(
            help="batched or sequential. Repeatable. Left out: batched.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    container: Annotated[
        list[str] | None,
        named(
            help="wav, flac (16 kHz mono), mp3 or m4a (44.1 kHz stereo). Repeatable. Left out: "
            "all of them.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    recordings: Annotated[
        int | None, number(help="Files. Left out: 8.", rich_help_panel=FILES_PANEL)
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="Of every file, or a range (1-15). Left out: 60.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        number(
            help="Measure decoding alone in N processes, too. Repeatable.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    workers: Annotated[
        int | None, number(help="GPUs of batch-ray. Left out: 1.", rich_help_panel=FILES_PANEL)
    ] = None,
    vad: Annotated[
        bool,
        typer.Option(
            "--vad",
            help="Find speech by the detector, as batched mode does by default.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = False,
    output: RowsOutput = None,
    commit: Commit = None,
    **given: Any,
) -> None:
    """Measure how much faster than real time recordings become text.

    From samples in memory to text, or from files to written text, by random weights that give the
    same number of tokens for every window of 30 s. Besides the factor, the time of each part of a
    batch, run alone: copies, log-mel, encoder, decoder, text and segments, words.

    \b
    Examples:
      whisper-flash benchmark throughput --checkpoint large-v3-turbo --batch-size 128
      whisper-flash benchmark throughput --checkpoint tiny --batch-size 1 --word-timestamps
      whisper-flash benchmark throughput --system sdpa --system flash --output rows.json

      whisper-flash benchmark throughput --from files --container flac --recordings 96 --length 300
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.throughput import (
        LEAST_WINDOWS,
        ThroughputCase,
        measure_throughput,
        speech,
        windows_of,
    )
    from whisper_flash_attention.devices import device_and_dtype

    check.one_of("source", source, ("memory", "files"))
    for each in threads or ():
        check.whole_number("threads", each, least=1, most=MOST_THREADS)
    of_files: dict[str, object] = {
        "entry": entry,
        "mode": mode,
        "container": container,
        "threads": threads,
    }
    of_files |= {"recordings": recordings, "length": length, "workers": workers, "vad": vad}
    for name, value in of_files.items():
        if value and source != "files":
            raise OptionError(f"--{name} is about files: add --from files")
    target, precision = device_and_dtype(options_of(ModelOptions, given))
    sizes = batch_size or ([2] if target.type == "cpu" else [16])
    kinds = [(name, False) for name in system or ["flash"]]
    if word_timestamps:
        kinds += [(name, True) for name, _ in kinds if name == "flash"]
    cases = [
        ThroughputCase(name, kind, size, new_tokens, words, repeats, str(target), precision)
        for name in checkpoint or ["tiny"]
        for size in sizes
        for kind, words in kinds
    ]
    windows = [windows_of(case, minutes) for case in cases]
    console = error_console()
    environment = describe_environment(str(target), commit).as_json()
    keeper = Keeper(output)
    if source == "files":
        from whisper_flash_attention.benchmark.from_files import (
            CONTAINERS,
            ENTRIES,
            FilesCase,
            lengths_of,
            measure_files,
        )

        count = 8 if recordings is None else check.whole_number("recordings", recordings, least=1)
        gpus = 1 if workers is None else workers
        lengths = lengths_of("60" if length is None else length, count)
        for work in cases:
            chosen = [
                FilesCase(work, each, name, kind, gpus if each == "batch-ray" else 1, vad)
                for kind in container or CONTAINERS
                for name in mode or ["batched"]
                for each in entry or [each for each in ENTRIES if each != "batch-ray"]
            ]
            sound, _ = speech(audio or [], LEAST_WINDOWS)
            for found in measure_files(chosen, lengths, sound, threads or (), environment):
                keeper.keep(found)
                print_line(console, describe_files(found))
        if output is not None:
            print_line(console, f"wrote {output}")
        return
    rows = []
    for case, count in zip(cases, windows, strict=True):
        samples, description = speech(audio or [], count)
        row = measure_throughput(case, samples, description, environment)
        rows.append(row)
        keeper.keep(row.as_json())
        print_line(console, summarize(row))
    table_console().print(as_table(rows))
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(EXIT_FAILED)


def describe_files(row: dict[str, Any]) -> str:
    """A row of files, or of decoding alone, in a line."""
    factor = f"{row['realtime_factor']:.0f} x real time"
    if row["setting"] == "decode":
        return f"decoding {row['container']}, {row['threads']} at a time: {factor}"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in row["shares"].items())
    what = f"{row['checkpoint']}, {row['container']}, {row['mode']}, {row['entry']}"
    return f"{what}: {factor} ({shares})"


def summarize(row: ThroughputRow) -> str:
    """A row in one line, and what its parts take."""
    case = row.case
    words = ", words" if case.word_timestamps else ""
    head = f"{case.checkpoint}, {case.system}, batch {case.batch_size}{words}"
    if row.realtime_factor is None:
        return f"{head}: {row.status}: {row.error}"
    parts = "; ".join(f"{name} {1e3 * took:.2f} ms" for name, took in row.parts.items())
    return f"{head}: {row.realtime_factor:.0f} x real time" + (f" ({parts})" if parts else "")


def as_table(rows: list[ThroughputRow]) -> Table:
    """Cases and their factors."""
    device_name = rows[0].environment["device_name"]
    table = Table(
        *("checkpoint", "system", "dtype", "batch", "words", "x real time", "audio, min"),
        *("seconds", "GPU memory, GB"),
        title=f"{rows[0].case.new_tokens} tokens per 30 s, {device_name}",
    )
    for row in rows:
        case, factor, memory = row.case, row.realtime_factor, row.vram_allocated_gb
        table.add_row(
            *(case.checkpoint, case.system, case.dtype, str(case.batch_size)),
            "yes" if case.word_timestamps else "",
            row.error or f"{factor:.0f}",
            f"{row.audio_seconds / 60:.0f}",
            ", ".join(f"{each:.3f}" for each in row.seconds),
            "" if memory is None else f"{memory:.2f}",
        )
    return table
