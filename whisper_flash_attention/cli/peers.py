"""The command `benchmark peers`: this package beside others, from recordings on disk to text.

Exit codes: 0 every system that is there was measured; 1 some failed; 2 the options are invalid.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from whisper_flash_attention import validation as check
from whisper_flash_attention.benchmark.processes import ended_by_sigterm
from whisper_flash_attention.benchmark.results import Keeper
from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    Commit,
    RandomWeights,
    RowsOutput,
    folder,
    named,
    number,
    options_of,
    takes,
)
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.languages import language_code
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.terminal import error_console, print_line, table_console

# Chunks at a time that faster-whisper documents, on a CPU and on a GPU.
CPU_BATCH, GPU_BATCH = 8, 16


@takes("peers", ModelOptions)
@ended_by_sigterm()
def peers_command(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILES",
            help="Recordings or folders. A folder's index.json lists file, language, transcript "
            "and words (with word, start and end in seconds); else a transcript is in a .txt file "
            "beside the recording, and words in a .wrd file (start, end, word) or Gentle's .json. "
            "Left out: the recordings of this package.",
            show_default=False,
        ),
    ] = None,
    *,
    random_weights: RandomWeights = None,
    new_tokens: Annotated[
        int | None,
        number(help="Tokens of every window, with random weights, which do not end by themselves."),
    ] = None,
    system: Annotated[
        list[str] | None,
        named(
            help="ours-sequential, ours-batched, stock-long-form, stock-chunked, openai-whisper, "
            "faster-whisper-sequential, faster-whisper-batched, whisper.cpp, whisperx or vllm. "
            "Repeatable. Left out: all."
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        number(
            help="Chunks at a time, of systems that take several. Repeatable: every system is "
            "loaded once for all, and memory is not reported after a larger one. Left out: 8 on a "
            "CPU, 16 on a GPU."
        ),
    ] = None,
    rounds: Annotated[int, number(help="Timed passes over all files.")] = 3,
    join: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SECONDS",
            help="Add one recording: those with transcripts, one after the other, repeated as "
            "needed, of at most this length. Without FILES it is the only one. Repeatable: one for "
            "each batch size, in their order.",
        ),
    ] = None,
    language: Annotated[
        str, typer.Option(metavar="CODE", help="Of recordings without an index.json.")
    ] = "en",
    word_alignment: Annotated[
        str,
        named(help="What words of this package are timed by: tokens or characters."),
    ] = "tokens",
    peers: Annotated[
        Path | None,
        folder(
            help="Where the other packages are, if not beside this one (pip install --target "
            "FOLDER --no-deps ...). What both have is taken from beside this one, so that all "
            "share one PyTorch."
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        folder(
            help="Where the checkpoint's files stay for the next run. Left out: a temporary folder."
        ),
    ] = None,
    turns: Annotated[
        bool | None,
        typer.Option(
            "--turns/--no-turns",
            help="Load all systems and let them take turns, or measure one after the other. Left "
            "out: turns on a CPU.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="End a system that takes longer to load or to transcribe a recording; its row "
            "says so.",
        ),
    ] = 1800.0,
    output: RowsOutput = None,
    commit: Commit = None,
    **given: Any,
) -> None:
    """Measure this package beside others, from recordings on disk to text.

    Every system is a process of its own, which loads the same checkpoint in the format that it
    reads. The clock runs from a path to the whole text, after a call that warms up. All decode
    greedily, with their own defaults otherwise. Where recordings have words with their times, each
    system transcribes them once more with word timestamps, off the clock: the mean error of starts
    and ends is over the words that it found. A system that is not there, or cannot do the work,
    gets a row that says so.

    \b
    Examples:
      whisper-flash benchmark peers recordings/ --model package:base --output rows.json
      whisper-flash benchmark peers --join 600 --model package:tiny.en --dtype int8
      whisper-flash benchmark peers --random-weights large-v3 --new-tokens 100 \\
        --batch-size 32 --join 1900 --batch-size 128 --join 7100
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.peer_systems import SYSTEMS
    from whisper_flash_attention.benchmark.peers import PeersCase, measure_peers
    from whisper_flash_attention.benchmark.settings import MODEL_SIZES
    from whisper_flash_attention.benchmark.spoken import (
        SILENCE,
        bundled_spoken,
        check_length,
        find_spoken,
        join_spoken,
    )
    from whisper_flash_attention.devices import device_and_dtype, resolve_device

    model = options_of(ModelOptions, given)
    if model.compute_type == "int8":
        target, dtype = resolve_device(model.device), "int8"
    else:
        target, dtype = device_and_dtype(model)
    on_cpu = target.type == "cpu"
    check.optional(check.one_of, "random_weights", random_weights, MODEL_SIZES)
    case = PeersCase(
        random_weights or model.source,
        tuple(system or SYSTEMS),
        str(target),
        dtype,
        tuple(batch_size or [CPU_BATCH if on_cpu else GPU_BATCH]),
        (os.cpu_count() or 1) if model.threads is None else model.threads,
        rounds,
        on_cpu if turns is None else turns,
        timeout,
        random_weights is not None,
        new_tokens,
        peers,
        word_alignment,
    )
    if language != SILENCE:
        language = language_code(language)
    lengths = [check_length(each) for each in join or []]
    if checkpoints is not None and checkpoints.exists() and not checkpoints.is_dir():
        raise OptionError(f"checkpoints is {check.shown(str(checkpoints))}: give a folder")
    if len(lengths) not in (0, 1, len(case.batch_sizes)):
        raise OptionError(f"join: give one length, or {len(case.batch_sizes)}, one per batch size")
    keeper = Keeper(output)
    console = error_console()
    environment = describe_environment(str(target), commit).as_json()
    environment["threads"] = case.threads
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    begin = time.monotonic()

    def report(line: str) -> None:
        print_line(console, f"{time.monotonic() - begin:.1f} s: {line}")

    def keep(row: dict[str, Any]) -> None:
        rows[row["system"], row["batch_size"]] = row
        keeper.keep(row | {"environment": environment})
        report(in_a_line(row))

    with tempfile.TemporaryDirectory(prefix="whisper-flash-") as name:
        temporary = Path(name)
        spoken = find_spoken(files, language) if files else bundled_spoken()
        recordings = {}
        for place, size in enumerate(case.batch_sizes):
            recordings[size] = spoken
            if lengths:
                seconds = lengths[min(place, len(lengths) - 1)]
                joined = join_spoken(spoken, seconds, temporary)
                recordings[size] = [*spoken, joined] if files else [joined]
        measure_peers(case, recordings, checkpoints or temporary, keep, report)
    found = sorted(rows.values(), key=lambda row: case.systems.index(row["system"]))
    out = table_console()
    if any(row["status"] == "ok" for row in found):
        out.print(as_table(found))
    for row in {row["system"]: row for row in found}.values():
        what = f"{row['system']} {row['version'] or ''}".rstrip()
        values = ", ".join(f"{name} {value}" for name, value in row.get("settings", {}).items())
        print_line(out, f"{what}: {values or row['status'] + ': ' + row['reason']}")
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row["status"] == "failed" or "word_times_failed" in row for row in found):
        raise typer.Exit(EXIT_FAILED)


