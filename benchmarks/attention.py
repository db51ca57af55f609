"""Time attention on Whisper's sizes.

    python benchmarks/attention.py backends --output benchmarks/results/attention-h100.json
    python benchmarks/attention.py encoder --output benchmarks/results/encoder-attention-h100.json
    python benchmarks/attention.py absorbed --output benchmarks/results/absorbed-h100.json

`backends`: every attention back-end on the four attention shapes of Whisper, as a decode loop pays
for it: many calls in a row, one synchronisation at the end, host overhead included. `encoder`:
self-attention of whole sequences by configuration, beside PyTorch's cuDNN and FlashAttention-2.
`absorbed`: the formulations of absorbed cross-attention by configuration, beside the time in which
the device copies as many bytes as the encoder states have. What does not compile, does not fit the
device or is too inaccurate gets no time, but the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
    print_table,
    relative_error,
    require_cuda,
    write_json,
)
from torch import Tensor

from whisper_flash_attention.benchmark.measure import measure_ceilings, synchronize
from whisper_flash_attention.flash_attention import AttentionInputs, attend, backend_names, explain
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
from whisper_flash_attention.kernels.encoder_attention import Config, attention, choose
from whisper_flash_attention.kernels.launch import compiling

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
    768: (C("rows", 16, 16, 4, 3), C("wgmma", 16, 64, 4, 2)),
    1024: (C("rows", 16, 16, 4, 3), C("rows", 16, 32, 4, 3)),
    1280: (
        C("rows", 32, 16, 8, 3), C("rows", 32, 32, 8, 2), C("rows", 32, 16, 16, 4),
        C("rows", 10, 16, 4, 2), C("rows", 10, 16, 4, 3), C("rows", 10, 16, 8, 2),
        C("rows", 10, 32, 4, 2), C("wgmma", 10, 64, 8, 1),
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


def seconds_per_call(shape: Shape, sets: list, backend: str, calls: int) -> float:
    """Median of five runs of `calls` calls, after an untimed run."""
    device = sets[0][0].device
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for step in range(calls):
            call_backend(shape, step, sets[step % len(sets)], backend)
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return median(times[1:])


def measure_backends(
    shape: Shape, batch: int, size: str, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    sets = backend_inputs(shape, batch, HEADS[size], device, dtype)
    q, k, v = sets[0]
    inputs = AttentionInputs(q, k[:, : shape.kv_len], v[:, : shape.kv_len], causal=shape.causal)
    reasons = explain(inputs.problem)
    is_heavy = shape.q_len > 1000 and batch > 1
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
            calls = 16 if is_heavy else 128
            row["microseconds"] = 1e6 * seconds_per_call(shape, sets, backend, calls)
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
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault((row["case"], row["size"], row["batch"]), {})
        if "microseconds" in row:
            line[row["backend"]] = f"{row['microseconds']:.1f}"
    names = backend_names()
    lines = [(*key, *(found.get(name) for name in names)) for key, found in cells.items()]
    print_table("microseconds per call", ("case", "size", "batch", *names), lines)
    write_json(output, device, commit, {"dtype": dtype, "rows": rows})


# --- self-attention of the encoder ---------------------------------------------------------------

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


@dataclass
class EncoderRow:
    """One implementation on one shape: a time, or the reason why there is none.

    Operations are counted as 4 B H L L 64: two products, no softmax.
    """

    heads: int
    batch: int
    name: str
    config: Config | None = None
    chosen: bool = False
    error: float | None = None
    failure: str | None = None
    microseconds: float | None = None
    tflops: float | None = None


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


def fused_inputs(heads: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v [B, L, H, 64] as slices of one buffer, as a fused projection writes them."""
    shape = (batch, POSITIONS, 3, heads, HEAD_DIM)
    return torch.randn(shape, device="cuda", dtype=dtype).unbind(2)


