"""Time attention on Whisper's sizes.

    python benchmarks/attention.py backends --output benchmarks/results/attention-h100.json
    python benchmarks/attention.py encoder --output benchmarks/results/encoder-attention-h100.json
    python benchmarks/attention.py absorbed --output benchmarks/results/absorbed-h100.json

`backends`: every attention back-end on the four attention shapes of Whisper, as in a decode loop:
many calls in a row, one synchronisation at the end, host overhead included. `encoder`:
self-attention of whole sequences by configuration, beside PyTorch's cuDNN and FlashAttention-2.
`absorbed`: the formulations of absorbed cross-attention by configuration, beside the time of a copy
of the encoder states on the device. A configuration that does not compile, does not fit the device
or is too inaccurate has a reason instead of a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Annotated, Any

import torch
import typer
from _harness import (
    TOLERANCE,
    Commit,
    HalfDtype,
    Output,
    app_of,
    cold_sets,
    console,
    failure_of,
    graph_microseconds,
    half_dtype,
    measure_kernel,
    print_rows,
    relative_error,
    require_cuda,
    seconds_of,
    write_json,
)
from torch import Tensor

from whisper_flash_attention.benchmark.measure import measure_ceilings
from whisper_flash_attention.flash_attention import AttentionInputs, attend, backend_names, explain
from whisper_flash_attention.kernels.absorbed_attention import (
    MOST_SPLITS,
    AttentionConfig,
    absorbed_attention,
    choose_config,
    choose_splits,
    workspace_shapes,
)
from whisper_flash_attention.kernels.absorbed_projections import (
    absorb_query,
    fold_queries,
    project_values,
)
from whisper_flash_attention.kernels.encoder_attention import Config, attention, choose
from whisper_flash_attention.kernels.launch import compiling
from whisper_flash_attention.kernels.linear import linear

POSITIONS, HEAD_DIM = 1500, 64
SCALE = HEAD_DIM**-0.5

# Of `backends`.
HEADS = {"tiny": 6, "base": 8, "small": 12, "medium": 16, "large": 20}
BACKEND_TOLERANCE = 5e-3
BACKEND_SETS = 4

# Of `encoder`: (heads, batch). Expected FLOP/s decide only how many calls a graph gets.
ENCODER_SHAPES = (
    (6, 32), (8, 32), (12, 32), (16, 32), (20, 32), (16, 8), (6, 1), (12, 1), (16, 1), (20, 1),
)  # fmt: skip
ENCODER_COLD_BYTES = 50e6
REPLAY_SECONDS, EXPECTED_FLOPS, MOST_CALLS = 6e-3, 400e12, 240
BEST = 5

# Of `absorbed`: heads by D, and configurations by D.
ABSORBED_HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20}
ABSORBED_COLD_BYTES = 200e6
C = AttentionConfig
ABSORBED_CONFIGS = {
    384: (C("rows", 16, 32, 4, 3), C("wgmma", 16, 64, 4, 3), C("wgmma", 16, 64, 4, 4)),
    512: (C("rows", 16, 32, 4, 3), C("wgmma", 16, 64, 4, 3)),
    768: (C("rows", 16, 16, 4, 3), C("wgmma", 16, 64, 4, 2), C("wgmma", 16, 64, 4, 1)),
    1024: (
        C("rows", 16, 16, 4, 3), C("rows", 16, 32, 4, 3),
        C("wgmma", 16, 64, 4, 1), C("wgmma", 16, 64, 8, 1),
    ),
    1280: (
        C("rows", 32, 32, 8, 2), C("rows", 10, 16, 4, 2),
        C("wgmma", 10, 64, 8, 1), C("ring", 32, 64, 8),
    ),
}  # fmt: skip


# --- every back-end ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One attention shape; the cache of one that grows has one key more in every call."""

    name: str
    q_len: int
    kv_len: int
    causal: bool = False
    grows: bool = False


