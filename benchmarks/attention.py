"""Time every attention back-end on the four attention shapes of Whisper.

    python benchmarks/attention.py --output benchmarks/results/attention-h100.json

What is timed is what a decode loop pays: many calls in a row, one synchronise at the end, host
overhead included. The growing self-attention runs through 128 lengths of the cache, so that a
kernel that plans anew for each length pays for it. Inputs are random and rotate among several
sets, so that no call finds its data in the cache. A back-end whose error against the reference is
out of bounds gets no time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.flash_attention import AttentionInputs, attend, backend_names, explain

HEADS = {"tiny": 6, "base": 8, "small": 12, "medium": 16, "large": 20}
TOLERANCE = 5e-3
SETS = 4


@dataclass(frozen=True)
class Case:
    """One attention shape: `steps` calls, with the cache growing by one key per call or not."""

    name: str
    q_len: int
    kv_len: int
    causal: bool = False
    grows: bool = False


CASES = (
    Case("encoder", 1500, 1500),
    Case("prefill", 4, 4, causal=True),
    Case("self step", 1, 64, causal=True, grows=True),
    Case("cross step", 1, 1500),
)


def make_inputs(case: Case, batch: int, heads: int, device: str, dtype: torch.dtype) -> list:
    """`SETS` random sets of q, k, v; k and v `[B, H, T, D]` behind a `[B, L, H, D]` view."""
    longest = case.kv_len + (128 if case.grows else 0)

    def tensor(length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, 64, device=device, dtype=dtype).transpose(1, 2)

    return [(tensor(case.q_len), tensor(longest), tensor(longest)) for _ in range(SETS)]


def call(case: Case, step: int, tensors: tuple, backend: str) -> torch.Tensor:
    q, k, v = tensors
    length = case.kv_len + (step % 128 if case.grows else 0)
    return attend(q, k[:, :length], v[:, :length], causal=case.causal, scale=1.0, backend=backend)


def relative_error(case: Case, sets: list, backend: str) -> float:
    found = call(case, 0, sets[0], backend).double()
    wanted = call(case, 0, tuple(t.double() for t in sets[0]), "reference")
    return float((found - wanted).norm() / wanted.norm())


def seconds_per_call(case: Case, sets: list, backend: str, calls: int) -> float:
    """Median of five runs of `calls` calls, synchronised before and after."""
    synchronize = torch.cuda.synchronize if sets[0][0].is_cuda else (lambda: None)
    times = []
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        for step in range(calls):
            call(case, step, sets[step % SETS], backend)
        synchronize()
        times.append((time.perf_counter() - start) / calls)
    return sorted(times[1:])[2]


def measure(case: Case, batch: int, size: str, device: str, dtype: torch.dtype) -> list[dict]:
    sets = make_inputs(case, batch, HEADS[size], device, dtype)
    q, k, v = sets[0]
    inputs = AttentionInputs(q, k[:, : case.kv_len], v[:, : case.kv_len], causal=case.causal)
    reasons = explain(inputs.problem)
    heavy = case.q_len > 1000 and batch > 1
    rows = []
    for backend in backend_names():
        row = {"case": case.name, "size": size, "batch": batch, "backend": backend}
        if backend == "auto" or not reasons[backend]:
            skip = backend == "reference" and heavy
            error = 0.0 if skip else relative_error(case, sets, backend)
            row["error"] = error
            if not skip and error < TOLERANCE:
                row["microseconds"] = 1e6 * seconds_per_call(
                    case, sets, backend, 16 if heavy else 128
                )
        else:
            row["why_not"] = "; ".join(reasons[backend])
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    names = [name for name in backend_names() if any(r["backend"] == name for r in rows)]
    table = Table("case", "size", "batch", *names, title="microseconds per call")
    for key in dict.fromkeys((r["case"], r["size"], r["batch"]) for r in rows):
        found = {r["backend"]: r for r in rows if (r["case"], r["size"], r["batch"]) == key}
        cells = [
            f"{found[name]['microseconds']:.1f}" if "microseconds" in found[name] else "-"
            for name in names
        ]
        table.add_row(key[0], key[1], str(key[2]), *cells)
    Console(width=140).print(table)


def main(
    device: str = "cuda",
    dtype: str = "float16",
    size: Annotated[list[str] | None, typer.Option(help="repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
    output: Path | None = None,
) -> None:
    """Time the attention back-ends on Whisper's shapes."""
    torch.manual_seed(0)
    rows = [
        row
        for case in CASES
        for one_size in size or ["tiny", "medium"]
        for one_batch in batch or [1, 32]
        for row in measure(case, one_batch, one_size, device, getattr(torch, dtype))
    ]
    show(rows)
    if output:
        document = {
            "environment": describe_environment(device, commit).as_json(),
            "dtype": dtype,
            "rows": rows,
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
