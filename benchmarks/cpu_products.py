"""Time the routines for a linear layer in float32 on a CPU, for Whisper's shapes.

    python benchmarks/cpu_products.py --output benchmarks/results/cpu-torch_linear.json

`linear` is PyTorch's `torch.nn.functional.linear`, `onednn` the operator that `torch.compile` uses,
`left` the weight times the transposed rows, and `engine` what the decode engine picks. Every layer
has so many copies that their weights do not stay in the caches from one call to the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.engine import torch_linear
from whisper_flash_attention.engine.weights import Linear

# [N, K] of tiny's and base's layers, and their projection to logits.
VOCABULARY = 51865
SHAPES = (
    (384, 384),
    (1536, 384),
    (384, 1536),
    (VOCABULARY, 384),
    (512, 512),
    (2048, 512),
    (512, 2048),
)
ROWS = (1, 4, 1500)
MOST_ROWS_OF_LOGITS = 4
WEIGHT_BYTES = 128e6
ROUNDS = 15

Routine = Callable[[torch.Tensor, Linear], torch.Tensor]


def onednn(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, layer.weight, layer.bias, "none", [], ""
    )
    return result


def left(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    return torch_linear._few_rows(x, layer)


ROUTINES: dict[str, Routine] = {
    "linear": lambda x, layer: F.linear(x, layer.weight, layer.bias),
    "onednn": onednn,
    "left": left,
    "engine": torch_linear.linear,
}


def measure(rows: int, n: int, k: int) -> dict[str, Any]:
    """Median microseconds of every routine for x [rows, k] and weights [n, k]; they take turns."""
    copies = max(1, int(WEIGHT_BYTES // (4 * n * k)))
    layers = [Linear(torch.randn(n, k), torch.randn(n)) for _ in range(copies)]
    x = torch.randn(rows, k)
    expected = ROUTINES["linear"](x, layers[0])
    for routine in ROUTINES.values():
        torch.testing.assert_close(routine(x, layers[0]), expected, rtol=1e-4, atol=1e-3)
    calls = min(copies, 8 if rows > 4 else 32)
    times: dict[str, list[float]] = {name: [] for name in ROUTINES}
    for _ in range(ROUNDS):
        for name, routine in ROUTINES.items():
            start = time.perf_counter()
            for layer in layers[:calls]:
                routine(x, layer)
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {"rows": rows, "n": n, "k": k} | {name: median(each) for name, each in times.items()}


def main(
    threads: Annotated[int, typer.Option(min=1)] = 2,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time linear layers on a CPU."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.no_grad():
        measured = [
            measure(rows, n, k)
            for rows in ROWS
            for n, k in SHAPES
            if rows <= MOST_ROWS_OF_LOGITS or n < VOCABULARY
        ]
    table = Table("rows", "weight", *ROUTINES, title="microseconds, float32")
    for row in measured:
        cells = (f"{row[name]:.0f}" for name in ROUTINES)
        table.add_row(str(row["rows"]), f"{row['n']} x {row['k']}", *cells)
    Console().print(table)
    if output is not None:
        document = {"environment": describe_environment("cpu", commit).as_json(), "rows": measured}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
