"""Time self-attention of whole sequences on the sizes of Whisper's encoders, on a CUDA GPU.

    python benchmarks/encoder_attention.py --output benchmarks/results/encoder-attention-h100.json

q, k and v are slices of one fused buffer [B, 1500, 3, H, 64], as a fused projection writes them.
Every configuration is first compiled (all of them at the same time) and compared with attention in
float32 on the same views. Then each is timed: replays of a CUDA graph of many launches, over sets
of inputs that together exceed the L2 cache. One that does not compile, does not fit the device or
is too far off becomes an entry that says so, without a time. PyTorch's own cuDNN and
FlashAttention-2 on the same views are the yardstick.

Floating-point operations are counted as 4 B H L L 64: two products, no softmax.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.kernels.encoder_attention import Config, attention, choose
from whisper_flash_attention.kernels.launch import compiling

LENGTH = 1500
WIDTH = 64
SCALE = WIDTH**-0.5
SHAPES = (
    (6, 32), (8, 32), (12, 32), (16, 32), (20, 32), (16, 8), (6, 1), (12, 1), (16, 1), (20, 1),
)  # fmt: skip
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
COLD_BYTES = 50e6
REPLAYS = 9
REPLAY_SECONDS = 6e-3
# Only to decide how many calls a graph gets.
EXPECTED_FLOPS = 400e12
MOST_CALLS = 240
BEST = 5

Call = Callable[[Tensor, Tensor, Tensor, Tensor], object]


@dataclass
class Row:
    """One implementation on one shape: a time, or the reason why there is none."""

    heads: int
    batch: int
    name: str
    config: Config | None = None
    chosen: bool = False
    error: float | None = None
    failure: str | None = None
    microseconds: float | None = None
    tflops: float | None = None


def configs(batch: int, heads: int) -> list[Config]:
    """What is worth trying on this shape, the chosen configuration among it."""
    chosen = choose(batch, heads, LENGTH)
    if chosen.block_m == 64:
        tiles = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3)]
        tiles += [(128, 64, 4, 3), (128, 64, 8, 3)]
        alone = [Config(128, 128, 8, 2), Config(128, 128, 8, 2, registers=128)]
    else:
        tiles = [(64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)]
        tiles += [(128, 128, 8, 2)]
        alone = [Config(*tile) for tile in ((256, 64, 8, 3), (256, 64, 16, 3))]
        alone += [Config(*tile) for tile in ((256, 128, 16, 2), (256, 128, 16, 3))]
        alone += [Config(128, 128, 8, 2, registers=128)]
    both = [Config(*tile, loads=loads) for tile in tiles for loads in ("descriptors", "pointers")]
    return list(dict.fromkeys([chosen, *both, *alone]))


def name_of(config: Config) -> str:
    tile = f"m{config.block_m} n{config.block_n} w{config.warps} s{config.stages}"
    registers = f" r{config.registers}" if config.registers else ""
    return f"{config.loads} {tile}{registers}"


def call_of(config: Config) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        attention(q, k, v, out, scale=SCALE, config=config)

    return call


def cudnn(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False, 0.0, False, False, scale=SCALE
    )
    return result[0].transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, False, False, scale=SCALE
    )
    return result[0].transpose(1, 2)


BASELINES: dict[str, Call] = {"PyTorch cuDNN": cudnn, "PyTorch FlashAttention": flash}


class Case:
    """Inputs of one shape: enough sets that none is still in the cache when its turn comes."""

    def __init__(self, heads: int, batch: int, dtype: torch.dtype) -> None:
        shape = (batch, LENGTH, 3, heads, WIDTH)
        self.flops = 4 * batch * heads * LENGTH * LENGTH * WIDTH
        sets = max(1, math.ceil(COLD_BYTES / (math.prod(shape) * dtype.itemsize)))
        self.inputs = [
            torch.randn(shape, device="cuda", dtype=dtype).unbind(2) for _ in range(sets)
        ]
        self.out = torch.empty_like(self.inputs[0][0], memory_format=torch.contiguous_format)
        self.expected = reference(*self.inputs[0])

    def error_of(self, call: Call) -> float:
        self.out.fill_(float("nan"))
        result = call(*self.inputs[0], self.out)
        found = self.out if result is None else result
        assert isinstance(found, Tensor)
        return float((found.float() - self.expected).norm() / self.expected.norm())

    def microseconds(self, call: Call) -> float:
        """Median time of a call, from replays of a graph of calls that go round the inputs."""
        sets = len(self.inputs)
        count = min(MOST_CALLS, REPLAY_SECONDS * EXPECTED_FLOPS / self.flops)
        count = max(1, round(count / sets)) * sets
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                call(*self.inputs[i % sets], self.out)
        return milliseconds(graph.replay, REPLAYS) * 1e3 / count


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, one sequence at a time: scores of all at once would not fit."""
    out = torch.empty(q.shape, device=q.device)
    for one_q, one_k, one_v, one_out in zip(q, k, v, out, strict=True):
        weights = torch.einsum("lhd,mhd->hlm", one_q.float(), one_k.float()).mul_(SCALE).softmax(-1)
        one_out.copy_(torch.einsum("hlm,mhd->lhd", weights, one_v.float()))
    return out


