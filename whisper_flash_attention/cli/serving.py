"""The command `benchmark serve`: a server and its clients, from options to rows.

Exit codes: 0 every request succeeded; 1 some failed; 2 the options are invalid.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention import validation as check
from whisper_flash_attention.benchmark.processes import ended_by_sigterm
from whisper_flash_attention.benchmark.results import check_output, write_whole
from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    Commit,
    RandomWeights,
    file,
    named,
    number,
    options_of,
    takes,
)
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.terminal import error_console, print_line


@takes("serving", ModelOptions)
@ended_by_sigterm()
def serve_benchmark_command(
    *,
    random_weights: RandomWeights = None,
    clients: Annotated[
        list[int] | None,
        number(
            help="Connections that send as fast as they are answered. Repeatable, a row each. "
            "Left out: 1 and 8, if nothing else is measured."
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        number(
            help="Requests per second, whose times count from when they were due. Repeatable, a "
            "row each."
        ),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="One request at a time, beside the same call in Python.")
    ] = False,
    batch: Annotated[
        int | None,
        number(
            help="Clips of 30 s over N connections, beside the same windows in memory, N at a time."
        ),
    ] = None,
    streams: Annotated[
        list[int] | None, number(help="Live streams that speak at once. Repeatable, a row each.")
    ] = None,
    utterances: Annotated[int, number(help="Of 5 s, of each live stream.")] = 3,
    requests: Annotated[int, number(help="Requests of a row, at most.")] = 64,
    seconds: Annotated[float, number(help="After which a row sends no more requests.")] = 120.0,
    clip_seconds: Annotated[float, number(help="Length of a recording.")] = 5.0,
    container: Annotated[str, named(help="Of the recordings: flac or wav.")] = "flac",
    new_tokens: Annotated[
        int | None,
        number(
            help="Tokens of a window, or one less. Left out: the model decides; random weights "
            "give 25."
        ),
    ] = None,
    slots: Annotated[int | None, number(help="Of the server. Left out: what it chooses.")] = None,
    output: Annotated[
        Path | None, file("--output", "-o", help="JSON of the rows and the machine.")
    ] = None,
    commit: Commit = None,
    **given: Any,
) -> None:
    """Measure a server: requests per second, how long they take, and live streams.

    The server and its clients are processes of their own, on the loopback. Percentiles and
    requests per second are of the time in which all clients are busy. With random weights every
    window has the same text.

    \b
    Examples:
      whisper-flash benchmark serve --model tiny.en
      whisper-flash benchmark serve --model tiny.en --alone --streams 2
      whisper-flash benchmark serve --random-weights large-v3-turbo --clients 256 --requests 4096
      whisper-flash benchmark serve --random-weights large-v3-turbo --rate 50 --requests 1000
      whisper-flash benchmark serve --random-weights large-v3-turbo --batch 128 --requests 1280
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.serve import (
        BenchmarkedServer,
        Load,
        ServerBenchmark,
        rounded,
        running,
    )
    from whisper_flash_attention.benchmark.settings import MODEL_SIZES
    from whisper_flash_attention.devices import device_and_dtype, resolve_device

    if output is not None:
        check_output(output)
    model = options_of(ModelOptions, given)
    check.optional(check.one_of, "random_weights", random_weights, MODEL_SIZES)
    if random_weights is None:
        source, device, dtype = model.source, model.device, model.compute_type
    else:
        target, dtype = device_and_dtype(model)
        source, device = random_weights, str(target)
    if not (clients or rate or alone or batch or streams):
        clients = [1, 8]
    load = Load(1, requests, seconds, clip_seconds, container, new_tokens=new_tokens)
    loads = [replace(load, clients=count) for count in clients or ()]
    # As many connections as requests that are under way if each takes two seconds.
    paced = [replace(load, clients=max(1, round(2 * each)), rate=each) for each in rate or ()]
    most = max([1, batch or 1, *(each.clients for each in (*loads, *paced)), *(streams or ())])
    served = BenchmarkedServer(
        *(source, device, dtype, random_weights is not None),
        slots=slots,
        max_requests=2 * most,
    )
    console = error_console()
    environment = describe_environment(str(resolve_device(model.device)), commit).as_json()
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(rounded(row))
        print_line(console, describe_served(rows[-1]))
        if output is not None:
            found = {"environment": environment, "server": asdict(served), "rows": rows}
            write_whole(output, json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder, running(served) as url:
        measured = ServerBenchmark(served, url, Path(folder))
        for each in (*loads, *paced):
            keep(measured.measure_load(each))
        if alone:
            keep(measured.measure_alone(load))
        if batch:
            keep(measured.measure_batch(replace(load, clients=batch)))
        for count in streams or ():
            keep(measured.measure_streams(count, utterances))
    Console().print(served_table(rows))
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row["failures"] for row in rows):
        raise typer.Exit(EXIT_FAILED)


def describe_served(row: dict[str, Any]) -> str:
    """A row on one line."""
    kinds = {"load": "clients", "rate": "rate", "batch": "clients", "streams": "streams"}
    about = kinds.get(row["measure"])
    head = row["measure"] if about is None else f"{row['measure']} {row[about]:g}"
    figures = {
        "requests/s": row.get("requests_per_second"),
        "p50 ms": _ms(row.get("p50")),
        "p95 ms": _ms(row.get("p95")),
        "over Python ms": _ms(row.get("over_python")),
        "of memory": row.get("share_of_memory"),
        "first text p50 ms": _ms(row.get("first_text_p50")),
        "p95 ms ": _ms(row.get("first_text_p95")),
        "final text p50 ms": _ms(row.get("final_text_p50")),
        "p95 ms  ": _ms(row.get("final_text_p95")),
        "failed": row["failures"] or None,
    }
    shown = [f"{name.strip()} {value:.4g}" for name, value in figures.items() if value is not None]
    return f"{head}: {', '.join(shown)}" + (f" ({row['reason']})" if row["reason"] else "")


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def served_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of a server as a table."""
    table = Table("measure", "clients")
    for head in ("requests/s", "audio/s", "p50 ms", "p95 ms", "p99 ms", "failed"):
        table.add_column(head, justify="right")
    for row in rows:
        if row["measure"] == "streams":
            firsts = [f"{1000 * row[f'first_text_{name}']:.0f}" for name in ("p50", "p95")]
            lasts = [f"{1000 * row[f'final_text_{name}']:.0f}" for name in ("p50", "p95")]
            for name, (middle, late) in (("first text", firsts), ("final text", lasts)):
                figures = ("", "", middle, late, "", str(row["failures"]))
                table.add_row(name, str(row["streams"]), *figures)
            continue
        times = (f"{1000 * row[name]:.0f}" for name in ("p50", "p95", "p99"))
        rates = f"{row['requests_per_second']:.1f}", f"{row['audio_per_second']:.1f}"
        table.add_row(row["measure"], str(row["clients"]), *rates, *times, str(row["failures"]))
    return table
