"""Account for the memory of a GPU that a call of `generate` takes, of stock and of this package.

    python benchmarks/memory.py rows --jobs 8 --output rows.json
    python benchmarks/memory.py rows --row tiny:4 --variant all --output variants.json
    python benchmarks/memory.py release --output release.json

Every account is a fresh process. It notes, phase by phase, what the driver counts (for the process
and for the device), what PyTorch's allocator reserves and hands out, and whose the reserved memory
is. What the driver counts beyond context and reserved memory is attributed by events: the loading
of a kernel of Triton, the instantiation and the first launch of a CUDA graph, and else the first
calls of encoder and decoder: modules of PyTorch and cuBLAS, streams, local memory of kernels.

`rows`: stock and this package at batch 1, and variants of this package that should take less.
`release`: this package after a large batch and `Engine.release`, beside a fresh process at batch 1.

A row is printed as soon as its process ends, and a process that takes longer than `--limit` ends as
a failure. The first process of a width compiles its kernels, ten seconds and more where Triton's
cache is empty; processes that run side by side compile the same ones.
"""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Annotated, Any

import torch
import typer
from _harness import (
    Commit,
    Output,
    app_of,
    console,
    one_of,
    print_rows,
    require_cuda,
    seconds_of,
    write_json,
)

from whisper_flash_attention.benchmark.environment import driver_memory
from whisper_flash_attention.benchmark.processes import ProcessFailed, start_workers
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.settings import (
    DECODER_LAYERS,
    DEFAULT_CHECKPOINTS,
    MODEL_SIZES,
)
from whisper_flash_attention.benchmark.systems import FLASH, SYSTEMS, greedy

MB = 1e6
DEVICE = torch.device("cuda", 0)
# Resident threads of a multiprocessor, all of which local memory is reserved for.
THREADS = 2048


@dataclass(frozen=True)
class Variant:
    """A way to run this package, and what it should save.

    Args:
        reason: what it takes away.
        environment: set before CUDA is initialised.
        allocator: settings of PyTorch's allocator.
        options: read by `Account.load` and `Account.patch`.
    """

    reason: str
    environment: dict[str, str] = field(default_factory=dict)
    allocator: str | None = None
    options: tuple[str, ...] = ()


AS_IT_IS = "as it is"
DEFAULT_ROWS = [f"{name}:{n}" for name in DEFAULT_CHECKPOINTS for n in DECODER_LAYERS[name]]
CUBLAS = "cuBLAS"
VARIANTS = {
    AS_IT_IS: Variant("nothing"),
    CUBLAS: Variant(
        "less than nothing, if not time: products of few clips and narrow models by cuBLAS, too",
        options=("cublas",),
    ),
    "cuBLAS 2 MiB": Variant(
        "65 MB of cuBLAS's handle and 31 MB of PyTorch's workspace for each stream",
        environment={"CUBLAS_WORKSPACE_CONFIG": ":2048:1"},
    ),
    "absorbed": Variant(
        "projected keys and values, less one clip's states: 144 MB of medium 24",
        options=("absorbed",),
    ),
    "expandable segments": Variant(
        "the rounding of segments: up to 20 MB a pool", allocator="expandable_segments:True"
    ),
}


@dataclass(frozen=True)
class Task:
    """What one process runs."""

    checkpoint: str
    layers: int
    system: str
    variant: str = AS_IT_IS
    batch: int = 1
    new_tokens: int = 25
    calls: int = 10
    # Clips and new tokens of a call that is made, and released, before the others.
    before: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        return f"{self.checkpoint} {self.layers} {self.system}, {self.variant}"


# --- what the driver and the allocator count -----------------------------------------------------


def used() -> dict[str, int | None]:
    """Bytes in use on the device, by CUDA, and in this process, by NVML if it tells."""
    free, total = torch.cuda.mem_get_info(DEVICE)
    counted, source = driver_memory(DEVICE)
    process = source is not None and source.startswith("process")
    return {
        "device": total - free,
        "process": round(counted * 1e9) if process and counted is not None else None,
    }


