"""Time calls of `generate`, and their parts.

    python benchmarks/generate.py cpu --output benchmarks/results/cpu.json
    python benchmarks/generate.py start-up --output benchmarks/results/start-up-h100.json
    python benchmarks/generate.py cpu-step --output benchmarks/results/cpu-step.json
    python benchmarks/generate.py step --checkpoint tiny --batch 1 --batch 32

`cpu`: whole calls of stock Transformers and of this package on a CPU, in processes of their own
(for their peaks of memory) that take turns. Float32, real weights, one recording, cut or padded
with silence; the time is from log-mel features to token ids.

`start-up`: the first token after loading, with an empty cache of compiled kernels (cold), with the
one of the process before (warm), and by stock Transformers. Every measurement is a process of its
own with random weights. The time is from the loaded model to the token on the host, without imports
and weights.

`cpu-step`: one decode step on a CPU, of weights as a model has them and as `packing` lays them out,
beside the time that its bytes need at the read bandwidth measured there.

`step`: one decode step kernel by kernel on a CUDA GPU. All launches of a kernel in one step (one
per layer, each with its own weights) are replayed as one CUDA graph; rows also have the time of the
whole step, and the floor given by its bytes at the measured copy bandwidth.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _harness import (
    CPU,
    Commit,
    Output,
    Threads,
    app_of,
    graph_microseconds,
    one_of,
    print_rows,
    require_cuda,
    seconds_of,
    write_json,
)
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE
from whisper_flash_attention.benchmark.measure import measure_ceilings, peak_rss
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.roofline import Workload, step_seconds
from whisper_flash_attention.benchmark.settings import DECODER_LAYERS, MODEL_SIZES, Setting
from whisper_flash_attention.engine import cuda_decoder, triton_layers
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.layout import Arena, DecodeState, layout_for, state_bytes
from whisper_flash_attention.engine.logits_processors import KernelProcessors, LogitsProcessors
from whisper_flash_attention.engine.packing import PRECISIONS, pack
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.sampling import GreedyChooser
from whisper_flash_attention.engine.torch_decoder import TorchDecoder
from whisper_flash_attention.engine.weights import DecoderWeights, collect_weights
from whisper_flash_attention.kernels.launch import Overlap, pdl, set_pdl
from whisper_flash_attention.parity.models import load_stock
from whisper_flash_attention.weights import load_processor

OURS = "ours"
STOCK = ("eager", "sdpa")
WARM_UP_PAIRS = 2

# Of `start-up`.
CHECKPOINTS = ("tiny", "base", "small", "medium", "large-v3")

# Of `step`: short lists of launches are repeated, because starting a graph takes time, too.
LEAST_LAUNCHES = 24
STEP_PROMPT = (50258, 50259, 50359, 50363)
KERNELS = {
    triton_layers: (
        *("layer_norm", "qkv", "self_attention", "linear", "cross_attention", "absorb_query"),
        *("fold_queries", "absorbed_attention", "project_values"),
    ),
    cuda_decoder: ("logits", "greedy_sample"),
}


# --- whole calls on a CPU ------------------------------------------------------------------------


def read_samples(recording: Path | None, seconds: float) -> np.ndarray:
    """Float32 samples of exactly `seconds`: the recording, or the bundled ones one after another.

    Longer ones are cut, shorter ones get silence at the end.
    """
    paths = [recording] if recording else [clip.path for clip in bundled_recordings()]
    size = round(seconds * SAMPLING_RATE)
    samples = np.concatenate([load_audio(path) for path in paths])[:size]
    return np.pad(samples, (0, size - samples.size))


def load_model(source: str, system: str) -> Any:
    """Float32 model of `system`: "ours", or stock with that attention."""
    if system == OURS:
        kind = WhisperFlashAttentionForConditionalGeneration
        return kind.from_pretrained(source, dtype=torch.float32).eval()
    return load_stock(source, torch.float32, attention=system).eval()


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return peak_rss() * 1e9 / 2**20


def serve_calls(
    connection: Connection, source: str, system: str, features: np.ndarray, threads: int
) -> None:
    """In a process of its own: load, then one call for every message that is true."""
    torch.set_num_threads(threads)
    model = load_model(source, system)
    inputs = torch.from_numpy(features)
    connection.send(peak_mib())
    while connection.recv():
        start = time.perf_counter()
        ids = model.generate(inputs)
        seconds = time.perf_counter() - start
        connection.send((seconds, ids[0].tolist()))
    connection.send(peak_mib())


class Worker:
    """A system in its process."""

    def __init__(self, source: str, system: str, features: np.ndarray, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, source, system, features, threads)
        self.process = context.Process(target=serve_calls, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.loaded_mib: float = self.connection.recv()

    def call(self) -> tuple[float, list[int]]:
        """Generate once: seconds and ids."""
        self.connection.send(True)
        seconds, ids = self.connection.recv()
        return seconds, ids

    def stop(self) -> float:
        """End the process; its peak of resident memory in MiB."""
        self.connection.send(False)
        peak: float = self.connection.recv()
        self.process.join()
        return peak


def ratios(stock: list[float], ours: list[float]) -> dict[str, float]:
    """Our time over stock's: the ratio of medians, and the median ratio of pairs of calls."""
    return {
        "ratio_of_medians": median(ours) / median(stock),
        "median_of_ratios": median(ours / stock for ours, stock in zip(ours, stock, strict=True)),
    }


