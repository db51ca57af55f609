"""Where a decode step's time goes, kernel by kernel, on one CUDA GPU.

    python benchmarks/decode_step.py --checkpoint tiny --batch 1 --batch 32

Every kernel of a step is timed as it runs in a decode: all its launches of one step (one per layer,
each with its own weights) in one CUDA graph, replayed. The sum of these times is printed beside the
time of the whole step, and beside the time that the step's bytes need at the measured copy
bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.ceilings import measure_ceilings
from whisper_flash_attention.benchmark.environment import describe_environment
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.roofline import Workload, step_seconds
from whisper_flash_attention.benchmark.settings import DECODER_LAYERS, MODEL_SIZES, Setting
from whisper_flash_attention.engine import cuda_decoder, triton_layers
from whisper_flash_attention.engine.cuda_graphs import Recorder
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.logits_processors import Rules
from whisper_flash_attention.engine.request import Request
from whisper_flash_attention.kernels.launch import Overlap, pdl, set_pdl
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration,
)

LAUNCHES = 24
PROMPT = (50258, 50259, 50359, 50363)
KERNELS = {
    triton_layers: (
        "qkv",
        "self_attention",
        "linear",
        "cross_attention",
        "absorb_query",
        "fold_queries",
        "absorbed_attention",
        "project_values",
    ),
    cuda_decoder: ("logits", "pick"),
}


@dataclass(frozen=True)
class Part:
    """One kernel of the step: how often it is launched, microseconds for all its launches."""

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
    """Note every kernel launch of the engine under a label, besides doing it."""
    originals = [
        (module, name, getattr(module, name)) for module in KERNELS for name in KERNELS[module]
    ]
    for module, name, original in originals:
        setattr(module, name, _noting(name, original, calls))
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _noting(name: str, original: Any, calls: Calls) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        label = name
        if name == "linear":
            n, k = args[1].shape
            extras = [
                word
                for word in ("norm_weight", "gelu", "residual")
                if kwargs.get(word) is not None and kwargs.get(word) is not False
            ]
            label = f"linear {k} to {n} {' '.join(extras)}".replace("norm_weight", "norm")
        overlap = Overlap(pdl(torch.device("cuda", torch.cuda.current_device()))["PDL"])

        def again() -> None:
            set_pdl(overlap)
            original(*args, **kwargs)

        calls.setdefault(label, []).append(again)

    return call


def replay_microseconds(launch: Callable[[], None], replays: int = 20) -> float:
    """Median time of a recording of `launch`."""
    launch()
    torch.cuda.synchronize()
    graph = Recorder().record(launch)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return sorted(times)[replays // 2]


def time_launches(runs: list[Callable[[], None]]) -> float:
    """Microseconds of these launches; short lists are repeated, for a graph has a start-up too."""
    repeats = -(-LAUNCHES // len(runs))

    def launch() -> None:
        for _ in range(repeats):
            for run in runs:
                run()

    return replay_microseconds(launch) / repeats


def measure_step(
    checkpoint: str, layers: int, batch: int, tokens: int, cross_attention: str, overlap: bool
) -> list[Part]:
    """Time the kernels of one step in the middle of a decode of `tokens` new tokens."""
    triton_layers.OVERLAPPED_SLOTS = batch if overlap else 0
    model = build_model(
        WhisperFlashAttentionForConditionalGeneration,
        MODEL_SIZES[checkpoint],
        layers,
        device="cuda",
        dtype=torch.float16,
    )
    engine = Engine.of(model)
    states = torch.randn(batch, 1500, MODEL_SIZES[checkpoint].d_model, device="cuda").half()
    prompt = torch.tensor([PROMPT] * batch, device="cuda")
    request = Request(Rules(), len(PROMPT) + tokens, (), 50257, cross_attention=cross_attention)
    engine.decode(states, prompt, request)
    (decoder,) = engine._buffers._decoders.values()
    state = decoder._state
    state.finished.zero_()
    state.positions.fill_(len(PROMPT) + tokens // 2)
    calls: Calls = {}
    with recorded_calls(calls):
        decoder._one_step(50257)

    whole = replay_microseconds(lambda: decoder._one_step(50257))
    parts = [("whole step", sum(map(len, calls.values())), whole)]
    parts += [(label, len(runs), time_launches(runs)) for label, runs in calls.items()]
    form = "absorbed" if state.layout.absorbed else "projected"
    return [
        Part(checkpoint, layers, batch, form, overlap, label, count, microseconds)
        for label, count, microseconds in parts
    ]


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    checkpoint: list[str] = typer.Option(["tiny", "medium"], help="Sizes; may be repeated."),
    batch: list[int] = typer.Option([1, 32], help="Clips; may be repeated."),
    tokens: int = typer.Option(
        256, help="New tokens of the decode that the step is in the middle of."
    ),
    cross_attention: list[str] = typer.Option(["projected", "absorbed"], help="Forms to time."),
    overlap: list[bool] = typer.Option(
        [False, True], help="Layers' kernels overlap their successors, or not."
    ),
    output: Path | None = typer.Option(None, help="Write the results here, as JSON."),
    commit: str | None = typer.Option(None, help="The commit, instead of what git says."),
) -> None:
    ceilings = measure_ceilings("cuda", "float16")
    console = Console(width=120)
    parts: list[Part] = []
    for size in checkpoint:
        layers = DECODER_LAYERS[size][0]
        for clips in batch:
            work = Workload.of(MODEL_SIZES[size], layers, Setting("", clips, tokens, 1), "float16")
            for form in cross_attention:
                floor = step_seconds(work, ceilings, 4 + tokens // 2, absorbed=form == "absorbed")
                for overlaps in overlap:
                    found = measure_step(size, layers, clips, tokens, form, overlaps)
                    parts += found
                    title = f"{size} {layers}, batch {clips}, {form}, overlap {overlaps}"
                    table = Table(title=f"{title}: floor {floor * 1e6:.0f} us")
                    for column in ("kernel", "launches", "us", "us each"):
                        table.add_column(column)
                    for part in found:
                        table.add_row(
                            part.kernel,
                            str(part.launches),
                            f"{part.microseconds:.1f}",
                            f"{part.microseconds / part.launches:.2f}",
                        )
                    console.print(table)
    if output is not None:
        environment = describe_environment("cuda", commit).as_json()
        output.write_text(
            json.dumps({"environment": environment, "parts": [asdict(p) for p in parts]}, indent=1)
        )


if __name__ == "__main__":
    app()
