"""Time calls of `generate`, and what they consist of.

    python benchmarks/generate.py cpu --output benchmarks/results/cpu.json
    python benchmarks/generate.py start-up --output benchmarks/results/start-up-h100.json
    python benchmarks/generate.py step --checkpoint tiny --batch 1 --batch 32
    python benchmarks/generate.py slots --device cuda --size large-v3 --output slots.json

`cpu`: whole calls of stock Transformers and of this package on a CPU, in processes of their own
(for their peaks of memory) that take turns. Float32, real weights, one recording, cut or padded
with silence; the time is from log-mel features to token ids.

`start-up`: the first token after loading, with an empty cache of compiled kernels (cold), with the
one that the process before left (warm), and by stock Transformers. Every measurement is a process
of its own with random weights. The time is from the loaded model to the token on the host; imports
and weights are not in it.

`step`: one decode step kernel by kernel on a CUDA GPU. All launches of a kernel in one step (one
per layer, each with its own weights) are replayed as one CUDA graph; beside their sum stand the
time of the whole step, and what its bytes need at the measured copy bandwidth.

`slots`: many clips with texts of mixed lengths, decoded batch by batch and in slots that are
refilled by several numbers of clips at a time. Random weights, random encoder states, greedy; every
clip gets a number of tokens drawn once (log-normal, as lengths of speech are). Ways of decoding
take turns; the time is from encoder states to tokens on the host.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _harness import (
    Commit,
    Output,
    Threads,
    app_of,
    graph_microseconds,
    one_of,
    print_table,
    require_cuda,
    time_in_turns,
    write_json,
)
from transformers import WhisperForConditionalGeneration

from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE
from whisper_flash_attention.benchmark.measure import measure_ceilings
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.roofline import Workload, step_seconds
from whisper_flash_attention.benchmark.settings import DECODER_LAYERS, MODEL_SIZES, Setting
from whisper_flash_attention.engine import cuda_decoder, triton_layers
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import LogitsProcessors, Suppress
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.engine.scheduler import DecodeJob
from whisper_flash_attention.kernels.launch import Overlap, pdl, set_pdl
from whisper_flash_attention.weights import load_processor, read_checkpoint

OURS = "ours"
STOCK = ("eager", "sdpa")
WARM_UP_PAIRS = 2

# Of `start-up`.
CHECKPOINTS = ("tiny", "base", "small", "medium", "large-v3")

# Of `step`: short lists of launches are repeated, for the start of a graph takes time, too.
LEAST_LAUNCHES = 24
STEP_PROMPT = (50258, 50259, 50359, 50363)
KERNELS = {
    triton_layers: (
        *("qkv", "self_attention", "linear", "cross_attention", "absorb_query"),
        *("fold_queries", "absorbed_attention", "project_values"),
    ),
    cuda_decoder: ("logits", "pick"),
}

# Of `slots`: mean and deviation of the lengths' logarithm; half of the texts have 90 tokens.
SLOTS_PROMPT = (50258, 50259, 50360)
MEAN, DEVIATION, LONGEST = 4.5, 0.5, 224


# --- whole calls on a CPU ------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One model: seconds per call in the order of the turns, peaks of resident memory in MiB.

    `loaded` is the peak when the model was loaded, `peak` that at the end.
    """

    model: str
    system: str
    stock_seconds: list[float]
    our_seconds: list[float]
    stock_loaded_mib: float
    our_loaded_mib: float
    stock_peak_mib: float
    our_peak_mib: float
    tokens: int
    ids_equal: bool

    @property
    def ratio_of_medians(self) -> float:
        """Our median time over stock's."""
        return median(self.our_seconds) / median(self.stock_seconds)

    @property
    def median_of_ratios(self) -> float:
        """The median, over the pairs of turns, of our time over stock's."""
        pairs = zip(self.our_seconds, self.stock_seconds, strict=True)
        return median(ours / stock for ours, stock in pairs)

    def as_json(self) -> dict[str, Any]:
        """Fields and both ratios."""
        ratios = {name: getattr(self, name) for name in ("ratio_of_medians", "median_of_ratios")}
        return asdict(self) | ratios


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
    options: dict[str, Any] = {"dtype": torch.float32}
    model: Any
    if system == OURS:
        model = WhisperFlashAttentionForConditionalGeneration.from_pretrained(source, **options)
        return model.eval()
    checkpoint = read_checkpoint(source)
    options["attn_implementation"] = system
    if checkpoint is None:
        return WhisperForConditionalGeneration.from_pretrained(source, **options).eval()
    options |= {"config": checkpoint.config, "state_dict": checkpoint.state_dict}
    model = WhisperForConditionalGeneration.from_pretrained(None, **options)
    model.generation_config = checkpoint.generation_config
    return model.eval()