def pools_of(segments: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Reserved, allocated and free bytes by pool of an allocator's snapshot; "0:0" is the default.

    `split` are bytes of free blocks in segments that others still use: holes.
    """
    pools: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for segment in segments:
        pool = pools[":".join(map(str, segment["segment_pool_id"]))]
        pool["segments"] += 1
        pool["reserved"] += segment["total_size"]
        pool["allocated"] += segment["allocated_size"]
        pool["requested"] += segment.get("requested_size", 0)
        if segment["allocated_size"]:
            pool["holes"] += segment["total_size"] - segment["allocated_size"]
    return {name: dict(pool) for name, pool in sorted(pools.items())}


class Events:
    """Attributes what the driver counts beyond reserved memory to the events that add it."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.counts: dict[str, int] = defaultdict(int)
        self.kernels: list[dict[str, Any]] = []

    @staticmethod
    def beyond_reserved() -> int:
        free, total = torch.cuda.mem_get_info(DEVICE)
        return total - free - torch.cuda.memory_reserved(DEVICE)

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Attribute what is added within the block, but not to events within it."""
        before = self.unexplained()
        yield
        self.add(name, before)

    def unexplained(self) -> int:
        """What is not attributed yet."""
        return self.beyond_reserved() - sum(self.bytes.values())

    def add(self, name: str, before: int) -> None:
        """Attribute what was added since `unexplained` was `before`."""
        torch.cuda.synchronize()
        self.bytes[name] += self.unexplained() - before
        self.counts[name] += 1

    def install(self) -> None:
        """Watch the engine, Triton's loader and CUDA graphs from now on."""
        from whisper_flash_attention.engine.cuda_decoder import CudaDecoder
        from whisper_flash_attention.engine.triton_encoder import TritonEncoder

        self._watch_first(TritonEncoder, "run", "the encoder's first call")
        self._watch_first(CudaDecoder, "greedy", "the decoder's first call")
        self._watch_triton()
        self._watch_graphs()

    def _watch_first(self, kind: Any, method: str, name: str) -> None:
        """Attribute what the first call of a method adds."""
        call, events = getattr(kind, method), self

        def watched(*arguments: Any, **options: Any) -> Any:
            setattr(kind, method, call)
            with events.watch(name):
                return call(*arguments, **options)

        setattr(kind, method, watched)

    def _watch_triton(self) -> None:
        from triton.compiler.compiler import CompiledKernel

        load, events = CompiledKernel._init_handles, self

        def watched(kernel: Any) -> None:
            if kernel.module is not None:
                return
            with events.watch("Triton's kernels"):
                load(kernel)
            events.kernels.append(
                {
                    "name": kernel.name,
                    "cubin": len(kernel.asm.get("cubin", b"")),
                    "registers": kernel.n_regs,
                    "local_bytes": 4 * kernel.n_spills,
                    "shared": kernel.metadata.shared,
                    "warps": kernel.metadata.num_warps,
                }
            )

        CompiledKernel._init_handles = watched

    def _watch_graphs(self) -> None:
        events = self

        class Watched(torch.cuda.CUDAGraph):
            def capture_begin(self, *arguments: Any, **options: Any) -> None:
                self.before = events.unexplained()
                super().capture_begin(*arguments, **options)

            def capture_end(self) -> None:
                super().capture_end()
                events.add("graphs, instantiated", self.before)

            def replay(self) -> None:
                if getattr(self, "was_replayed", False):
                    super().replay()
                    return
                self.was_replayed = True
                with events.watch("graphs, first launch"):
                    super().replay()

        torch.cuda.CUDAGraph = Watched

    def as_json(self) -> dict[str, Any]:
        properties: Any = torch.cuda.get_device_properties(DEVICE)
        most = max((each["local_bytes"] for each in self.kernels), default=0)
        return {
            "bytes": dict(self.bytes),
            "counts": dict(self.counts),
            "kernels": self.kernels,
            "cubin_bytes": sum(each["cubin"] for each in self.kernels),
            "local_bytes_most": most,
            "local_bytes_reserved": most * THREADS * properties.multi_processor_count,
        }


class Account:
    """One process: phases, each with what is counted at its end."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.variant = VARIANTS[task.variant]
        self.events = Events()
        self.phases: list[dict[str, Any]] = []

    def note(self, phase: str) -> None:
        torch.cuda.synchronize()
        segments = torch.cuda.memory_snapshot()
        self.phases.append(
            {
                "phase": phase,
                **used(),
                "reserved": torch.cuda.memory_reserved(DEVICE),
                "allocated": torch.cuda.memory_allocated(DEVICE),
                "peak": torch.cuda.max_memory_allocated(DEVICE),
                "pools": pools_of(segments),
                "events": dict(self.events.bytes),
            }
        )

    def run(self) -> dict[str, Any]:
        os.environ.update(self.variant.environment)
        torch.cuda.init()
        torch.cuda.mem_get_info(DEVICE)  # makes the context
        if self.variant.allocator:
            torch.cuda.memory._set_allocator_settings(self.variant.allocator)
        self.note("context")
        torch.ones(1, device=DEVICE).add_(1)
        self.note("first kernel")
        generate, model = self.load()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.note("weights")
        plan = None
        if self.task.system == FLASH:
            self.events.install()
            self.patch()
            plan = self.planned(model)
        if self.task.before is not None:
            self.call(generate, *self.task.before, calls=1)
            self.note("before")
            give_back(model)
            self.note("before, released")
        seconds = self.call(generate, self.task.batch, self.task.new_tokens, self.task.calls)
        self.note("calls")
        if self.task.system == FLASH:
            give_back(model)
            self.note("calls, released")
        return {
            **asdict(self.task),
            "weights": sum(each.nbytes for each in set(model.parameters())),
            "plan": plan,
            "seconds": seconds,
            "module_loading": os.environ.get("CUDA_MODULE_LOADING"),
            "phases": self.phases,
            "events": self.events.as_json(),
        }

    def load(self) -> tuple[Callable[[torch.Tensor, int], torch.Tensor], Any]:
        """The system's `generate` and its model, as the benchmark builds it."""
        from transformers import WhisperForConditionalGeneration as Stock

        from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration as Ours

        system = SYSTEMS[self.task.system]
        size = MODEL_SIZES[self.task.checkpoint]
        model = build_model(
            Ours if system.is_ours else Stock,
            size,
            self.task.layers,
            device=DEVICE,
            dtype=torch.float16,
        )
        model.set_attn_implementation(system.attention)
        if "absorbed" in self.variant.options:
            model.cross_attention = "absorbed"
        return greedy(model, system.generate_options), model

    def patch(self) -> None:
        """Change what the variant changes in this package."""
        from whisper_flash_attention.engine import layout, triton_layers

        if "cublas" in self.variant.options:
            layout.OWN_PRODUCT_CLIPS = layout.OWN_PRODUCT_WIDTH = 0
            triton_layers.has_encoder_kernels = lambda device, dtype: False

    def call(
        self,
        generate: Callable[[torch.Tensor, int], torch.Tensor],
        size: int,
        new_tokens: int,
        calls: int,
    ) -> list[float]:
        """Two untimed calls, then the timed ones: their seconds."""
        bins = MODEL_SIZES[self.task.checkpoint].mel_bins
        generator = torch.Generator().manual_seed(0)
        host = torch.randn(size, bins, 3000, generator=generator).half().pin_memory()
        seconds = []
        for _ in range(calls + 2):
            seconds.append(seconds_of(lambda: generate(host, new_tokens), DEVICE))
        return seconds[2:]

    def planned(self, model: Any) -> dict[str, int]:
        """What `plan` computes for the calls, before them."""
        plan = model.plan(batch_size=self.task.batch, max_new_tokens=self.task.new_tokens)
        found = {name: value for name, value in asdict(plan).items() if type(value) is int}
        return found | {"total": plan.total}


def give_back(model: Any) -> None:
    """Give back what the engine and PyTorch keep."""
    gc.collect()
    model.release()


def account(task: Task) -> dict[str, Any]:
    """The account of one task, in this process, which has not used CUDA."""
    return Account(task).run()


def account_libraries() -> dict[str, Any]:
    """Memory that the driver counts for the first uses of CUDA's libraries, in this process."""
    steps: list[dict[str, Any]] = []

    def note(name: str) -> None:
        torch.cuda.synchronize()
        steps.append({"step": name, **used(), "reserved": torch.cuda.memory_reserved(DEVICE)})

    torch.cuda.init()
    torch.cuda.mem_get_info(DEVICE)
    note("context")
    a = torch.ones(1500, 1024, device=DEVICE, dtype=torch.float16)
    note("first kernel")
    torch.cuda.current_blas_handle()
    note("cuBLAS, handle")
    torch.mm(a, a[:1024].t())
    note("cuBLAS, a product")
    torch.nn.functional.linear(a, a[:1024], a[0])
    note("cuBLASLt, a product")
    side = torch.cuda.Stream()
    note("PyTorch's streams")
    with torch.cuda.stream(side):
        torch.mm(a, a[:1024].t())
    note("cuBLAS, another stream")
    q = torch.ones(1, 16, 1500, 64, device=DEVICE, dtype=torch.float16)
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
    note("SDPA")
    torch.nn.functional.conv1d(q.view(1, 1500, 1024), q.view(-1)[: 1500 * 3].view(1, 1500, 3))
    note("cuDNN, a convolution")
    torch.cuda.empty_cache()
    note("empty cache")
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    note("cleared workspaces")
    return {"steps": steps, "limits": device_limits()}


def device_limits() -> dict[str, int]:
    """The driver's limits of this context in bytes: stack, printf's buffer, heap."""
    import ctypes

    names = {0x00: "stack", 0x01: "printf", 0x02: "heap", 0x05: "persisting L2"}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    found = {}
    for number, name in names.items():
        value = ctypes.c_size_t()
        if driver.cuCtxGetLimit(ctypes.byref(value), number) == 0:
            found[name] = value.value
    return found


# --- tables --------------------------------------------------------------------------------------


def counted(phase: Mapping[str, Any]) -> int:
    """What the driver counts: of the process if it tells, else of the device."""
    value = phase["device"] if phase["process"] is None else phase["process"]
    return int(value)


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of what the driver counts after the calls, in units of 1e6 bytes.

    `context` includes a first kernel of PyTorch's; `holes` is reserved and not of the weights
    before the calls, `call` what these reserved; `outside` is what they added beyond that: handles,
    modules, graphs, streams. `peak` and `aside` are the allocator's, with and without the weights.
    """
    phases = {phase["phase"]: phase for phase in found["phases"]}
    last, weights = phases["calls"], phases["weights"]
    context = counted(phases["first kernel"]) - phases["first kernel"]["reserved"]
    plan = found["plan"] or {}
    row = {
        "driver": counted(last),
        "planned": plan.get("driver"),
        "context": context,
        "weights": found["weights"],
        "holes": weights["reserved"] - found["weights"],
        "call": last["reserved"] - weights["reserved"],
        "outside": counted(last) - last["reserved"] - context,
        "peak": last["peak"],
        "planned_peak": plan.get("total"),
        "aside": last["peak"] - found["weights"],
    }
    for name in ("before", "before, released", "calls, released"):
        row[name] = counted(phases[name]) if name in phases else None
    in_mb = {name: None if value is None else value / MB for name, value in row.items()}
    kind = {name: found[name] for name in ("checkpoint", "layers", "system", "variant", "batch")}
    return kind | in_mb | {"ms": 1e3 * median(found["seconds"]) if found["seconds"] else None}


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with shares of stock's memory, and of a fresh process's what `release` leaves.

    Each where the other row is there.
    """
    stock = {(r["checkpoint"], r["layers"], r["batch"]): r for r in rows if r["system"] == "orig"}
    fresh = {
        (r["checkpoint"], r["layers"], r["variant"]): r
        for r in rows
        if r["system"] == FLASH and r["before"] is None
    }
    for row in rows:
        other = stock.get((row["checkpoint"], row["layers"], row["batch"]))
        if other is not None and row is not other:
            row["of_driver"] = row["driver"] / other["driver"]
            row["of_aside"] = row["aside"] / other["aside"]
        own = fresh.get((row["checkpoint"], row["layers"], row["variant"]))
        if own is not None and row["before, released"] is not None:
            row["of_fresh"] = row["before, released"] / own["driver"]
        if row["planned"] is not None:
            row["plan_error"] = row["planned"] / row["driver"] - 1
    return list(rows)


COLUMNS: dict[str, Any] = {
    "row": "{checkpoint} {layers} {system}, {batch} clips, {variant}",
    "driver": "{driver:.0f}",
    "of stock": "{of_driver:.1%}",
    "aside": "{aside:.0f}",
    "of stock's": "{of_aside:.0%}",
    "plan off": "{plan_error:+.1%}",
    "released": "{calls, released:.0f}",
    "ms": "{ms:.2f}",
}
# Of `release`: what the driver counts after the calls at batch 1, after the large batch before
# them, and after its release, also as a share of the row without a large batch.
RELEASE_COLUMNS: dict[str, Any] = {
    "row": "{checkpoint} {layers}",
    "calls": "{driver:.0f}",
    "large batch": "{before:.0f}",
    "released": "{before, released:.0f}",
    "of a fresh process's calls": "{of_fresh:.1%}",
}


def run_all(
    tasks: Sequence[Task], *, with_libraries: bool, jobs: int, limit: float
) -> dict[str, Any]:
    """Accounts of all tasks, each in a process of its own, and of the libraries.

    With several `jobs` at a time only what the driver counts for a process is right: no times, and
    no events, which are read from what is in use on the device.
    """
    require_cuda()
    workers = start_workers("cuda")
    document: dict[str, Any] = {"jobs": jobs, "rows": [], "failures": []}
    if with_libraries:
        document["libraries"] = workers.call(account_libraries, timeout=limit)
        show_libraries(document["libraries"])

    def run(task: Task) -> dict[str, Any] | ProcessFailed:
        try:
            return workers.call(account, task, timeout=limit)
        except ProcessFailed as failed:
            return failed

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, task): task for task in tasks}
        for ended in as_completed(running):
            add(document, running[ended], ended.result())
    document["rows"].sort(key=lambda row: order_of(row, tasks))
    document["summary"] = compared([summary(found) for found in document["rows"]])
    return document


