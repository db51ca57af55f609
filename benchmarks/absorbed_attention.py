"""Time the formulations of absorbed cross-attention on Whisper's sizes, on a CUDA GPU.

    python benchmarks/absorbed_attention.py --output benchmarks/results/absorbed-h100.json

Every configuration is first compiled and compared with a float64 oracle on one clip, in processes
of its own (compilation runs in parallel, and a configuration that does not compile or does not fit
the device becomes an entry with its error). Then each is timed: replays of a CUDA graph of many
launches, over sets of states that together exceed the L2 cache several times. A configuration with
too large an error gets no time. The yardstick is the time in which this device copies as many bytes
as the states have, measured in the same run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.measure import measure_ceilings
from whisper_flash_attention.kernels.absorbed_attention import (
    MOST_SPLITS,
    AttentionConfig,
    absorbed_attention,
    choose_config,
    choose_splits,
    workspace_shapes,
)
from whisper_flash_attention.kernels.absorbed_query import absorb_query
from whisper_flash_attention.kernels.absorbed_values import project_values

KEYS = 1500
SIZES = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
COLD_BYTES = 200e6
C = AttentionConfig
CONFIGS = {
    384: (C("rows", 16, 32, 4, 3), C("wgmma", 16, 64, 4, 3), C("wgmma", 16, 64, 4, 4)),
    512: (C("rows", 16, 32, 4, 3), C("wgmma", 16, 64, 4, 3)),
    768: (C("rows", 16, 16, 4, 3), C("wgmma", 16, 64, 4, 2)),
    1024: (C("rows", 16, 16, 4, 3), C("rows", 16, 32, 4, 3)),
    1280: (
        C("rows", 32, 16, 8, 3), C("rows", 32, 32, 8, 2), C("rows", 32, 16, 16, 4),
        C("rows", 10, 16, 4, 2), C("rows", 10, 16, 4, 3), C("rows", 10, 16, 8, 2),
        C("rows", 10, 32, 4, 2), C("wgmma", 10, 64, 8, 1),
    ),
}  # fmt: skip


@dataclass
class Row:
    """One measurement, or the reason why there is none."""

    kernel: str
    d: int
    batch: int
    splits: int
    config: AttentionConfig
    chosen: bool = False
    error: float | None = None
    failure: str | None = None
    microseconds: float | None = None
    share_of_copy: float | None = None

    @property
    def name(self) -> str:
        c = self.config
        return f"{c.formulation} q{c.queries} k{c.keys} w{c.warps} s{c.stages}"


def workspace(rows: int, d: int, splits: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = workspace_shapes(rows, SIZES[d], d, splits)
    return torch.empty(shapes[0], dtype=dtype, device="cuda"), torch.empty(shapes[1], device="cuda")


def check(d: int, config: AttentionConfig, dtype: torch.dtype) -> tuple[float | None, str | None]:
    """Relative error against float64 on one clip, or why the configuration cannot run."""
    try:
        torch.manual_seed(0)
        queries = (torch.randn(1, SIZES[d], d, device="cuda") * 3 / math.sqrt(d)).to(dtype)
        states = torch.randn(1, KEYS, d, device="cuda").to(dtype)
        parts, stats = workspace(1, d, 2, dtype)
        absorbed_attention(queries, states, parts, stats, splits=2, config=config)
        highest, total = stats.double().unbind(-1)
        shares = total * torch.exp2(highest - highest.amax(0))
        found = (parts.double() * (shares / shares.sum(0))[..., None]).sum(0)
        wanted = (queries[0].double() @ states[0].double().T).softmax(-1) @ states[0].double()
        return float((found[0] - wanted).norm() / wanted.norm()), None
    except Exception as error:  # whatever a compiler may raise belongs into the table
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:160]}"


def warm(d: int, batch: int, dtype: torch.dtype) -> None:
    """Compile the kernels before and after attention as this batch uses them."""
    Case(d, batch, dtype, sets=1).launch_around(choose_splits(batch, KEYS), layers=1)


def check_all(
    jobs: list[tuple[int, AttentionConfig]], batches: list[int], dtype: torch.dtype, processes: int
) -> dict[tuple[int, AttentionConfig], tuple[float | None, str | None]]:
    """`check` of all jobs, in processes; one that dies fails only what it had not finished."""
    results = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {job: pool.submit(check, *job, dtype) for job in jobs}
        for d in dict.fromkeys(d for d, _ in jobs):
            for batch in batches:
                pool.submit(warm, d, batch, dtype)
        for job, future in futures.items():
            try:
                results[job] = future.result()
            except Exception as error:
                results[job] = None, f"{type(error).__name__}: {error}"
    return results


def microseconds(launch: Callable[[int], object], sets: int, budget_ms: float = 3.0) -> float:
    """Median time of `launch(i)`, i going round `sets`, from replays of a graph of launches."""
    launch(0)
    torch.cuda.synchronize()
    count = sets * max(1, math.ceil(24 / sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i % sets)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
        if len(times) > 3 and sum(times) * count > 1e3 * 8 * budget_ms:
            break
    return float(median(times[1:]))


class Case:
    """States (several sets), queries and workspaces of one D and batch."""

    def __init__(self, d: int, batch: int, dtype: torch.dtype, sets: int | None = None) -> None:
        self.d, self.batch, self.dtype = d, batch, dtype
        self.bytes = batch * KEYS * d * dtype.itemsize
        self.sets = sets or max(2, math.ceil(COLD_BYTES / self.bytes))
        shape = (self.sets, batch, KEYS, d)
        self.states = torch.randn(shape, device="cuda", dtype=dtype)
        self.queries = torch.randn(batch, SIZES[d], d, device="cuda", dtype=dtype) / math.sqrt(d)

    def time_attention(self, config: AttentionConfig, splits: int) -> float:
        parts, stats = workspace(self.batch, self.d, splits, self.dtype)

        def launch(i: int) -> None:
            absorbed_attention(
                self.queries, self.states[i], parts, stats, splits=splits, config=config
            )

        return microseconds(launch, self.sets)

    def launch_around(self, splits: int, layers: int) -> dict[str, Callable[[int], None]]:
        """The kernels before and after, with the weights of layer i; each has run once."""
        d = self.d
        x = torch.randn(self.batch, d, device="cuda", dtype=self.dtype)
        vector = torch.randn(d, device="cuda", dtype=self.dtype)
        weights = torch.randn(layers, 2, d, d, device="cuda", dtype=self.dtype) / math.sqrt(d)
        parts, stats = workspace(self.batch, d, splits, self.dtype)
        parts.normal_()
        stats.fill_(1.0)
        absorbed, out = torch.empty_like(self.queries), torch.empty_like(x)

        def query(i: int) -> None:
            first, second = weights[i]
            absorb_query(x, vector, vector, first, vector, second, absorbed, scale=0.125)

        def values(i: int) -> None:
            project_values(parts, stats, weights[i, 0], vector, out)

        query(0)
        values(0)
        return {"query": query, "values": values}

    def time_around(self, splits: int) -> dict[str, float]:
        layers = max(2, math.ceil(COLD_BYTES / (2 * self.d**2 * self.dtype.itemsize)))
        launches = self.launch_around(splits, layers)
        return {name: microseconds(launch, layers) for name, launch in launches.items()}


def candidates(batch: int, quick: bool) -> list[int]:
    """Splits to try: the chosen number, half and double."""
    chosen = choose_splits(batch, KEYS)
    if quick:
        return [chosen]
    return sorted({max(1, chosen // 2), chosen, min(MOST_SPLITS, chosen * 2)})


def measure(case: Case, rows: list[Row], rate: float) -> None:
    """Fill in the times of the rows that passed the check."""
    for row in rows:
        if row.failure is None:
            try:
                row.microseconds = case.time_attention(row.config, row.splits)
                row.share_of_copy = case.bytes / rate / row.microseconds
            except Exception as error:
                row.failure = f"{type(error).__name__}: {str(error)[:160]}"


def measure_around(case: Case) -> dict[str, Any]:
    """Microseconds of `absorb_query` and `project_values` as they are configured by default."""
    entry: dict[str, Any] = {"d": case.d, "batch": case.batch}
    try:
        times = case.time_around(choose_splits(case.batch, KEYS))
        return entry | {name: round(time, 2) for name, time in times.items()}
    except Exception as error:
        return entry | {"failure": f"{type(error).__name__}: {str(error)[:160]}"}


def show(rows: list[Row], console: Console) -> None:
    """Per D: configurations by batches, the best number of splits each."""
    for d in dict.fromkeys(row.d for row in rows):
        own = [row for row in rows if row.d == d]
        batches = list(dict.fromkeys(row.batch for row in own))
        title = f"D {d}: microseconds (% of copy bandwidth, splits)"
        table = Table("configuration", *map(str, batches), "error", title=title)
        for name in dict.fromkeys(row.name for row in own):
            same = [row for row in own if row.name == name]
            cells = []
            for batch in batches:
                timed = [r for r in same if r.batch == batch and r.microseconds is not None]
                best = min(timed, key=lambda r: r.microseconds or 0.0, default=None)
                cells.append(
                    f"{best.microseconds:.1f} ({100 * (best.share_of_copy or 0):.0f}%, "
                    f"{best.splits})"
                    if best
                    else "-"
                )
            first = same[0]
            note = first.failure or f"{first.error:.1e}"
            table.add_row(name + (" *" if first.chosen else ""), *cells, note[:50])
        console.print(table)
    console.print("* what choose_config picks")


def main(
    size: Annotated[list[int] | None, typer.Option(help="D, repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    quick: Annotated[bool, typer.Option(help="two sizes, two batches, chosen splits")] = False,
    chosen_only: Annotated[
        bool, typer.Option("--chosen-only", help="only the configuration that decodes use")
    ] = False,
    processes: Annotated[int, typer.Option(help="that compile and check")] = 14,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
    output: Path | None = None,
) -> None:
    """Time absorbed cross-attention."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype is {dtype}; possible are {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA GPU")
    number = DTYPES[dtype]
    sizes = size or ([1024, 1280] if quick else list(SIZES))
    batches = batch or ([32, 128] if quick else [8, 32, 64, 128])
    chosen = {d: choose_config(SIZES[d], d, number, _capability()) for d in sizes}
    tried = {d: () if chosen_only else CONFIGS[d] for d in sizes}
    configs = {d: tuple(dict.fromkeys((*tried[d], chosen[d]))) for d in sizes}
    jobs = [(d, c) for d in sizes for c in configs[d]]
    checks = check_all(jobs, batches, number, processes)

    rate = measure_ceilings("cuda", dtype).bytes_per_second / 1e6
    console = Console(width=140)
    console.print(f"{torch.cuda.get_device_name()}: copy {rate / 1e6:.2f} TB/s")
    rows: list[Row] = []
    around: list[dict[str, Any]] = []
    for d in sizes:
        for one_batch in batches:
            case = Case(d, one_batch, number)
            own = [
                Row("attention", d, one_batch, splits, c, c == chosen[d], *checks[d, c])
                for c in configs[d]
                for splits in candidates(one_batch, quick or chosen_only)
            ]
            for row in own:
                if row.error is not None and not row.error < TOLERANCE[number]:
                    row.failure = f"relative error {row.error:.1e}"
            measure(case, own, rate)
            rows += own
            around.append(measure_around(case))
    show(rows, console)
    for entry in around:
        console.print("before and after: " + ", ".join(f"{k} {v}" for k, v in entry.items()))
    if output:
        document = {
            "environment": describe_environment("cuda", commit).as_json(),
            "dtype": dtype,
            "copy_bytes_per_second": rate * 1e6,
            "attention": [asdict(row) for row in rows],
            "around": around,
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


if __name__ == "__main__":
    typer.run(main)