SHAPES = (
    Shape("encoder", POSITIONS, POSITIONS),
    Shape("prefill", 4, 4, causal=True),
    Shape("self step", 1, 64, causal=True, grows=True),
    Shape("cross step", 1, POSITIONS),
)


def backend_inputs(shape: Shape, batch: int, heads: int, device: str, dtype: torch.dtype) -> list:
    """`BACKEND_SETS` random sets of q, k, v; k and v [B, H, T, D] as a [B, L, H, D] view."""
    longest = shape.kv_len + (128 if shape.grows else 0)

    def tensor(length: int) -> Tensor:
        data = torch.randn(batch, heads, length, HEAD_DIM, device=device, dtype=dtype)
        return data.transpose(1, 2)

    return [(tensor(shape.q_len), tensor(longest), tensor(longest)) for _ in range(BACKEND_SETS)]


def call_backend(shape: Shape, step: int, tensors: tuple, backend: str) -> Tensor:
    q, k, v = tensors
    length = shape.kv_len + (step % 128 if shape.grows else 0)
    return attend(q, k[:, :length], v[:, :length], causal=shape.causal, scale=1.0, backend=backend)


def backend_error(shape: Shape, tensors: tuple, backend: str) -> float:
    """Relative error against the reference in float64."""
    expected = call_backend(shape, 0, tuple(t.double() for t in tensors), "reference")
    return relative_error(call_backend(shape, 0, tensors, backend).double(), expected)