def milliseconds(run: Callable[[], object], times: int) -> float:
    """Median over `times` runs, after one that does not count."""
    found = []
    for _ in range(times + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return float(median(found[1:]))


def rows_of(heads: int, batch: int) -> list[tuple[Row, Call]]:
    """What is to be measured on one shape, PyTorch's last."""
    chosen = choose(batch, heads, LENGTH)
    found = [
        (Row(heads, batch, name_of(config), config, config == chosen), call_of(config))
        for config in configs(batch, heads)
    ]
    return [*found, *((Row(heads, batch, name), call) for name, call in BASELINES.items())]


def compile_all(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Compile every kernel, all at the same time; those that fail will say so when they run."""
    with compiling(ignore_errors=True):
        for heads, batch in shapes:
            q, k, v = torch.empty(
                batch, LENGTH, 3, heads, WIDTH, device="cuda", dtype=dtype
            ).unbind(2)
            for config in configs(batch, heads):
                call_of(config)(q, k, v, torch.empty_like(q, memory_format=torch.contiguous_format))


def measure(row: Row, call: Call, case: Case, tolerance: float) -> None:
    """Fill in the error and, if it is small, the time; or why there is none."""
    try:
        row.error = case.error_of(call)
        if row.error < tolerance:
            time = case.microseconds(call)
            row.microseconds, row.tflops = time, case.flops / time / 1e6
        else:
            row.failure = f"relative error {row.error:.1e}"
    except Exception as error:  # whatever a compiler may raise belongs into the table
        lines = str(error).strip().splitlines() or [""]
        row.failure = f"failed: {type(error).__name__}: {lines[-1][:160]}"


def show(rows: list[Row], console: Console) -> None:
    """The best of one shape and the chosen one, what failed, then PyTorch's."""
    timed = [row for row in rows if row.config and row.microseconds is not None]
    timed.sort(key=lambda row: row.microseconds or 0.0)
    failed = [row for row in rows if row.config and row.microseconds is None]
    shown = timed[:BEST] + [row for row in timed[BEST:] if row.chosen] + failed
    table = Table(
        "implementation", "microseconds", "TFLOP/s", "error",
        title=f"{rows[0].heads} heads, batch {rows[0].batch}",
    )  # fmt: skip
    for row in shown + [row for row in rows if not row.config]:
        name = row.name + (" *" if row.chosen else "")
        if row.microseconds is None:
            table.add_row(name, "-", "-", (row.failure or "")[:60])
        else:
            table.add_row(name, f"{row.microseconds:.1f}", f"{row.tflops:.0f}", f"{row.error:.1e}")
    console.print(table)


def main(
    heads: Annotated[list[int] | None, typer.Option(help="only these heads, repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="only these batches, repeatable")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    output: Path | None = None,
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
) -> None:
    """Time attention of whole sequences."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype is {dtype}; possible are {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA GPU")
    shapes = [
        (one_heads, one_batch)
        for one_heads, one_batch in SHAPES
        if (not heads or one_heads in heads) and (not batch or one_batch in batch)
    ]
    number = DTYPES[dtype]
    console = Console(width=120)
    console.print(torch.cuda.get_device_name())
    compile_all(shapes, number)
    rows: list[Row] = []
    for shape in shapes:
        case = Case(*shape, number)
        own = rows_of(*shape)
        for row, call in own:
            measure(row, call, case, TOLERANCE[number])
        show([row for row, _ in own], console)
        rows += [row for row, _ in own]
    console.print("* what choose() picks")
    if output:
        document = {
            "environment": describe_environment("cuda", commit).as_json(),
            "dtype": dtype,
            "length": LENGTH,
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
