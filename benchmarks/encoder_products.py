"""How fast the encoder's matrix products run on one CUDA GPU: ours by configuration, and cuBLAS.

    python benchmarks/encoder_products.py --output benchmarks/results/encoder-products-h100.json

Products are those of a layer, with what belongs to them: queries, keys and values of three weights;
the output projection and fc2 on top of the residual stream; fc1 with its GELU. cuBLAS takes them
through PyTorch: bias or residual in the product, the GELU as an operation of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from whisper_flash_attention.benchmark.ceilings import measure_ceilings
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.engine.cuda_graphs import Recorder
from whisper_flash_attention.kernels.launch import compiling
from whisper_flash_attention.kernels.matmul import Config, choose, matmul

CONFIGS = (
    Config(128, 128, 64, warps=4, stages=3),
    Config(128, 128, 64, warps=4, stages=4),
    Config(128, 128, 64, warps=8, stages=3),
    Config(128, 256, 64, warps=8, stages=3),
    Config(128, 256, 64, warps=8, stages=4),
    Config(256, 128, 64, warps=8, stages=3),
    Config(64, 256, 64, warps=4, stages=4),
    Config(64, 128, 64, warps=4, stages=4),
    Config(128, 64, 64, warps=4, stages=4),
    Config(64, 64, 64, warps=4, stages=4),
    Config(64, 64, 128, warps=4, stages=3),
    Config(128, 128, 64, warps=8, stages=3, programs=132),
    Config(128, 128, 64, warps=4, stages=3, programs=264),
)
LAUNCHES = 6
REPLAYS = 7


@dataclass(frozen=True)
class Product:
    """One product of a layer: its tensors, and the number of rows."""

    name: str
    rows: int
    x: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    out: torch.Tensor
    gelu: bool
    residual: bool

    def ours(self, config: Config) -> None:
        """Into `out`, on top of it where there is a residual."""
        matmul(
            self.x,
            self.weights,
            self.biases,
            self.out,
            gelu=self.gelu,
            residual=self.out if self.residual else None,
            config=config,
        )

    def cublas(self) -> None:
        """The same by PyTorch's operations, as far as they go; the residual without the bias."""
        x, out = self.x[0], self.out[0]
        if self.residual:
            out.addmm_(x, self.weights[0].t())
            return
        for part, weight, bias in zip(self._parts(), self.weights, self.biases, strict=True):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        if self.gelu:
            torch.ops.aten.gelu_(out)

    def _parts(self) -> tuple[torch.Tensor, ...]:
        """`out` as dense [rows, N] per weight, one after the other."""
        return self.out.view(len(self.weights), self.rows, -1).unbind()

    def error(self, config: Config) -> float:
        """Relative error of the first rows against float64."""
        few = slice(0, min(self.rows, 300))
        self.out.normal_()
        before = self.out[:, few].double()
        wanted = torch.cat(
            [
                F.linear(self.x[:, few].double(), w.double(), None if b is None else b.double())
                for w, b in zip(self.weights, self.biases, strict=True)
            ],
            -1,
        )
        wanted = (F.gelu(wanted) if self.gelu else wanted) + (before if self.residual else 0)
        self.ours(config)
        return float((self.out[:, few].double() - wanted).norm() / wanted.norm())

    @property
    def chosen(self) -> Config:
        """The configuration that the launcher picks."""
        parts = len(self.weights)
        return choose(self.rows, len(self.weights[0]), parts=parts, gelu=self.gelu)

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * sum(weight.numel() for weight in self.weights)