def add(document: dict[str, Any], task: Task, found: dict[str, Any] | ProcessFailed) -> None:
    """Add a task's account to the document, or its failure, and print it."""
    if isinstance(found, ProcessFailed):
        document["failures"].append({**asdict(task), "reason": found.reason})
        traceback = found.log.rpartition("Traceback")[2].partition("Fatal Python")[0]
        console.print(f"{task.title}: {found.reason}\n{traceback[-1500:]}", markup=False)
        return
    document["rows"].append(found)
    row = summary(found)
    parts = (f"{name} {row[name]:.0f}" for name in ("driver", "weights", "holes", "call", "aside"))
    console.print(f"{task.title}: {', '.join(parts)} MB, {row['ms']:.2f} ms", markup=False)


def order_of(row: Mapping[str, Any], tasks: Sequence[Task]) -> int:
    """The place of a row's task among the tasks."""
    return [asdict(task) for task in tasks].index({name: row[name] for name in asdict(tasks[0])})


def show_libraries(libraries: Mapping[str, Any]) -> None:
    """Print what first uses of CUDA's libraries take."""
    steps = libraries["steps"]
    beyond = [counted(step) - step["reserved"] for step in steps]
    rows = [
        step | {"driver": counted(step) / MB, "added": (now - before) / MB}
        for step, now, before in zip(steps, beyond, [0, *beyond], strict=False)
    ]
    columns = {"step": "{step}", "driver, MB": "{driver:.1f}", "beyond reserved": "{added:.1f}"}
    print_rows("first uses of libraries", rows, columns)