def measure_backends(
    shape: Shape, batch: int, size: str, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row per back-end: the median of five runs of many calls, after an untimed run."""
    sets = backend_inputs(shape, batch, HEADS[size], device, dtype)
    q, k, v = sets[0]
    inputs = AttentionInputs(q, k[:, : shape.kv_len], v[:, : shape.kv_len], causal=shape.causal)
    reasons = explain(inputs.problem)
    is_heavy = shape.q_len > 1000 and batch > 1
    calls = 16 if is_heavy else 128
    rows = []
    for backend in backend_names():
        row: dict[str, Any] = {"case": shape.name, "size": size, "batch": batch, "backend": backend}
        rows.append(row)
        if backend != "auto" and reasons[backend]:
            row["why_not"] = "; ".join(reasons[backend])
            continue
        if backend == "reference" and is_heavy:
            row["error"] = 0.0
            continue
        row["error"] = backend_error(shape, sets[0], backend)
        if row["error"] < BACKEND_TOLERANCE:

            def run(backend: str = backend) -> None:
                for step in range(calls):
                    call_backend(shape, step, sets[step % len(sets)], backend)

            times = [seconds_of(run, q.device) / calls for _ in range(6)]
            row["microseconds"] = 1e6 * median(times[1:])
    return rows


def backends(
    device: str = "cuda",
    dtype: str = "float16",
    size: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Time every attention back-end on the four attention shapes."""
    torch.manual_seed(0)
    rows = [
        row
        for shape in SHAPES
        for one_size in size or ["tiny", "medium"]
        for one_batch in batch or [1, 32]
        for row in measure_backends(shape, one_batch, one_size, device, getattr(torch, dtype))
    ]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = cells.setdefault((row["case"], row["size"], row["batch"]), dict(row))
        line[row["backend"]] = row.get("microseconds")
    columns = {name: f"{{{name}}}" for name in ("case", "size", "batch")}
    columns |= {name: f"{{{name}:.1f}}" for name in backend_names()}
    print_rows("microseconds per call", cells.values(), columns)
    write_json(output, device, commit, {"dtype": dtype, "rows": rows})


# --- self-attention of the encoder ---------------------------------------------------------------

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def encoder_configs(batch: int, heads: int) -> list[Config]:
    """Configurations to try on this shape, the chosen one first."""
    chosen = choose(batch, heads, POSITIONS)
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


def config_name(config: Config) -> str:
    tile = f"m{config.block_m} n{config.block_n} w{config.warps} s{config.stages}"
    return f"{config.loads} {tile}" + (f" r{config.registers}" if config.registers else "")


def call_of(config: Config) -> Call:
    return lambda q, k, v, out: attention(q, k, v, out, scale=SCALE, config=config)


def pytorch(operation: str, *before: Any) -> Call:
    """A call of PyTorch's operation, with the arguments between v and the scale."""

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        tensors = (tensor.transpose(1, 2) for tensor in (q, k, v))
        run = getattr(torch.ops.aten, f"_scaled_dot_product_{operation}_attention")
        return run(*tensors, *before, scale=SCALE)[0].transpose(1, 2)

    return call


BASELINES: dict[str, Call] = {
    "PyTorch cuDNN": pytorch("cudnn", None, False, 0.0, False, False),
    "PyTorch FlashAttention": pytorch("flash", 0.0, False, False),
}


def fused_inputs(heads: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v [B, L, H, 64] as slices of one buffer, as a fused projection writes them."""
    shape = (batch, POSITIONS, 3, heads, HEAD_DIM)
    return torch.randn(shape, device="cuda", dtype=dtype).unbind(2)


def attention_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference, one sequence at a time, because the scores of all do not fit in memory."""
    out = torch.empty(q.shape, device=q.device)
    for one_q, one_k, one_v, one_out in zip(q, k, v, out, strict=True):
        scores = torch.einsum("lhd,mhd->hlm", one_q.float(), one_k.float()).mul_(SCALE)
        one_out.copy_(torch.einsum("hlm,mhd->lhd", scores.softmax(-1), one_v.float()))
    return out


def compile_encoder(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Compile all kernels in parallel; a failure is reported where its kernel is measured."""
    with compiling(ignore_errors=True):
        for heads, batch in shapes:
            q, k, v = fused_inputs(heads, batch, dtype)
            for config in encoder_configs(batch, heads):
                call_of(config)(q, k, v, torch.empty_like(q, memory_format=torch.contiguous_format))


def measure_encoder(heads: int, batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row per configuration and then per baseline; 4 B H L L 64 operations, no softmax."""
    flops = 4 * batch * heads * POSITIONS**2 * HEAD_DIM
    size = 3 * batch * POSITIONS * heads * HEAD_DIM * dtype.itemsize
    sets = [fused_inputs(heads, batch, dtype) for _ in range(cold_sets(size, ENCODER_COLD_BYTES))]
    out = torch.empty_like(sets[0][0], memory_format=torch.contiguous_format)
    expected = attention_in_float32(*sets[0])
    wanted = min(MOST_CALLS, REPLAY_SECONDS * EXPECTED_FLOPS / flops)
    calls = max(1, round(wanted / len(sets))) * len(sets)

    def error_of(call: Call) -> float:
        out.fill_(float("nan"))
        result = call(*sets[0], out)
        return relative_error((out if result is None else result).float(), expected)

    def microseconds(call: Call) -> float:
        return graph_microseconds(lambda i: call(*sets[i % len(sets)], out), calls, 9)

    chosen = choose(batch, heads, POSITIONS)
    todo: list[tuple[str, Config | None, Call]] = [
        (config_name(config), config, call_of(config)) for config in encoder_configs(batch, heads)
    ]
    todo += [(name, None, call) for name, call in BASELINES.items()]
    rows = []
    for name, config, call in todo:
        row: dict[str, Any] = {"heads": heads, "batch": batch, "name": name}
        row |= {"config": config and asdict(config), "chosen": config == chosen}
        row |= dict.fromkeys(("error", "failure", "microseconds", "tflops"))
        measure_kernel(row, partial(error_of, call), partial(microseconds, call), TOLERANCE[dtype])
        if row["microseconds"] is not None:
            row["tflops"] = flops / row["microseconds"] / 1e6
        rows.append(row)
    return rows


def show_encoder(rows: list[dict[str, Any]]) -> None:
    """Print the best rows of one shape, the chosen one, those that failed, then PyTorch's."""
    ours = [row for row in rows if row["config"]]
    timed = [row for row in ours if row["microseconds"] is not None]
    timed.sort(key=lambda row: row["microseconds"])
    shown = timed[:BEST] + [row for row in timed[BEST:] if row["chosen"]]
    shown += [row for row in ours if row["microseconds"] is None]
    columns = {
        "implementation": lambda row: row["name"] + (" *" if row["chosen"] else ""),
        "microseconds": "{microseconds:.1f}",
        "TFLOP/s": "{tflops:.0f}",
        "error": lambda row: (row["failure"] or "")[:60] or f"{row['error']:.1e}",
    }
    title = f"{rows[0]['heads']} heads, batch {rows[0]['batch']}; * is chosen"
    print_rows(title, shown + [row for row in rows if not row["config"]], columns)


def encoder(
    heads: Annotated[list[int] | None, typer.Option(help="Only these; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Only these; repeatable.")] = None,
    dtype: HalfDtype = "float16",
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time self-attention of whole sequences on the sizes of Whisper's encoders."""
    precision = half_dtype(dtype)
    require_cuda()
    shapes = [
        (one_heads, one_batch)
        for one_heads, one_batch in ENCODER_SHAPES
        if (not heads or one_heads in heads) and (not batch or one_batch in batch)
    ]
    console.print(torch.cuda.get_device_name())
    compile_encoder(shapes, precision)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        found = measure_encoder(*shape, precision)
        show_encoder(found)
        rows += found
    write_json(output, "cuda", commit, {"dtype": dtype, "length": POSITIONS, "rows": rows})


# --- absorbed cross-attention --------------------------------------------------------------------


def workspace(rows: int, d: int, splits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shapes = workspace_shapes(rows, ABSORBED_HEADS[d], d, splits)
    return torch.empty(shapes[0], dtype=dtype, device="cuda"), torch.empty(shapes[1], device="cuda")


def check_absorbed(
    d: int, config: AttentionConfig, dtype: torch.dtype
) -> tuple[float | None, str | None]:
    """Relative error against float64 on one clip, or why the configuration cannot run."""
    try:
        torch.manual_seed(0)
        queries = (torch.randn(1, ABSORBED_HEADS[d], d, device="cuda") * 3 / math.sqrt(d)).to(dtype)
        states = torch.randn(1, POSITIONS, d, device="cuda").to(dtype)
        parts, stats = workspace(1, d, 2, dtype)
        absorbed_attention(queries, states, parts, stats, splits=2, config=config)
        highest, total = stats.double().unbind(-1)
        shares = total * torch.exp2(highest - highest.amax(0))
        found = (parts.double() * (shares / shares.sum(0))[..., None]).sum(0)
        expected = (queries[0].double() @ states[0].double().T).softmax(-1) @ states[0].double()
        error = relative_error(found[0], expected)
    except Exception as raised:  # a configuration that cannot be compiled or run is a result, too
        return None, failure_of(raised)
    return error, None if error < TOLERANCE[dtype] else f"relative error {error:.1e}"


def compile_around(d: int, batch: int, dtype: torch.dtype) -> None:
    """Compile the kernels before and after attention as this batch uses them."""
    AbsorbedCase(d, batch, dtype, sets=1).launches_around(choose_splits(batch, POSITIONS), layers=1)


def check_all_absorbed(
    jobs: list[tuple[int, AttentionConfig]], batches: list[int], dtype: torch.dtype, processes: int
) -> dict[tuple[int, AttentionConfig], tuple[float | None, str | None]]:
    """`check_absorbed` of all jobs, in processes that also compile; a crash fails its own job."""
    results = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {job: pool.submit(check_absorbed, *job, dtype) for job in jobs}
        for d in dict.fromkeys(d for d, _ in jobs):
            for batch in batches:
                pool.submit(compile_around, d, batch, dtype)
        for job, future in futures.items():
            try:
                results[job] = future.result()
            except Exception as raised:  # the process crashed, as miscompiled kernels may
                results[job] = None, failure_of(raised)
    return results


class AbsorbedCase:
    """Encoder states (several sets), queries and workspaces of one D and batch."""

    def __init__(self, d: int, batch: int, dtype: torch.dtype, sets: int | None = None) -> None:
        self.d, self.batch, self.dtype = d, batch, dtype
        self.bytes = batch * POSITIONS * d * dtype.itemsize
        self.sets = sets or cold_sets(self.bytes, ABSORBED_COLD_BYTES, least=2)
        shape = (self.sets, batch, POSITIONS, d)
        self.states = torch.randn(shape, device="cuda", dtype=dtype)
        queries = torch.randn(batch, ABSORBED_HEADS[d], d, device="cuda", dtype=dtype)
        self.queries = queries / math.sqrt(d)

    def _time(self, launch: Callable[[int], object], sets: int) -> float:
        calls = sets * max(1, math.ceil(24 / sets))
        return graph_microseconds(lambda i: launch(i % sets), calls, replays=7)

    def time_attention(self, config: AttentionConfig, splits: int) -> float:
        """Microseconds of a call."""
        workspaces = workspace(self.batch, self.d, splits, self.dtype)
        run = partial(absorbed_attention, splits=splits, config=config)
        return self._time(lambda i: run(self.queries, self.states[i], *workspaces), self.sets)

    def launches_around(self, splits: int, layers: int) -> dict[str, Callable[[int], None]]:
        """The kernels before and after, with the weights of layer i; each has run once."""
        d = self.d
        x = torch.randn(self.batch, d, device="cuda", dtype=self.dtype)
        vector = torch.randn(d, device="cuda", dtype=self.dtype)
        weights = torch.randn(layers, 2, d, d, device="cuda", dtype=self.dtype) / math.sqrt(d)
        parts, stats = workspace(self.batch, d, splits, self.dtype)
        parts.normal_()
        stats.fill_(1.0)
        absorbed, projected, out = map(torch.empty_like, (self.queries, x, x))

        def query(i: int) -> None:
            first, second = weights[i]
            absorb_query(x, vector, vector, first, vector, second, absorbed, scale=0.125)

        def linear_and_fold(i: int) -> None:
            first, second = weights[i]
            linear(x, first, vector, projected, norm_weight=vector, norm_bias=vector)
            fold_queries(projected, second, absorbed, scale=0.125)

        def values(i: int) -> None:
            project_values(parts, stats, weights[i, 0], vector, out)

        launches: dict[str, Callable[[int], None]] = {
            "query": query,
            "linear_and_fold": linear_and_fold,
            "values": values,
        }
        for each in launches.values():
            each(0)
        return launches

    def measure_around(self) -> dict[str, Any]:
        """Microseconds of the kernels before (one, or two) and after, in default configurations."""
        entry: dict[str, Any] = {"d": self.d, "batch": self.batch}
        layers = cold_sets(2 * self.d**2 * self.dtype.itemsize, ABSORBED_COLD_BYTES, least=2)
        try:
            launches = self.launches_around(choose_splits(self.batch, POSITIONS), layers)
            times = {name: self._time(launch, layers) for name, launch in launches.items()}
        except Exception as raised:  # a kernel that cannot run is a result, too
            return entry | {"failure": failure_of(raised)}
        return entry | {name: round(time, 2) for name, time in times.items()}


def splits_to_try(batch: int, only_chosen: bool) -> list[int]:
    """The chosen number of splits, half and double."""
    chosen = choose_splits(batch, POSITIONS)
    if only_chosen:
        return [chosen]
    return sorted({max(1, chosen // 2), chosen, min(MOST_SPLITS, chosen * 2)})


def show_absorbed(rows: list[dict[str, Any]]) -> None:
    """Print, per D, a line per configuration, by its time at the first batch; best splits each."""
    for d in dict.fromkeys(row["d"] for row in rows):
        lines: dict[str, dict[str, Any]] = {}
        for row in (row for row in rows if row["d"] == d):
            c = row["config"]
            name = f"{c['formulation']} q{c['queries']} k{c['keys']} w{c['warps']} s{c['stages']}"
            line = lines.setdefault(name, row | {"name": name, "best": {}})
            best = line["best"].get(row["batch"])
            time = row["microseconds"]
            if time is not None and (best is None or time < best["microseconds"]):
                line["best"][row["batch"]] = row

        def cell(batch: int, line: Mapping[str, Any]) -> str | None:
            best = line["best"].get(batch)
            if best is None:
                return None
            share = f"({best['share_of_copy']:.0%}, {best['splits']})"
            return f"{best['microseconds']:.1f} {share}{' *' if best['chosen'] else ''}"

        def first_time(line: Mapping[str, Any], batch: int = rows[0]["batch"]) -> float:
            best = line["best"].get(batch)
            return best["microseconds"] if best else math.inf

        columns = {"configuration": lambda row: row["name"]}
        columns |= {
            str(each): partial(cell, each) for each in dict.fromkeys(r["batch"] for r in rows)
        }
        columns["error"] = lambda row: (row["failure"] or f"{row['error']:.1e}")[:50]
        title = f"D {d}: microseconds (share of copy bandwidth, splits); * is chosen"
        print_rows(title, sorted(lines.values(), key=first_time), columns)


def absorbed(
    size: Annotated[list[int] | None, typer.Option(help="D; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    dtype: HalfDtype = "float16",
    quick: Annotated[bool, typer.Option(help="Two sizes, two batches, chosen splits.")] = False,
    chosen_only: Annotated[
        bool, typer.Option("--chosen-only", help="Only the configuration that decodes use.")
    ] = False,
    processes: Annotated[int, typer.Option(help="That compile and check.")] = 14,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Time the formulations of absorbed cross-attention."""
    precision = half_dtype(dtype)
    require_cuda()
    sizes = size or ([1024, 1280] if quick else list(ABSORBED_HEADS))
    batches = batch or ([32, 128] if quick else [8, 32, 64, 128])
    capability = torch.cuda.get_device_capability()
    chosen = {d: choose_config(ABSORBED_HEADS[d], d, precision, capability) for d in sizes}
    tried = {d: () if chosen_only else ABSORBED_CONFIGS[d] for d in sizes}
    configs = {d: tuple(dict.fromkeys((*tried[d], chosen[d]))) for d in sizes}
    jobs = [(d, config) for d in sizes for config in configs[d]]
    checks = check_all_absorbed(jobs, batches, precision, processes)
    rate = measure_ceilings("cuda", dtype).bytes_per_second
    console.print(f"{torch.cuda.get_device_name()}: copy {rate / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    around: list[dict[str, Any]] = []
    for d in sizes:
        for one_batch in batches:
            case = AbsorbedCase(d, one_batch, precision)
            for config in configs[d]:
                for splits in splits_to_try(one_batch, quick or chosen_only):
                    error, failure = checks[d, config]
                    row = {"kernel": "attention", "d": d, "batch": one_batch, "splits": splits}
                    row |= {"config": asdict(config), "chosen": config == chosen[d]}
                    row |= {"error": error, "failure": failure}
                    row |= {"microseconds": None, "share_of_copy": None}
                    rows.append(row)
                    if failure is not None:
                        continue
                    try:
                        row["microseconds"] = case.time_attention(config, splits)
                        row["share_of_copy"] = case.bytes / rate * 1e6 / row["microseconds"]
                    except Exception as raised:  # what the GPU cannot run is a result, too
                        row["failure"] = failure_of(raised)
            around.append(case.measure_around())
    show_absorbed(rows)
    for entry in around:
        console.print("before and after: " + ", ".join(f"{k} {v}" for k, v in entry.items()))
    document = {"dtype": dtype, "copy_bytes_per_second": rate}
    write_json(output, "cuda", commit, document | {"attention": rows, "around": around})


app = app_of(__doc__, backends, encoder, absorbed)

if __name__ == "__main__":
    app()