def compare(
    source: str, system: str, samples: np.ndarray, threads: int, pairs: int
) -> dict[str, Any]:
    """Measure stock with attention `system` and ours in turns, after `WARM_UP_PAIRS` of calls.

    Seconds are in the order of the turns, peaks of resident memory in MiB: `loaded` when the model
    was loaded, `peak` at the end.
    """
    inputs = load_processor(source)(samples, sampling_rate=SAMPLING_RATE, return_tensors="np")
    workers = [Worker(source, name, inputs.input_features, threads) for name in (system, OURS)]
    turns = [[worker.call() for worker in workers] for _ in range(WARM_UP_PAIRS + pairs)]
    stock, ours = ([turn[each][0] for turn in turns[WARM_UP_PAIRS:]] for each in (0, 1))
    return {
        "model": source,
        "system": system,
        "stock_seconds": stock,
        "our_seconds": ours,
        "stock_loaded_mib": workers[0].loaded_mib,
        "our_loaded_mib": workers[1].loaded_mib,
        "stock_peak_mib": workers[0].stop(),
        "our_peak_mib": workers[1].stop(),
        "tokens": len(turns[0][0][1]),
        "ids_equal": all(theirs == found for (_, theirs), (_, found) in turns),
        **ratios(stock, ours),
    }