def in_a_line(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    if row["status"] != "ok":
        return f"{row['system']}: {row['status']}: {row['reason']}"
    line = (
        f"{row['system']}, batch size {row['batch_size']}: {row['realtime_factor']:.1f} x real "
        f"time, {len(row['seconds'])} rounds"
    )
    if "word_times_failed" in row:
        return f"{line}; word timestamps failed: {row['word_times_failed']}"
    if row["word_time_error_ms"] is not None:
        line += f", word times {row['word_time_error_ms']:.0f} ms off"
    return line


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Systems that were measured, their speeds and errors; a dash where something is not known."""
    from whisper_flash_attention.benchmark.peers import speed_of_ours

    first = rows[0]
    table = Table(
        *("system", "version", "batch", "x real time", "ours is", "first text, s"),
        *("memory, GB", "GPU memory, GB", "WER", "invented words", "word times, ms"),
        title=f"{first['checkpoint']}, {first['dtype']}, {first['device']}",
    )
    for row in rows:
        if row["status"] != "ok":
            continue
        ratio = speed_of_ours(rows, row)
        shown = (
            (row["realtime_factor"], ".1f"),
            (ratio, ".2f"),
            (row["first_text_seconds"], ".2f"),
            (row["peak_memory_gb"], ".2f"),
            (row["peak_vram_gb"], ".2f"),
            (row["wer"], ".1%"),
            (row["invented_words"], "d"),
            (row["word_time_error_ms"], ".0f"),
        )
        cells = ("-" if value is None else format(value, kind) for value, kind in shown)
        table.add_row(row["system"], row["version"], str(row["batch_size"]), *cells)
    return table