class EncoderCase:
    """Sets of inputs of one shape."""

    def __init__(self, heads: int, batch: int, dtype: torch.dtype) -> None:
        self.flops = 4 * batch * heads * POSITIONS**2 * HEAD_DIM
        size = 3 * batch * POSITIONS * heads * HEAD_DIM * dtype.itemsize
        sets = cold_sets(size, ENCODER_COLD_BYTES)
        self.inputs = [fused_inputs(heads, batch, dtype) for _ in range(sets)]
        self.out = torch.empty_like(self.inputs[0][0], memory_format=torch.contiguous_format)
        self.expected = self._reference(*self.inputs[0])

    def _reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in float32, one sequence at a time: scores of all at once would not fit."""
        out = torch.empty(q.shape, device=q.device)
        for one_q, one_k, one_v, one_out in zip(q, k, v, out, strict=True):
            scores = torch.einsum("lhd,mhd->hlm", one_q.float(), one_k.float()).mul_(SCALE)
            one_out.copy_(torch.einsum("hlm,mhd->lhd", scores.softmax(-1), one_v.float()))
        return out

    def error_of(self, call: Call) -> float:
        self.out.fill_(float("nan"))
        result = call(*self.inputs[0], self.out)
        return relative_error((self.out if result is None else result).float(), self.expected)

    def microseconds(self, call: Call) -> float:
        sets = len(self.inputs)
        wanted = min(MOST_CALLS, REPLAY_SECONDS * EXPECTED_FLOPS / self.flops)
        calls = max(1, round(wanted / sets)) * sets
        return graph_microseconds(lambda i: call(*self.inputs[i % sets], self.out), calls, 9)


def compile_encoder(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Compile all kernels in parallel; a failure is reported where its kernel is measured."""
    with compiling(ignore_errors=True):
        for heads, batch in shapes:
            q, k, v = fused_inputs(heads, batch, dtype)
            for config in encoder_configs(batch, heads):
                call_of(config)(q, k, v, torch.empty_like(q, memory_format=torch.contiguous_format))


def measure_encoder(heads: int, batch: int, dtype: torch.dtype) -> list[EncoderRow]:
    """A row per configuration and then per baseline."""
    case, chosen = EncoderCase(heads, batch, dtype), choose(batch, heads, POSITIONS)
    todo = [
        (EncoderRow(heads, batch, config_name(config), config, config == chosen), call_of(config))
        for config in encoder_configs(batch, heads)
    ]
    todo += [(EncoderRow(heads, batch, name), call) for name, call in BASELINES.items()]
    for row, call in todo:
        measure_kernel(
            row,
            lambda call=call: case.error_of(call),  # type: ignore[misc]
            lambda call=call: case.microseconds(call),  # type: ignore[misc]
            TOLERANCE[dtype],
        )
        if row.microseconds is not None:
            row.tflops = case.flops / row.microseconds / 1e6
    return [row for row, _ in todo]


def show_encoder(rows: list[EncoderRow]) -> None:
    """Print the best rows of one shape, the chosen one, those that failed, then PyTorch's."""
    timed = [row for row in rows if row.config and row.microseconds is not None]
    timed.sort(key=lambda row: row.microseconds or 0.0)
    shown = timed[:BEST] + [row for row in timed[BEST:] if row.chosen]
    shown += [row for row in rows if row.config and row.microseconds is None]
    lines = []
    for row in shown + [row for row in rows if not row.config]:
        name = row.name + (" *" if row.chosen else "")
        if row.microseconds is None:
            lines.append((name, None, None, (row.failure or "")[:60]))
        else:
            numbers = f"{row.microseconds:.1f}", f"{row.tflops:.0f}", f"{row.error:.1e}"
            lines.append((name, *numbers))
    columns = ("implementation", "microseconds", "TFLOP/s", "error")
    print_table(f"{rows[0].heads} heads, batch {rows[0].batch}; * is chosen", columns, lines)


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
    rows: list[EncoderRow] = []
    for shape in shapes:
        found = measure_encoder(*shape, precision)
        show_encoder(found)
        rows += found
    document = {"dtype": dtype, "length": POSITIONS, "rows": [asdict(row) for row in rows]}
    write_json(output, "cuda", commit, document)


# --- absorbed cross-attention --------------------------------------------------------------------