def products(width: int, rows: int, dtype: torch.dtype) -> list[Product]:
    """The four products of a layer of this width."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    def weight(n: int, k: int) -> torch.Tensor:
        return random(n, k, scale=k**-0.5)

    x, wide = random(1, rows, width), random(1, rows, 4 * width)
    projections = tuple(weight(width, width) for _ in range(3))
    biases = (random(width), None, random(width))
    out, hidden = random(1, rows, width), random(1, rows, 4 * width)
    fc1, fc2 = weight(4 * width, width), weight(width, 4 * width)
    triple = random(1, rows, 3 * width)
    return [
        Product("qkv", rows, x, projections, biases, triple, False, False),
        Product("out", rows, x, projections[:1], (None,), out, False, True),
        Product("fc1", rows, x, (fc1,), (random(4 * width),), hidden, True, False),
        Product("fc2", rows, wide, (fc2,), (None,), out, False, True),
    ]


def microseconds(launch: Callable[[], None]) -> float:
    """Median time of a launch, several in one graph."""

    def several() -> None:
        for _ in range(LAUNCHES):
            launch()

    graph = Recorder().record(several)
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / LAUNCHES)
    return median(times)


def candidates(product: Product) -> list[Config]:
    """The configurations to try; the chosen one is among them."""
    chosen = product.chosen
    return list(CONFIGS) if chosen in CONFIGS else [chosen, *CONFIGS]


def compile_all(some: list[Product]) -> None:
    """Compile everything side by side; what fails will fail again where it is measured."""
    with compiling(ignore_errors=True):
        for product in some:
            for config in candidates(product):
                product.ours(config)


def measure(product: Product, config: Config | None, ceiling: float) -> dict[str, Any]:
    """One row of results; `config` None is cuBLAS."""
    row: dict[str, Any] = {"product": product.name, "width": product.x.shape[-1]}
    row |= {"rows": product.rows, "operations": product.operations}
    row["config"] = None if config is None else asdict(config)
    row["chosen"] = config == product.chosen
    try:
        row["error"] = None if config is None else product.error(config)
        row["us"] = microseconds(product.cublas if config is None else lambda: product.ours(config))
    except Exception as error:  # a configuration that the GPU cannot run is a result, too
        row |= {"us": None, "failure": str(error).strip().splitlines()[-1][:200]}
        return row
    row["share"] = product.operations / row["us"] * 1e6 / ceiling
    return row


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    width: list[int] = typer.Option([384, 512, 768, 1024, 1280], help="Repeatable."),
    rows: list[int] = typer.Option([1500, 12000, 24000, 48000], help="Repeatable."),
    best: int = typer.Option(3, help="How many configurations to print per product."),
    output: Path | None = typer.Option(None, help="JSON file to write."),
    commit: str | None = typer.Option(None, help="The commit, instead of what git says."),
) -> None:
    ceiling = measure_ceilings("cuda", "float16").flops_per_second
    console, results = Console(width=150), []
    table = Table(title=f"share of {ceiling / 1e12:.0f} TFLOP/s")
    for column in ("width", "rows", "product", "cuBLAS us", "share", "ours: us, share"):
        table.add_column(column)
    for size in width:
        for count in rows:
            some = products(size, count, torch.float16)
            compile_all(some)
            for product in track(some, f"{size} x {count}", console=console, transient=True):
                library = measure(product, None, ceiling)
                found = [measure(product, config, ceiling) for config in candidates(product)]
                results += [library, *found]
                ranked = sorted((row for row in found if row["us"]), key=lambda row: row["us"])
                table.add_row(
                    str(size), str(count), product.name,
                    f"{library['us']:.1f}", f"{library['share']:.0%}",
                    "; ".join(_brief(row) for row in ranked[:best]),
                )  # fmt: skip
            del some, product
    console.print(table)
    if output is not None:
        environment = describe_environment("cuda", commit).as_json()
        output.write_text(json.dumps({"environment": environment, "rows": results}, indent=1))


def _brief(row: dict[str, Any]) -> str:
    config = row["config"]
    size = "x".join(str(config[name]) for name in ("block_m", "block_n", "block_k"))
    extra = f" p{config['programs']}" if config["programs"] else ""
    mark = "*" if row["chosen"] else ""
    error = "" if row["error"] < 1e-3 else f" ERROR {row['error']:.0e}"
    return (
        f"{row['us']:.1f} {row['share']:.0%} {size} w{config['warps']} s{config['stages']}"
        f"{extra}{mark}{error}"
    )


if __name__ == "__main__":
    app()