def cpu(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Stock's attention; repeatable.")] = None,
    recording: Annotated[Path | None, typer.Option(help="Default: the bundled speech.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=30)] = 10.0,
    threads: Threads = 2,
    pairs: Annotated[int, typer.Option(min=1)] = 7,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Compare whole calls with those of stock Transformers on a CPU."""
    systems = system or ["eager"]
    one_of("system", systems, STOCK)
    samples = read_samples(recording, seconds)
    rows = [
        compare(source, name, samples, threads, pairs)
        for source in model or ["package:tiny.en", "package:base"]
        for name in systems
    ]
    columns: dict[str, Any] = {
        "model": "{model} ({system})",
        "stock, s": lambda row: f"{median(row['stock_seconds']):.3f}",
        "ours, s": lambda row: f"{median(row['our_seconds']):.3f}",
        "ours/stock": "{ratio_of_medians:.2f}",
        "by pairs": "{median_of_ratios:.2f}",
        "stock MiB": "{stock_peak_mib:.0f}",
        "ours MiB": "{our_peak_mib:.0f}",
        "tokens": "{tokens}",
        "ids": lambda row: "equal" if row["ids_equal"] else "DIFFER",
    }
    print_rows("whole generate, medians, CPU, float32", rows, columns)
    torch.set_num_threads(threads)  # which the environment records
    document = {"dtype": "float32", "recording": recording.name if recording else "bundled"}
    write_json(output, "cpu", commit, document | {"seconds": seconds, "rows": rows})


# --- the first token -----------------------------------------------------------------------------


def random_model(kind: Any, checkpoint: str, layers: int, device: str) -> Any:
    """Random weights of a checkpoint's size, float32 on a CPU and float16 elsewhere."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    return build_model(kind, MODEL_SIZES[checkpoint], layers, device=device, dtype=dtype)


def first_token(checkpoint: str, batch: int, stock: bool, device: str) -> float:
    """Seconds of the first `generate` in this process."""
    size = MODEL_SIZES[checkpoint]
    kind = (
        WhisperForConditionalGeneration if stock else WhisperFlashAttentionForConditionalGeneration
    )
    model = random_model(kind, checkpoint, size.decoder_layers, device)
    features = torch.randn(batch, size.mel_bins, 3000, device=device, dtype=model.dtype)
    features.sum().item()
    start = time.perf_counter()
    model.generate(features, max_new_tokens=1, do_sample=False).cpu()
    return time.perf_counter() - start


def first_token_in_process(
    checkpoint: str, batch: int, stock: bool, device: str, cache: str
) -> float:
    """`first_token` in a fresh process with this folder as Triton's cache."""
    command = [sys.executable, __file__, "start-up", "--checkpoint", checkpoint]
    command += ["--batch", str(batch), "--device", device, "--child", "stock" if stock else OURS]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise typer.BadParameter(f"{checkpoint}, batch {batch}: {done.stderr.strip()[-800:]}")
    return float(done.stdout.strip().splitlines()[-1])


def measure_start_up(checkpoint: str, batch: int, device: str) -> dict[str, Any]:
    """Seconds to the first token of a checkpoint: ours cold and warm, and stock's."""

    def measure(stock: bool, cache: str) -> float:
        return first_token_in_process(checkpoint, batch, stock, device, cache)

    with tempfile.TemporaryDirectory() as cache:
        times = {name: measure(False, cache) for name in ("cold", "warm")}
    return {"checkpoint": checkpoint, "batch": batch, **times, "stock": measure(True, "")}


def start_up(
    checkpoint: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    commit: Commit = None,
    output: Output = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time the first token after loading, with a cold and with a warm cache of kernels."""
    checkpoints, batches = checkpoint or list(CHECKPOINTS), batch or [1, 32]
    one_of("checkpoint", checkpoints, MODEL_SIZES)
    if child:
        print(first_token(checkpoints[0], batches[0], child == "stock", device))
        return
    rows = [measure_start_up(name, size, device) for name in checkpoints for size in batches]
    columns = {"checkpoint": "{checkpoint}", "batch": "{batch}"}
    columns |= {f"{name}, s": f"{{{name}:.2f}}" for name in ("cold", "warm", "stock")}
    print_rows("first token", rows, columns)
    write_json(output, device, commit, {"rows": rows})


# --- a decode step on a CPU ----------------------------------------------------------------------

STEPS, ROUNDS = 30, 3
READ_MIB = 256
# Token ids and a state of the encoder do not affect the time of a step.
CPU_PROMPT = (50257, 50362)


def read_bandwidth() -> float:
    """Bytes per second at which all threads read memory, the best of some rounds."""
    numbers = torch.ones(READ_MIB * 2**18)
    return numbers.nbytes / min(seconds_of(lambda: numbers.sum()) for _ in range(12))


def step_bytes(weights: DecoderWeights, width: int) -> int:
    """Bytes that a step reads: all weights that it multiplies by, cross keys and values.

    Args:
        width: bytes of a weight.
    """
    sizes = [len(weights.embedding) * weights.width]
    for layer in weights.layers:
        # Self-attention's four, the query and the output of cross-attention.
        sizes += [6 * weights.width**2, layer.fc1.weight.numel(), layer.fc2.weight.numel()]
    cross = len(weights.layers) * 2 * 1500 * weights.width * 4
    return width * sum(sizes) + cross


def measure_cpu_step(weights: DecoderWeights, rows: int) -> float:
    """Seconds of a step of `rows` rows with its choice of tokens: the median of all rounds."""
    states = torch.randn(rows, 1500, weights.width)
    prompt = torch.tensor([CPU_PROMPT] * rows)
    length = len(CPU_PROMPT) + STEPS
    request = Request(LogitsProcessors(), length, (), 50256, want_logprobs=True)
    layout = layout_for(weights, states, prompt, request)
    decoder = TorchDecoder(weights, DecodeState.allocate(layout, Arena(CPU, state_bytes(layout))))
    chooser = GreedyChooser(KernelProcessors(suppress=tuple(range(90))), len(weights.embedding))
    times: list[float] = []
    for _ in range(ROUNDS):
        logits = decoder.start(states, prompt)
        history = [list(CPU_PROMPT) for _ in range(rows)]
        for _ in range(STEPS):
            start = time.perf_counter()
            tokens, _ = chooser.choose(logits, history)
            logits = decoder.advance(torch.tensor(tokens))
            times.append(time.perf_counter() - start)
    return median(times)


def cpu_step(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    threads: Threads = 2,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Time one decode step on a CPU beside what its bytes need."""
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    found = []
    with torch.no_grad():
        for source in model or ["package:tiny.en", "package:base"]:
            plain = collect_weights(load_model(source, OURS))
            layouts = {"as the model has them": plain}
            layouts |= {precision: pack(plain, precision) for precision in PRECISIONS}
            for count in rows or (1, 8):
                for name, weights in layouts.items():
                    took = measure_cpu_step(weights.decoder, count)
                    floors = {
                        f"floor_{width}_bytes": step_bytes(plain.decoder, width) / bandwidth
                        for width in (4, 2, 1)
                    }
                    found.append(
                        {"model": source, "weights": name, "rows": count, "seconds": took} | floors
                    )
    columns: dict[str, Any] = {
        "model": "{model}",
        "weights": "{weights}",
        "rows": "{rows}",
        "ms": lambda row: f"{row['seconds'] * 1e3:.2f}",
        "floor, ms: float32": lambda row: f"{row['floor_4_bytes'] * 1e3:.2f}",
        "float16": lambda row: f"{row['floor_2_bytes'] * 1e3:.2f}",
        "int8": lambda row: f"{row['floor_1_bytes'] * 1e3:.2f}",
        "step / float32's floor": lambda row: f"{row['seconds'] / row['floor_4_bytes']:.2f}",
    }
    print_rows(f"a decode step, {bandwidth / 1e9:.1f} GB/s read", found, columns)
    write_json(output, "cpu", commit, {"read_bandwidth": bandwidth, "rows": found})


# --- a decode step kernel by kernel --------------------------------------------------------------


STEP_COLUMNS: dict[str, Any] = {
    "kernel": "{kernel}",
    "launches": "{launches}",
    "us": "{microseconds:.1f}",
    "us each": lambda part: f"{part['microseconds'] / part['launches']:.2f}",
}
Calls = dict[str, list[Callable[[], None]]]


@contextmanager
def recorded_calls(calls: Calls) -> Iterator[None]:
    """Record every kernel launch of the engine under a label, and launch it as well."""
    originals = [
        (module, name, getattr(module, name)) for module in KERNELS for name in KERNELS[module]
    ]
    for module, name, original in originals:
        setattr(module, name, _recording(name, original, calls))
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _recording(name: str, original: Any, calls: Calls) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        label = name
        if name == "linear":
            n, k = args[1].shape
            extras = [
                extra
                for extra in ("norm_weight", "gelu", "residual")
                if kwargs.get(extra) is not None and kwargs.get(extra) is not False
            ]
            label = f"linear {k} to {n} {' '.join(extras)}".replace("norm_weight", "norm")
        overlap = Overlap(pdl(torch.device("cuda", torch.cuda.current_device()))["PDL"])

        def again() -> None:
            set_pdl(overlap)
            original(*args, **kwargs)

        calls.setdefault(label, []).append(again)

    return call


def time_launches(runs: list[Callable[[], None]]) -> float:
    """Microseconds of these launches."""
    repeats = -(-LEAST_LAUNCHES // len(runs))
    per_call = graph_microseconds(lambda i: runs[i % len(runs)](), repeats * len(runs), 20)
    return per_call * len(runs)


def measure_step(
    checkpoint: str, layers: int, batch: int, tokens: int, cross_attention: str, overlap: bool
) -> list[dict[str, Any]]:
    """Time the kernels of one step in the middle of a decode of `tokens` new tokens.

    A row per kernel: its launches per step, and microseconds for all of them.
    """
    triton_layers.OVERLAPPED_SLOTS = batch if overlap else 0
    model = random_model(WhisperFlashAttentionForConditionalGeneration, checkpoint, layers, "cuda")
    engine = Engine.of(model)
    states = torch.randn(batch, 1500, MODEL_SIZES[checkpoint].d_model, device="cuda").half()
    prompt = torch.tensor([STEP_PROMPT] * batch, device="cuda")
    length = len(STEP_PROMPT) + tokens
    request = Request(LogitsProcessors(), length, (), 50257, cross_attention=cross_attention)
    engine.decode(states, prompt, request)
    (decoder,) = engine._buffers._decoders.values()
    state = decoder._state
    state.finished.zero_()
    state.positions.fill_(len(STEP_PROMPT) + tokens // 2)
    calls: Calls = {}
    with recorded_calls(calls):
        decoder._one_step(50257)
    whole = graph_microseconds(lambda _: decoder._one_step(50257), 1, 20)
    parts = [("whole step", sum(map(len, calls.values())), whole)]
    parts += [(label, len(runs), time_launches(runs)) for label, runs in calls.items()]
    form = "absorbed" if state.layout.absorbed else "projected"
    common = {"checkpoint": checkpoint, "layers": layers, "batch": batch, "cross_attention": form}
    return [
        common
        | {"overlap": overlap, "kernel": kernel, "launches": launches, "microseconds": microseconds}
        for kernel, launches, microseconds in parts
    ]


def step(
    checkpoint: Annotated[list[str] | None, typer.Option(help="Sizes; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Clips; repeatable.")] = None,
    tokens: Annotated[
        int, typer.Option(help="New tokens of the decode that the step is in the middle of.")
    ] = 256,
    cross_attention: Annotated[list[str] | None, typer.Option(help="Forms; repeatable.")] = None,
    overlap: Annotated[
        bool | None, typer.Option(help="Layers' kernels overlap their successors; else both ways.")
    ] = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time one decode step kernel by kernel on a CUDA GPU."""
    require_cuda()
    ceilings = measure_ceilings("cuda", "float16")
    parts: list[dict[str, Any]] = []
    for size in checkpoint or ("tiny", "medium"):
        layers = DECODER_LAYERS[size][0]
        for clips in batch or (1, 32):
            work = Workload.of(MODEL_SIZES[size], layers, Setting("", clips, tokens, 1), "float16")
            for form in cross_attention or ("projected", "absorbed"):
                floor = step_seconds(work, ceilings, 4 + tokens // 2, absorbed=form == "absorbed")
                for overlaps in (False, True) if overlap is None else (overlap,):
                    found = measure_step(size, layers, clips, tokens, form, overlaps)
                    parts += found
                    title = f"{size} {layers}, batch {clips}, {form}, overlap {overlaps}"
                    print_rows(f"{title}: floor {floor * 1e6:.0f} us", found, STEP_COLUMNS)
    write_json(output, "cuda", commit, {"parts": parts})


app = app_of(__doc__, cpu, start_up, cpu_step, step)

if __name__ == "__main__":
    app()