@dataclass
class AbsorbedRow:
    """One configuration with one number of splits: a time, or the reason why there is none."""

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
            except Exception as raised:  # the process crashed, as a miscompiled kernel may have it
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
        parts, stats = workspace(self.batch, self.d, splits, self.dtype)

        def launch(i: int) -> None:
            absorbed_attention(
                self.queries, self.states[i], parts, stats, splits=splits, config=config
            )

        return self._time(launch, self.sets)

    def launches_around(self, splits: int, layers: int) -> dict[str, Callable[[int], None]]:
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

    def measure_around(self) -> dict[str, Any]:
        """Microseconds of `absorb_query` and `project_values` in their default configuration."""
        entry: dict[str, Any] = {"d": self.d, "batch": self.batch}
        layers = cold_sets(2 * self.d**2 * self.dtype.itemsize, ABSORBED_COLD_BYTES, least=2)
        try:
            launches = self.launches_around(choose_splits(self.batch, POSITIONS), layers)
            times = {name: self._time(launch, layers) for name, launch in launches.items()}
        except Exception as raised:  # a kernel that cannot run is a result, too
            return entry | {"failure": failure_of(raised)}
        return entry | {name: round(time, 2) for name, time in times.items()}

    def measure(self, row: AbsorbedRow, copy_bytes_per_microsecond: float) -> None:
        """Set the times of a row, or why there are none."""
        try:
            row.microseconds = self.time_attention(row.config, row.splits)
            row.share_of_copy = self.bytes / copy_bytes_per_microsecond / row.microseconds
        except Exception as raised:  # a configuration that the GPU cannot run is a result, too
            row.failure = failure_of(raised)


def splits_to_try(batch: int, only_chosen: bool) -> list[int]:
    """The chosen number of splits, half and double."""
    chosen = choose_splits(batch, POSITIONS)
    if only_chosen:
        return [chosen]
    return sorted({max(1, chosen // 2), chosen, min(MOST_SPLITS, chosen * 2)})


def show_absorbed(rows: list[AbsorbedRow]) -> None:
    """Print, per D, configurations by batches, with the best number of splits each."""
    for d in dict.fromkeys(row.d for row in rows):
        found = [row for row in rows if row.d == d]
        batches = list(dict.fromkeys(row.batch for row in found))
        lines = []
        for name in dict.fromkeys(row.name for row in found):
            same = [row for row in found if row.name == name]
            cells: list[str | None] = []
            for batch in batches:
                timed = [r for r in same if r.batch == batch and r.microseconds is not None]
                best = min(timed, key=lambda r: r.microseconds or 0.0, default=None)
                share = 100 * (best.share_of_copy or 0) if best else 0
                cells.append(best and f"{best.microseconds:.1f} ({share:.0f}%, {best.splits})")
            note = same[0].failure or f"{same[0].error:.1e}"
            lines.append((name + (" *" if same[0].chosen else ""), *cells, note[:50]))
        title = f"D {d}: microseconds (% of copy bandwidth, splits); * is chosen"
        print_table(title, ("configuration", *map(str, batches), "error"), lines)


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
    rows: list[AbsorbedRow] = []
    around: list[dict[str, Any]] = []
    for d in sizes:
        for one_batch in batches:
            case = AbsorbedCase(d, one_batch, precision)
            for config in configs[d]:
                for splits in splits_to_try(one_batch, quick or chosen_only):
                    is_chosen, check = config == chosen[d], checks[d, config]
                    row = AbsorbedRow("attention", d, one_batch, splits, config, is_chosen, *check)
                    if row.failure is None:
                        case.measure(row, rate / 1e6)
                    rows.append(row)
            around.append(case.measure_around())
    show_absorbed(rows)
    for entry in around:
        console.print("before and after: " + ", ".join(f"{k} {v}" for k, v in entry.items()))
    document = {"dtype": dtype, "copy_bytes_per_second": rate}
    document |= {"attention": [asdict(row) for row in rows], "around": around}
    write_json(output, "cuda", commit, document)


app = app_of(__doc__, backends, encoder, absorbed)

if __name__ == "__main__":
    app()
