"""Time the matrix products of Whisper's layers.

    python benchmarks/products.py cpu --output benchmarks/results/cpu-products.json
    python benchmarks/products.py encoder --output benchmarks/results/encoder-products-h100.json

`cpu`: linear layers in float32. `linear` is PyTorch's `torch.nn.functional.linear`, `onednn` the
operator that `torch.compile` uses, `left` the weight times the transposed rows, and `engine` the
choice of the decode engine for a model's own weights. `transposed` multiplies rows by the weight
laid out as [K, N]; `half` and `int8` are the layouts of `engine/packing`. Weights are such that
float16 holds them exactly; copies of every layer exceed the caches.

`encoder`: products of an encoder layer on a CUDA GPU, ours by configuration and cuBLAS, with what
belongs to them: queries, keys and values of three weights; the output projection and fc2 on top of
the residual stream; fc1 with its GELU. cuBLAS takes them through PyTorch: bias or residual in the
product, the GELU as an operation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from _harness import (
    Commit,
    Output,
    Threads,
    app_of,
    console,
    graph_microseconds,
    print_rows,
    relative_error,
    require_cuda,
    time_in_turns,
    write_json,
)
from rich.progress import track
from torch.nn import functional as F

from whisper_flash_attention.benchmark.measure import measure_ceilings
from whisper_flash_attention.engine import packing, weights
from whisper_flash_attention.engine.weights import Linear
from whisper_flash_attention.kernels.launch import compiling
from whisper_flash_attention.kernels.matmul import Config, choose, matmul

# [N, K] of tiny's and base's layers, and tiny's projection to logits.
VOCABULARY = 51865
SHAPES = (
    *((384, 384), (1536, 384), (384, 1536), (VOCABULARY, 384)),
    *((512, 512), (2048, 512), (512, 2048)),
)
ROWS = (1, 4, 1500)
MOST_ROWS_OF_LOGITS = 4
WEIGHT_BYTES = 128e6
ROUNDS = 15

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
LAUNCHES, REPLAYS = 6, 7

Routine = Callable[[torch.Tensor, Linear], torch.Tensor]
ROUTINES: dict[str, Routine] = {
    "linear": lambda x, layer: F.linear(x, layer.weight, layer.bias),
    "onednn": lambda x, layer: torch.ops.mkldnn._linear_pointwise(
        x, layer.weight, layer.bias, "none", [], ""
    ),
    "left": weights._few_rows,
    "engine": weights.linear,
}


# Layouts that are made once, and multiplied by the engine's `linear`.
LAYOUTS: dict[str, Callable[[Linear], Linear]] = {
    "half": packing.exact,
    "int8": packing.quantised,
}


def measure_cpu(rows: int, n: int, k: int, rounds: int) -> dict[str, Any]:
    """Median microseconds of every routine for x [rows, k] and weights [n, k]."""
    copies = max(1, int(WEIGHT_BYTES // (4 * n * k)))
    layers = [Linear(torch.randn(n, k).half().float(), torch.randn(n)) for _ in range(copies)]
    x = torch.randn(rows, k)
    expected = ROUTINES["linear"](x, layers[0])
    for routine in ROUTINES.values():
        torch.testing.assert_close(routine(x, layers[0]), expected, rtol=1e-4, atol=1e-3)
    some = layers[: min(copies, 8 if rows > 4 else 32)]

    def apply(routine: Routine, layers: Sequence[Linear]) -> Callable[[], object]:
        return lambda: [routine(x, layer) for layer in layers]

    works = {name: apply(routine, some) for name, routine in ROUTINES.items()}
    transposed = [Linear(layer.weight.t().contiguous(), layer.bias) for layer in some]
    works["transposed"] = apply(
        lambda x, layer: torch.addmm(layer.bias, x, layer.weight),
        transposed,  # type: ignore[arg-type]
    )
    if not packing.has_int8():  # which also drops PyTorch's announcement, given once
        raise typer.BadParameter("this build of PyTorch multiplies no 8-bit weights here")
    for name, lay_out in LAYOUTS.items():
        works[name] = apply(weights.linear, [lay_out(layer) for layer in some])
    times = time_in_turns(works, rounds)
    micro = {name: 1e6 * median(each) / len(some) for name, each in times.items()}
    return {"rows": rows, "n": n, "k": k} | micro


def cpu(
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = ROUNDS,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of x; repeatable.")] = None,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Time linear layers in float32 on a CPU."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.no_grad():
        measured = [
            measure_cpu(count, n, k, rounds)
            for count in rows or ROWS
            for n, k in SHAPES
            if count <= MOST_ROWS_OF_LOGITS or n < VOCABULARY
        ]
    columns = {"rows": "{rows}", "weight": "{n} x {k}"}
    columns |= {name: f"{{{name}:.0f}}" for name in (*ROUTINES, "transposed", *LAYOUTS)}
    print_rows("microseconds, float32", measured, columns)
    write_json(output, "cpu", commit, {"rows": measured})


@dataclass(frozen=True)
class Product:
    """One product of an encoder layer: its tensors, and the number of rows."""

    name: str
    rows: int
    x: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    out: torch.Tensor
    gelu: bool = False
    residual: bool = False

    def ours(self, config: Config) -> None:
        """Compute into `out`, on top of it where there is a residual."""
        residual = self.out if self.residual else None
        matmul(
            *(self.x, self.weights, self.biases, self.out),
            gelu=self.gelu,
            residual=residual,
            config=config,
        )

    def cublas(self) -> None:
        """The same by PyTorch's operations; the residual without the bias."""
        x, out = self.x[0], self.out[0]
        if self.residual:
            out.addmm_(x, self.weights[0].t())
            return
        # `out` as dense [rows, N] per weight, one after the other.
        parts = self.out.view(len(self.weights), self.rows, -1).unbind()
        for part, weight, bias in zip(parts, self.weights, self.biases, strict=True):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        if self.gelu:
            torch.ops.aten.gelu_(out)

    def error(self, config: Config) -> float:
        """Relative error of the first rows against float64."""
        few = slice(0, min(self.rows, 300))
        self.out.normal_()
        before = self.out[:, few].double()
        x = self.x[:, few].double()
        columns = [
            F.linear(x, weight.double(), None if bias is None else bias.double())
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]
        expected = torch.cat(columns, -1)
        expected = (F.gelu(expected) if self.gelu else expected) + (before if self.residual else 0)
        self.ours(config)
        return relative_error(self.out[:, few].double(), expected)

    @property
    def chosen(self) -> Config:
        """The configuration that the launcher chooses."""
        parts = len(self.weights)
        return choose(self.rows, len(self.weights[0]), parts=parts, gelu=self.gelu)

    @property
    def configs(self) -> list[Config]:
        """The configurations to try; the chosen one is among them."""
        return list(dict.fromkeys([self.chosen, *CONFIGS]))

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * sum(weight.numel() for weight in self.weights)


