"""The command `benchmark peers`: this package beside others, from recordings on disk to text.

Exit codes: 0 every system that is there was measured; 1 some failed; 2 the options are invalid.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention import validation as check
from whisper_flash_attention.cli.benchmark import Keeper
from whisper_flash_attention.cli.parameters import EXIT_FAILED, options_of, takes
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.terminal import print_line

# Chunks at a time that faster-whisper documents, on a CPU and on a GPU.
CPU_BATCH, GPU_BATCH = 8, 16


@takes("peers", ModelOptions)
def peers_command(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILES",
            help="Recordings or folders. A folder's index.json lists file, language and "
            "transcript; else a transcript is in a .txt file beside the recording. Left out: the "
            "recordings of this package.",
            show_default=False,
        ),
    ] = None,
    *,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Random weights instead of a checkpoint: tiny, base, small, medium, large-v3 or "
            "large-v3-turbo; with --new-tokens.",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of every window. Left out: the model decides."),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="ours-sequential, ours-batched, stock-long-form, stock-chunked, openai-whisper, "
            "faster-whisper-sequential, faster-whisper-batched, whisper.cpp, whisperx or vllm. "
            "Repeatable. Left out: all.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Chunks at a time, of systems that take several. Left out: 8 on a CPU, 16 on a "
            "GPU.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Timed passes over all files.")] = 3,
    join: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Add one recording: those with transcripts, one after the other, repeated as "
            "needed, of at most this length. Without FILES it is the only one.",
        ),
    ] = None,
    language: Annotated[
        str, typer.Option(metavar="CODE", help="Of recordings without an index.json.")
    ] = "en",
    peers: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the other packages are, if not beside this one (pip install --target "
            "FOLDER --no-deps ...). What both have is taken from beside this one, so that all "
            "share one PyTorch.",
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the checkpoint's files stay for the next run. Left out: a temporary "
            "folder.",
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
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"),
            metavar="FILE",
            help="JSON file for the rows; rows that it has of other cases stay.",
        ),
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Commit to record instead of git's."),
    ] = None,
    **given: Any,
) -> None:
    """Measure this package beside others, from recordings on disk to text.

    Every system is a process of its own, which loads the same checkpoint in the format that it
    reads. The clock runs from a path to the whole text, after a call that warms up. All decode
    greedily, with their own defaults otherwise. A system that is not there, or cannot do the work,
    gets a row that says so.

    \b
    Examples:
      whisper-flash benchmark peers recordings/ --model package:base --output rows.json
      whisper-flash benchmark peers --join 600 --model package:tiny.en --dtype int8
      whisper-flash benchmark peers --random-weights large-v3 --new-tokens 100 --join 3840 \\
        --batch-size 128
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.peer_systems import SYSTEMS
    from whisper_flash_attention.benchmark.peers import PeersCase, measure_peers
    from whisper_flash_attention.benchmark.settings import MODEL_SIZES
    from whisper_flash_attention.benchmark.spoken import bundled_spoken, find_spoken, join_spoken
    from whisper_flash_attention.devices import resolve_device, resolve_dtype

    model = options_of(ModelOptions, given)
    target = resolve_device(model.device)
    on_cpu = target.type == "cpu"
    dtype = model.compute_type
    if dtype != "int8":
        dtype = str(resolve_dtype(dtype, target)).removeprefix("torch.")
    check.optional(check.one_of, "random_weights", random_weights, MODEL_SIZES)
    case = PeersCase(
        random_weights or model.source,
        tuple(system or SYSTEMS),
        str(target),
        dtype,
        batch_size or (CPU_BATCH if on_cpu else GPU_BATCH),
        model.threads or os.cpu_count() or 1,
        rounds,
        on_cpu if turns is None else turns,
        random_weights is not None,
        new_tokens,
        peers,
    )
    keeper = Keeper(output)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    environment = describe_environment(str(target), commit).as_json()
    environment["threads"] = case.threads
    rows: dict[str, dict[str, Any]] = {}

    def keep(row: dict[str, Any]) -> None:
        rows[row["system"]] = row
        keeper.keep(row | {"environment": environment})
        print_line(console, in_a_line(row))

    with tempfile.TemporaryDirectory(prefix="whisper-flash-") as name:
        folder = Path(name)
        spoken = find_spoken(files, language) if files else bundled_spoken()
        if join is not None:
            joined = join_spoken(spoken, join, folder)
            spoken = [*spoken, joined] if files else [joined]
        measure_peers(case, spoken, checkpoints or folder, keep)
    found = [rows[each] for each in case.systems]
    terminal = Console()
    out = terminal if terminal.is_terminal else Console(width=200)
    if any(row["status"] == "ok" for row in found):
        out.print(as_table(found))
    for row in found:
        what = f"{row['system']} {row['version'] or ''}".rstrip()
        values = ", ".join(f"{name} {value}" for name, value in row.get("settings", {}).items())
        print_line(out, f"{what}: {values or row['status'] + ': ' + row['reason']}")
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row["status"] == "failed" for row in found):
        raise typer.Exit(EXIT_FAILED)


def in_a_line(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    if row["status"] != "ok":
        return f"{row['system']}: {row['status']}: {row['reason']}"
    return (
        f"{row['system']}: {row['realtime_factor']:.1f} x real time, {len(row['seconds'])} rounds"
    )


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Systems that were measured, their speeds and errors; a dash where there is none."""
    from whisper_flash_attention.benchmark.peers import speed_of_ours

    first = rows[0]
    table = Table(
        *("system", "version", "batch", "x real time", "ours is", "first text, s"),
        *("memory, GB", "GPU memory, GB", "WER", "invented words"),
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
        )
        cells = ("-" if value is None else format(value, kind) for value, kind in shown)
        table.add_row(row["system"], row["version"], str(row["batch_size"]), *cells)
    return table
