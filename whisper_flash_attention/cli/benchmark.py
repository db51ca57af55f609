"""The command `benchmark`: from options to rows.

Exit codes: 0 every row is ok; 1 some are not; 2 the options are invalid or nothing could be
measured; 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whisper_flash_attention.benchmark import settings as plan
from whisper_flash_attention.benchmark.processes import ended_by_sigterm
from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Commit,
    folder,
    named,
    number,
    options_of,
    takes,
)
from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.terminal import print_line, table_console

if TYPE_CHECKING:
    from whisper_flash_attention.benchmark.runner import Options, Outcome


@takes("benchmark", ModelOptions)
@ended_by_sigterm()
def benchmark_command(
    *,
    setting: Annotated[
        list[str] | None,
        named(
            help="default (batch 1, 25 tokens, 100 batches), large (32, 256, 10) or small "
            "(1, 8, 5). Repeatable. Left out: default and large; on a CPU, small."
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        named(
            help="tiny, base, small, medium, large-v3 or large-v3-turbo. Repeatable. Left out: "
            "the first four."
        ),
    ] = None,
    decoder_layers: Annotated[
        list[int] | None, number(help="Only rows with N decoder layers. Repeatable. Left out: all.")
    ] = None,
    system: Annotated[
        list[str] | None,
        named(
            help="orig, sdpa, static, flash, or flash:<back-end>. Repeatable. Left out: orig, "
            "sdpa and flash."
        ),
    ] = None,
    batches: Annotated[int | None, number(help="Timed calls, instead of the setting's.")] = None,
    new_tokens: Annotated[
        int | None, number(help="Tokens per clip, instead of the setting's.")
    ] = None,
    batch_size: Annotated[
        int | None, number(help="Clips per call, instead of the setting's.")
    ] = None,
    features: Annotated[
        str, named(help="Speech: bundled (with this package) or librispeech (from the Hub).")
    ] = "bundled",
    output: Annotated[
        Path, folder("--output", "-o", help="Folder for results; made if missing.")
    ] = Path("benchmark-results"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Keep rows that an earlier run finished in this folder."
        ),
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Seconds after which a row is given up as failed."),
    ] = 1800.0,
    commit: Commit = None,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report", help="Measure nothing: tables and plots from the output folder's rows."
        ),
    ] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show systems and rows, and what can run here; stop.")
    ] = False,
    **given: Any,
) -> None:
    """Measure this package against stock Whisper, row by row.

    A row is one system on one model at one setting, in a process of its own.
    Weights are random, the speech is real, and every system decodes the same
    number of tokens from the same features. A row that fails records the reason,
    and the run goes on. After an interruption, the same command resumes it.

    Written to the output folder: results.jsonl (as it goes), results.json,
    results.csv, results.md, plots, tokens.jsonl, and failures.log if a row failed.

    \b
    Examples:
      whisper-flash benchmark   # both tables of a GPU, or the small one of a CPU
      whisper-flash benchmark --setting default --checkpoint tiny --checkpoint base
      whisper-flash benchmark --system orig --system flash:sdpa_flash --dtype bfloat16
      whisper-flash benchmark --report --output benchmarks/results/h200
      whisper-flash benchmark --list
      whisper-flash benchmark throughput --help   # from samples in memory to text
      whisper-flash benchmark mlperf --help   # MLPerf's load generator, unofficially
      whisper-flash benchmark peers --help   # beside other systems, from files to text
    """
    model = options_of(ModelOptions, given)
    if report_only:
        show_outcome(report_again(output), Console(stderr=True))
        return
    systems = system or plan.DEFAULT_SYSTEMS
    rows = plan.select_rows(checkpoint or (), decoder_layers or ())
    sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "batches": batches}
    plan.select_settings(setting or (), **sizes)  # mistakes come out before heavy imports
    if timeout <= 0:
        raise OptionError(f"timeout is {timeout:g}: give a number of seconds above 0")

    from whisper_flash_attention.benchmark.processes import start_server
    from whisper_flash_attention.devices import device_and_dtype

    if list_only:
        show_list(model)
        return
    start_server()  # imports there while we import here
    target, precision = device_and_dtype(model)
    chosen = plan.select_settings(setting or plan.default_settings(target.type), **sizes)

    from whisper_flash_attention.benchmark.runner import Options
    from whisper_flash_attention.benchmark.systems import named as system_named

    for name in systems:
        system_named(name)
    jobs = plan.plan_jobs(chosen, rows, systems, device=str(target), dtype=precision)
    console = Console(stderr=True)
    if not setting and target.type == "cpu":
        console.print("no GPU: the small setting; --setting default --setting large for the rest")
    outcome = run_or_explain_resuming(
        jobs, Options(output, features, timeout, resume, commit), console
    )
    show_outcome(outcome, console)
    if any(row.status != "ok" for row in outcome.requested):
        raise typer.Exit(EXIT_FAILED)


def report_again(folder: Path) -> Outcome:
    """The outcome of the rows that `folder` holds, its derived files written anew.

    Raises:
        BenchmarkError: there are no rows.
    """
    from whisper_flash_attention.benchmark.report import write_outputs
    from whisper_flash_attention.benchmark.results import Store
    from whisper_flash_attention.benchmark.runner import Outcome

    rows = Store(folder).rows() if (folder / "results.jsonl").is_file() else []
    if not rows:
        raise BenchmarkError(f"{folder} holds no rows (results.jsonl): measure some first")
    return Outcome(rows, rows, write_outputs(rows, folder, Console(stderr=True)))


def run_or_explain_resuming(
    jobs: Sequence[plan.Job], options: Options, console: Console
) -> Outcome:
    """The run's outcome; on Ctrl-C, a hint and exit code 130."""
    from whisper_flash_attention.benchmark.runner import run

    try:
        return run(jobs, options, console)
    except KeyboardInterrupt as error:
        console.print("interrupted; the same command resumes where this one stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from error


def show_outcome(outcome: Outcome, console: Console) -> None:
    """The tables on standard output; where the files are on standard error."""
    from whisper_flash_attention.benchmark.report import as_renderable

    table_console().print(as_renderable(outcome.requested))
    for path in outcome.files:
        print_line(console, f"wrote {path}")


def show_list(model: ModelOptions) -> None:
    """Systems and whether they can run here, settings, and rows, on standard output."""
    import torch

    from whisper_flash_attention.benchmark.systems import SYSTEMS, backend_systems
    from whisper_flash_attention.devices import device_and_dtype

    target, precision = device_and_dtype(model)
    systems = Table("System", "What it is", f"On {target}, {precision}")
    for system in (*SYSTEMS.values(), *backend_systems().values()):
        reason = system.why_not(target, getattr(torch, precision)) or "can run"
        # As text: in markup, the brackets of a package's extra would vanish.
        systems.add_row(system.name, system.summary, Text(reason))
    settings = Table("Setting", "Batch size", "New tokens", "Batches")
    for item in plan.SETTINGS.values():
        settings.add_row(item.name, str(item.batch_size), str(item.new_tokens), str(item.batches))
    rows = Table("Checkpoint", "Decoder layers", "Left out unless named")
    for name, layers in plan.DECODER_LAYERS.items():
        named_only = "" if name in plan.DEFAULT_CHECKPOINTS else "yes"
        rows.add_row(name, ", ".join(map(str, layers)), named_only)
    out = Console()
    for table in (systems, settings, rows):
        out.print(table)