def peak_mib() -> float:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


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


def compare(source: str, system: str, samples: np.ndarray, threads: int, pairs: int) -> Comparison:
    """Measure stock with attention `system` and ours in turns, after `WARM_UP_PAIRS` of calls."""
    processor = load_processor(source)
    inputs = processor(samples, sampling_rate=SAMPLING_RATE, return_tensors="np")
    features = inputs.input_features
    stock, ours = (Worker(source, name, features, threads) for name in (system, OURS))
    turns = [(stock.call(), ours.call()) for _ in range(WARM_UP_PAIRS + pairs)]
    timed = turns[WARM_UP_PAIRS:]
    return Comparison(
        model=source,
        system=system,
        stock_seconds=[seconds for (seconds, _), _ in timed],
        our_seconds=[seconds for _, (seconds, _) in timed],
        stock_loaded_mib=stock.loaded_mib,
        our_loaded_mib=ours.loaded_mib,
        stock_peak_mib=stock.stop(),
        our_peak_mib=ours.stop(),
        tokens=len(turns[0][0][1]),
        ids_equal=all(theirs == found for (_, theirs), (_, found) in turns),
    )


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
    columns = ("model", "stock, s", "ours, s", "ours/stock", "by pairs", "stock MiB", "ours MiB")
    lines = [
        (
            f"{row.model} ({row.system})",
            *(f"{median(each):.3f}" for each in (row.stock_seconds, row.our_seconds)),
            *(f"{ratio:.2f}" for ratio in (row.ratio_of_medians, row.median_of_ratios)),
            *(f"{peak:.0f}" for peak in (row.stock_peak_mib, row.our_peak_mib)),
            row.tokens,
            "equal" if row.ids_equal else "DIFFER",
        )
        for row in rows
    ]
    print_table("whole generate, medians, CPU, float32", (*columns, "tokens", "ids"), lines)
    torch.set_num_threads(threads)  # which the environment records
    document = {"dtype": "float32", "recording": recording.name if recording else "bundled"}
    document |= {"seconds": seconds, "rows": [row.as_json() for row in rows]}
    write_json(output, "cpu", commit, document)


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
    lines = [
        (row["checkpoint"], row["batch"], *(f"{row[n]:.2f}" for n in ("cold", "warm", "stock")))
        for row in rows
    ]
    print_table("first token", ("checkpoint", "batch", "cold, s", "warm, s", "stock, s"), lines)
    write_json(output, device, commit, {"rows": rows})


# --- a decode step kernel by kernel --------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One kernel of the step: launches per step, and microseconds for all of them."""

    checkpoint: str
    layers: int
    batch: int
    cross_attention: str
    overlap: bool
    kernel: str
    launches: int
    microseconds: float


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
) -> list[Part]:
    """Time the kernels of one step in the middle of a decode of `tokens` new tokens."""
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
    return [Part(checkpoint, layers, batch, form, overlap, *part) for part in parts]


