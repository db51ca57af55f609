"""Shared parts of the scripts: options, timing, tables, and JSON documents with an environment.

GPU kernels are timed by replays of a CUDA graph of many launches, over sets of inputs that together
exceed the L2 cache (`cold_sets`), so that no launch finds its inputs in the cache. Systems that are
compared take turns (`time_in_turns`), so that other load of the machine affects all of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.measure import synchronize
from whisper_flash_attention.engine.cuda_graphs import GraphRecorder

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Relative (Frobenius) error of a kernel's output above which it is not timed.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Columns of a table where there is no terminal.
WIDTH = 150

CPU = torch.device("cpu")
console = Console(width=None if Console().is_terminal else WIDTH)

Commit = Annotated[str | None, typer.Option(help="Commit to record instead of git's.")]
Output = Annotated[Path | None, typer.Option(help="JSON file to write.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of PyTorch on the CPU.")]
HalfDtype = Annotated[str, typer.Option(help="float16 or bfloat16.")]


def app_of(doc: str | None, *commands: Callable[..., None]) -> typer.Typer:
    """A script's app: a command per function, or `main` alone, and the docstring's first line."""
    help_text = (doc or "").partition("\n")[0]
    is_single = commands[0].__name__ == "main"
    app = typer.Typer(add_completion=False, help=help_text, no_args_is_help=not is_single)
    if not is_single:
        app.callback()(lambda: None)  # without which a single command has no name
    for command in commands:
        app.command()(command)
    return app


def require_cuda() -> None:
    """Raise `typer.BadParameter` where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA GPU")


def half_dtype(name: str) -> torch.dtype:
    """The dtype of this name; raises `typer.BadParameter` if it is not one of `HALF_DTYPES`."""
    if name not in HALF_DTYPES:
        raise typer.BadParameter(f"dtype {name!r}; possible: {', '.join(HALF_DTYPES)}")
    return HALF_DTYPES[name]


def one_of(option: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Raise `typer.BadParameter` for the first value that is not known."""
    if unknown := [value for value in values if value not in known]:
        raise typer.BadParameter(f"{option} {unknown[0]!r}; possible: {', '.join(known)}")


def write_json(
    output: Path | None,
    device: str,
    commit: str | None,
    document: Mapping[str, Any],
    *,
    indent: int | None = 1,
) -> None:
    """Write a document with the environment of `device` to `output`, if there is one."""
    if output is None:
        return
    environment = describe_environment(device, commit).as_json()
    text = json.dumps({"environment": environment, **document}, indent=indent, ensure_ascii=False)
    output.write_text(text + "\n", encoding="utf-8")


# A format of the row's fields ("{seconds:.2f}"), or a function of the row.
Column = str | Callable[[Mapping[str, Any]], object]


def cell(row: Mapping[str, Any], column: Column) -> object:
    """The text of a cell; None where a field that it shows is missing or None."""
    try:
        return column.format(**row) if isinstance(column, str) else column(row)
    except (KeyError, TypeError):  # TypeError: None with a format, or in arithmetic
        return None


def print_rows(
    title: str | None, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Column]
) -> None:
    """Print a line per row, with a dash for None."""
    table = Table(*columns, title=title)
    for row in rows:
        found = (cell(row, column) for column in columns.values())
        table.add_row(*("-" if each is None else str(each) for each in found))
    console.print(table)


def cold_sets(bytes_per_set: float, cold_bytes: float, least: int = 1) -> int:
    """Sets of inputs that together have at least `cold_bytes`."""
    return max(least, math.ceil(cold_bytes / bytes_per_set))


def cuda_milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds by CUDA events of `repeats` runs, after an untimed one."""
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times[1:])


def graph_microseconds(launch: Callable[[int], object], calls: int, replays: int = 8) -> float:
    """Median microseconds of a call, by replays of one CUDA graph of `launch(0)`, `launch(1)` …

    `launch(i)` must not allocate anything that outlives it.
    """

    def launch_all() -> None:
        for index in range(calls):
            launch(index)

    graph = GraphRecorder().record(launch_all)
    return cuda_milliseconds(graph.replay, replays) * 1e3 / calls


def seconds_of(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Wall-clock seconds of one call, from an idle device until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    devices: Mapping[str, torch.device] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every work in every round; they take turns. `devices` not given are the CPU."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work, (devices or {}).get(name, CPU)))
    return times


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| over all elements, in the dtype of `expected`."""
    apart = torch.linalg.vector_norm(found.to(expected.dtype) - expected, dtype=torch.float64)
    return float(apart / torch.linalg.vector_norm(expected, dtype=torch.float64))


def failure_of(error: Exception, line: int = 0) -> str:
    """An exception in one line: its type and line `line` of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[line][:160]}"


def measure_kernel(
    row: dict[str, Any],
    error: Callable[[], float],
    microseconds: Callable[[], float],
    tolerance: float,
) -> None:
    """Set the row's "error", and "microseconds" if that is within the tolerance, or "failure"."""
    try:
        row["error"] = error()
        if row["error"] < tolerance:
            row["microseconds"] = microseconds()
        else:
            row["failure"] = f"relative error {row['error']:.1e}"
    except Exception as raised:  # a configuration that cannot be compiled or run is a result, too
        row["failure"] = f"failed: {failure_of(raised, -1)}"