def encoder_products(width: int, rows: int, dtype: torch.dtype) -> list[Product]:
    """The four products of a layer of this width."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    def weight(n: int, k: int) -> torch.Tensor:
        return random(n, k, scale=k**-0.5)

    x, hidden = random(1, rows, width), random(1, rows, 4 * width)
    projections = tuple(weight(width, width) for _ in range(3))
    biases = (random(width), None, random(width))
    out, hidden_out = random(1, rows, width), random(1, rows, 4 * width)
    fc1, fc2 = weight(4 * width, width), weight(width, 4 * width)
    fc1_bias = random(4 * width)
    return [
        Product("qkv", rows, x, projections, biases, random(1, rows, 3 * width)),
        Product("out", rows, x, projections[:1], (None,), out, residual=True),
        Product("fc1", rows, x, (fc1,), (fc1_bias,), hidden_out, gelu=True),
        Product("fc2", rows, hidden, (fc2,), (None,), out, residual=True),
    ]


def measure_product(product: Product, config: Config | None, ceiling: float) -> dict[str, Any]:
    """One row of results; `config` None is cuBLAS."""
    row: dict[str, Any] = {"product": product.name, "width": product.x.shape[-1]}
    row |= {"rows": product.rows, "operations": product.operations}
    row["config"] = None if config is None else asdict(config)
    row["chosen"] = config == product.chosen

    def launch(_: int) -> None:
        if config is None:
            product.cublas()
        else:
            product.ours(config)

    try:
        row["error"] = None if config is None else product.error(config)
        row["us"] = graph_microseconds(launch, LAUNCHES, REPLAYS)
    except Exception as error:  # a configuration that the GPU cannot run is a result, too
        row |= {"us": None, "failure": str(error).strip().splitlines()[-1][:200]}
        return row
    row["share"] = product.operations / row["us"] * 1e6 / ceiling
    return row


def encoder(
    width: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    best: Annotated[int, typer.Option(help="Configurations to print per product.")] = 3,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time the matrix products of encoder layers on a CUDA GPU."""
    require_cuda()
    ceiling = measure_ceilings("cuda", "float16").flops_per_second
    results: list[dict[str, Any]] = []
    for size in width or (384, 512, 768, 1024, 1280):
        for count in rows or (1500, 12000, 24000, 48000):
            products = encoder_products(size, count, torch.float16)
            # In parallel; a failure is reported where its configuration is measured.
            with compiling(ignore_errors=True):
                for product in products:
                    for config in product.configs:
                        product.ours(config)
            for product in track(products, f"{size} x {count}", console=console, transient=True):
                for config in (None, *product.configs):
                    results.append(measure_product(product, config, ceiling))
            del products, product
    columns = {"width": "{width}", "rows": "{rows}", "product": "{product}"}
    columns |= {"cuBLAS us": "{us:.1f}", "share": "{share:.0%}"}

    def ours(library: Mapping[str, Any]) -> str:
        same = [
            row
            for row in results
            if row["config"]
            and row["us"]
            and all(row[name] == library[name] for name in ("product", "width", "rows"))
        ]
        return "; ".join(brief(row) for row in sorted(same, key=lambda row: row["us"])[:best])

    libraries = [row for row in results if row["config"] is None]
    title = f"share of {ceiling / 1e12:.0f} TFLOP/s; * is chosen"
    print_rows(title, libraries, columns | {"ours: us, share": ours})
    write_json(output, "cuda", commit, {"rows": results})


def brief(row: dict[str, Any]) -> str:
    """A configuration and its time in a few characters."""
    config = row["config"]
    size = "x".join(str(config[name]) for name in ("block_m", "block_n", "block_k"))
    extra = f" p{config['programs']}" if config["programs"] else ""
    mark = "*" if row["chosen"] else ""
    error = "" if row["error"] < 1e-3 else f" ERROR {row['error']:.0e}"
    return (
        f"{row['us']:.1f} {row['share']:.0%} {size} w{config['warps']} s{config['stages']}"
        f"{extra}{mark}{error}"
    )


app = app_of(__doc__, cpu, encoder)

if __name__ == "__main__":
    app()