def step(
    checkpoint: Annotated[list[str] | None, typer.Option(help="Sizes; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Clips; repeatable.")] = None,
    tokens: Annotated[
        int, typer.Option(help="New tokens of the decode that the step is in the middle of.")
    ] = 256,
    cross_attention: Annotated[list[str] | None, typer.Option(help="Forms; repeatable.")] = None,
    overlap: Annotated[
        list[bool] | None, typer.Option(help="Layers' kernels overlap their successors, or not.")
    ] = None,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time one decode step kernel by kernel on a CUDA GPU."""
    require_cuda()
    ceilings = measure_ceilings("cuda", "float16")
    parts: list[Part] = []
    for size in checkpoint or ("tiny", "medium"):
        layers = DECODER_LAYERS[size][0]
        for clips in batch or (1, 32):
            work = Workload.of(MODEL_SIZES[size], layers, Setting("", clips, tokens, 1), "float16")
            for form in cross_attention or ("projected", "absorbed"):
                floor = step_seconds(work, ceilings, 4 + tokens // 2, absorbed=form == "absorbed")
                for overlaps in overlap or (False, True):
                    found = measure_step(size, layers, clips, tokens, form, overlaps)
                    parts += found
                    title = f"{size} {layers}, batch {clips}, {form}, overlap {overlaps}"
                    lines = [
                        (
                            *(part.kernel, part.launches, f"{part.microseconds:.1f}"),
                            f"{part.microseconds / part.launches:.2f}",
                        )
                        for part in found
                    ]
                    columns = ("kernel", "launches", "us", "us each")
                    print_table(f"{title}: floor {floor * 1e6:.0f} us", columns, lines)
    write_json(output, "cuda", commit, {"parts": [asdict(part) for part in parts]})


# --- batches against slots -----------------------------------------------------------------------


def request_of(tokens: int) -> Request:
    """A request for exactly this many tokens."""
    length = len(SLOTS_PROMPT) + tokens
    return Request(LogitsProcessors((Suppress((1, 2)),)), length, (), 0, want_logprobs=True)


def mixed_jobs(clips: int, engine: Engine, distinct: int) -> list[DecodeJob]:
    """Clips with texts of mixed lengths, on `distinct` different encoder states."""
    weights = engine.weights
    generator = torch.Generator().manual_seed(0)
    drawn = (MEAN + DEVIATION * torch.randn(clips, generator=generator)).exp()
    lengths = drawn.clamp(8, LONGEST).int().tolist()
    shape = (distinct, *weights.encoder.positions.shape)
    states = torch.randn(shape, generator=generator).to(weights.device, weights.dtype)
    return [
        DecodeJob(states[number % distinct], SLOTS_PROMPT, request_of(length), number)
        for number, length in enumerate(lengths)
    ]


def by_batches(engine: Engine, jobs: list[DecodeJob], size: int) -> int:
    """Decode batch by batch, each to its longest text; the count of requested tokens."""
    tokens = 0
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        lengths = [job.request.max_length - len(SLOTS_PROMPT) for job in batch]
        prompt = torch.tensor([SLOTS_PROMPT] * len(batch), device=engine.weights.device)
        states = torch.stack([job.states for job in batch])
        rows = engine.decode(states, prompt, request_of(max(lengths))).sequences.tolist()
        texts = [
            row[len(SLOTS_PROMPT) :][:length] for row, length in zip(rows, lengths, strict=True)
        ]
        tokens += sum(map(len, texts))
    return tokens


def by_slots(engine: Engine, jobs: list[DecodeJob], slots: int, refill: int) -> int:
    """Decode in slots; the count of requested tokens."""
    waiting = iter(jobs)
    results = engine.decode_stream(
        lambda count: list(islice(waiting, count)),
        slots,
        max_length=len(SLOTS_PROMPT) + LONGEST,
        refill=refill,
    )
    return sum(len(result.tokens) for result in results)


def measure_slots(engine: Engine, slots: int, clips: int, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of batches and of each refill, after an untimed round."""
    jobs = mixed_jobs(clips, engine, min(clips, slots))
    tokens = sum(job.request.max_length - len(SLOTS_PROMPT) for job in jobs)
    refills: list[int | None] = [None, *sorted({max(1, slots // share) for share in (16, 8, 4, 2)})]

    def work(refill: int | None) -> None:
        found = (
            by_batches(engine, jobs, slots)
            if refill is None
            else by_slots(engine, jobs, slots, refill)
        )
        assert found == tokens, f"{found} tokens instead of {tokens}"

    works = {str(refill): lambda refill=refill: work(refill) for refill in refills}  # type: ignore[misc]
    times = time_in_turns(works, rounds + 1)
    common = {"slots": slots, "clips": clips, "tokens": tokens}
    return [
        common | {"refill": refill, "seconds": median(times[str(refill)][1:])} for refill in refills
    ]


def slots(
    device: Annotated[str, typer.Option()] = "cpu",
    size: Annotated[str, typer.Option(help=f"One of {', '.join(MODEL_SIZES)}.")] = "tiny",
    slots: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    clips: Annotated[int, typer.Option(help="Per slot.", min=1)] = 6,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Threads = 2,
    output: Output = None,
    commit: Commit = None,
) -> None:
    """Time batches against slots."""
    one_of("size", [size], MODEL_SIZES)
    torch.set_num_threads(threads)
    layers = MODEL_SIZES[size].decoder_layers
    model = random_model(WhisperFlashAttentionForConditionalGeneration, size, layers, device)
    engine = Engine.of(model)
    counts = slots or [16]
    rows = [row for each in counts for row in measure_slots(engine, each, clips * each, rounds)]
    lines = [
        (
            *(row["slots"], "batches" if row["refill"] is None else row["refill"]),
            *(f"{row['seconds']:.3f}", f"{row['tokens'] / row['seconds']:.0f}"),
        )
        for row in rows
    ]
    columns = ("slots", "refilled by", "seconds", "tokens per second")
    print_table(f"{size}, {device}", columns, lines)
    write_json(output, device, commit, {"size": size, "rows": rows})


app = app_of(__doc__, cpu, start_up, step, slots)

if __name__ == "__main__":
    app()