def show(document: Mapping[str, Any], columns: Mapping[str, Any] = COLUMNS) -> None:
    """Print the summary, and the failures."""
    title = "MB (1e6 bytes); aside: the allocator's peak beside the weights"
    failures = [row | {"ms": None, "variant": row["reason"]} for row in document["failures"]]
    print_rows(title, [*document["summary"], *failures], columns)


Jobs = Annotated[int, typer.Option(min=1, help="Processes at a time; 1 for times and events.")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds of one process.")]
Rows = Annotated[list[str] | None, typer.Option("--row", help="checkpoint:layers; repeatable.")]


def parse_rows(given: Sequence[str] | None, default: Sequence[str]) -> list[tuple[str, int]]:
    """Checkpoints and depths of "tiny:4" and the like."""
    found = []
    for text in given or default:
        checkpoint, _, layers = text.partition(":")
        one_of("row", [checkpoint], DECODER_LAYERS)
        one_of("row", [layers], [str(depth) for depth in DECODER_LAYERS[checkpoint]])
        found.append((checkpoint, int(layers)))
    return found


def rows(
    row: Rows = None,
    system: Annotated[list[str] | None, typer.Option(help="orig, sdpa, flash.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Of flash; or `all`.")] = None,
    variant_row: Annotated[
        list[str] | None, typer.Option(help="Rows that variants run; by default all.")
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Clips of a call.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of every clip.")] = 25,
    libraries: Annotated[bool, typer.Option(help="Account for CUDA's libraries, too.")] = True,
    jobs: Jobs = 1,
    limit: Limit = 60.0,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Account for stock and this package, and for variants of this package."""
    models = parse_rows(row, DEFAULT_ROWS)
    systems = system or ["orig", FLASH]
    one_of("system", systems, SYSTEMS)
    named = list(VARIANTS)[1:] if variant == ["all"] else variant or []
    one_of("variant", named, VARIANTS)
    kinds = [(model, name, AS_IT_IS) for model in models for name in systems]
    for model in parse_rows(variant_row, []) or models:
        kinds += [(model, FLASH, name) for name in named]
    tasks = [
        Task(*model, name, variant, batch=batch, new_tokens=new_tokens, calls=calls)
        for model, name, variant in kinds
    ]
    document = run_all(tasks, with_libraries=libraries, jobs=jobs, limit=limit)
    write_json(output, "cuda", commit, document)
    show(document)


def release(
    row: Rows = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips of the large call.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of the large call.")] = 256,
    jobs: Jobs = 1,
    limit: Limit = 60.0,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Compare this package after a large batch and its release with a fresh process at batch 1."""
    tasks = []
    for model in parse_rows(row, ["tiny:4", "medium:24"]):
        tasks.append(Task(*model, FLASH, calls=1))
        tasks.append(Task(*model, FLASH, calls=1, before=(batch, new_tokens)))
    document = run_all(tasks, with_libraries=False, jobs=jobs, limit=limit)
    write_json(output, "cuda", commit, document)
    show(document, RELEASE_COLUMNS)


app = app_of(__doc__, rows, release)

if __name__ == "__main__":
    app()
