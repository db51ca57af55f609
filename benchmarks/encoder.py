"""Time Whisper's encoder against stock Transformers' (eager, SDPA), and measure its error.

    python benchmarks/encoder.py --output benchmarks/results/encoder-h100.json
    python benchmarks/encoder.py --repeats 0 --weights package:tiny.en --features speech.npz

Random weights, features of the bundled speech on the device, one process. All systems get the same
numbers, rounded to the dtype. The error is that of the states, relative (Frobenius) to those of
stock with eager attention in float32 from the same numbers, and so that of the arithmetic in the
dtype. Systems that are timed together take turns call by call. PyTorch keeps its default
settings: on a GPU stock's convolutions in float32 are TensorFloat-32. `--weights` adds the errors
of a checkpoint on speech in float32, float16 and bfloat16.

Fields of rows have the names and units of `whisper-flash benchmark`. Seconds are per call, on a GPU
by its own events. `activation_bytes` is the peak of allocated device memory above weights, features
and states, a recording of a CUDA graph included; None on a CPU. `flops` counts matrix products.
`states_error_float32` is the error of our encoder in float32 on the same numbers. In half precision
a few positions make most of `states_error`; `position_error` is the median over positions of a
position's own relative error, and `states_bound` what our `states_error` may be.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _harness import Commit, Output, app_of, console, one_of, print_rows, relative_error, write_json
from transformers import WhisperForConditionalGeneration as StockWhisper

from whisper_flash_attention.benchmark.environment import Environment, describe_environment
from whisper_flash_attention.benchmark.features import prepare_features
from whisper_flash_attention.benchmark.measure import measure_ceilings, synchronize
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.roofline import (
    Ceilings,
    Workload,
    encoder_phases,
    encoder_seconds,
)
from whisper_flash_attention.benchmark.settings import DTYPES, MODEL_SIZES, ModelSize, Setting
from whisper_flash_attention.benchmark.systems import FLASH
from whisper_flash_attention.devices import resolve_device, resolve_dtype
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.flash_attention import survey
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration as OurWhisper,
)
from whisper_flash_attention.parity.cases import read_features
from whisper_flash_attention.parity.models import load_models

# The main benchmark's names, and stock's attention by them.
STOCK_ATTENTION = {"orig": "eager", "sdpa": "sdpa"}
SYSTEMS = (*STOCK_ATTENTION, FLASH)
# Untimed calls before the timed ones; a GPU also has to raise its clocks.
CPU_WARM_UP, GPU_WARM_UP = 2, 10
# The reference encodes few clips at a time: eager attention holds every score.
REFERENCE_CLIPS = 4
# Defaults: checkpoints, batch sizes and timed calls.
CPU_DEFAULTS = (("tiny", "base"), (1,), 5)
GPU_DEFAULTS = (("tiny", "base", "small", "medium", "large-v3"), (1, 8, 32), 20)

FIDELITY_DTYPES = ("float32", "float16", "bfloat16")
# Bounds of our error: in float32, and in half precision as a multiple of stock's with SDPA.
FLOAT32_BOUND = 1e-5
HALF_FACTOR = 1.2
# Clips of bundled speech that a checkpoint's errors are measured on where no file is given.
FIDELITY_CLIPS = 4

# Features [B, mel bins, 3000] to states [B, 1500, D].
Encode = Callable[[torch.Tensor], torch.Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class EncoderCase:
    """A model and the work: clips per call and timed calls."""

    checkpoint: str
    size: ModelSize
    batch_size: int
    device: str
    dtype: str
    repeats: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return getattr(torch, self.dtype)

    @property
    def warm_up(self) -> int:
        """Calls in turns before the timed ones."""
        return CPU_WARM_UP if self.device == "cpu" else GPU_WARM_UP

    @property
    def work(self) -> Workload:
        """The workload of the roofline."""
        setting = Setting("encoder", self.batch_size, new_tokens=1, batches=self.repeats)
        return Workload.of(self.size, 1, setting, self.dtype)

    def build(self, kind: Any) -> Any:
        """The model with random weights, and one decoder layer, which is not used."""
        return build_model(kind, self.size, 1, device=self.device, dtype=self.torch_dtype)


@dataclass(frozen=True)
class Speech:
    """Features [clips, mel bins, 3000], float32, on the host; a description; clips per call."""

    features: torch.Tensor
    description: str
    batch_size: int = 1


def bundled_speech(clips: int, mel_bins: int) -> Speech:
    """Features of this many clips, as the main benchmark makes them."""
    with tempfile.TemporaryDirectory() as folder:
        made = prepare_features("bundled", mel_bins, clips, Path(folder) / "features.npy")
        return Speech(torch.from_numpy(np.load(made.path)), made.description)


def stock_encoder(model: Any, attention: str) -> Encode:
    """Transformers' own encoder, with that attention from now on, without gradients."""
    model.set_attn_implementation(attention)

    def encode(features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.get_encoder()(features).last_hidden_state

    return encode


def our_encoder(model: Any) -> Encode:
    """The engine's encoder, as `generate` calls it."""
    return lambda features: Engine.of(model).encode(features)


def in_parts(encode: Encode, features: torch.Tensor, clips: int) -> torch.Tensor:
    """States of all features, `clips` at a time."""
    return torch.cat([encode(part) for part in torch.split(features, clips)])


def reference(model: Any, features: torch.Tensor, clips: int) -> torch.Tensor:
    """Stock's states in float32 with eager attention and without TensorFloat-32."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        return in_parts(stock_encoder(model.float(), "eager"), features.float(), clips)


def free(device: str) -> None:
    """Free the memory of deleted models."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# --- times, on random weights --------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A system that is ready to be timed."""

    name: str
    model: Any
    encode: Encode
    attention: str


def build_encoder(case: EncoderCase, name: str) -> Encoder:
    """The system of this name (one of `SYSTEMS`) with the benchmark's random weights."""
    if name != FLASH:
        model, attention = case.build(StockWhisper), STOCK_ATTENTION[name]
        return Encoder(name, model, stock_encoder(model, attention), attention)
    model, heads = case.build(OurWhisper), case.size.heads
    shape = {"heads": heads, "head_dim": case.size.d_model // heads, "batch": case.batch_size}
    rows = survey(model.device, model.dtype, **shape)
    attention = next(row.picked for row in rows if row.case.startswith("encoder"))
    return Encoder(name, model, our_encoder(model), attention)


def reference_states(case: EncoderCase, features: torch.Tensor) -> torch.Tensor:
    """`reference` of the case's weights for features rounded to its dtype."""
    return reference(case.build(StockWhisper), features, REFERENCE_CLIPS)


def float32_error(case: EncoderCase, features: torch.Tensor, expected: torch.Tensor) -> float:
    """The error of our encoder in float32 on the case's numbers."""
    model = case.build(OurWhisper).float()
    error = relative_error(our_encoder(model)(features.float()), expected)
    Engine.forget(model)
    return error


def measure_case(
    case: EncoderCase, speech: Speech, environment: Environment, ceilings: Ceilings
) -> list[Row]:
    """A row per system in the order of `SYSTEMS`.

    On a CPU they take turns; on a GPU one is loaded at a time. One that does not fit the GPU's
    memory has the status "failed" and the reason.
    """
    features = speech.features[: case.batch_size].to(case.device, case.torch_dtype)
    expected = reference_states(case, features)
    exact = float32_error(case, features, expected)
    free(case.device)
    rows = []
    for names in [SYSTEMS] if case.device == "cpu" else [(name,) for name in SYSTEMS]:
        found: Sequence[Row] = [{"error": "out of memory"}] * len(names)
        with suppress(torch.OutOfMemoryError):
            found = measure_group(case, names, features, expected)
        for name, row in zip(names, found, strict=True):
            rows.append(
                {
                    "setting": "encoder",
                    "checkpoint": case.checkpoint,
                    "encoder_layers": case.size.encoder_layers,
                    "system": name,
                    "device": case.device,
                    "dtype": case.dtype,
                    "batch_size": case.batch_size,
                    "features": speech.description,
                    "environment": environment.as_json(),
                    "ceilings": asdict(ceilings),
                    "roofline_seconds_per_batch": encoder_seconds(case.work, ceilings),
                    "flops": sum(flops for _, flops in encoder_phases(case.work)),
                    "states_error_float32": exact if name == FLASH else None,
                    **with_ratios(case, ceilings, row),
                }
            )
        free(case.device)
    return rows


def with_ratios(case: EncoderCase, ceilings: Ceilings, measured: Row) -> Row:
    """The measured fields, and those derived from times, which are None if nothing was timed."""
    blank = {"status": "failed", "error": None, "attention": {}, "seconds": [], "parameters": 0}
    row = blank | dict.fromkeys(("first_call_seconds", "activation_bytes", "states_error"))
    row |= measured
    seconds = row["seconds"]
    typical = median(seconds) if seconds else None
    rate = sum(flops for _, flops in encoder_phases(case.work)) / typical if typical else None
    return row | {
        "batches": len(seconds),
        "seconds_per_batch": typical,
        "seconds_min": min(seconds, default=None),
        "seconds_max": max(seconds, default=None),
        "tflops_per_second": rate / 1e12 if rate else None,
        "matmul_share": rate / ceilings.flops_per_second if rate else None,
        "roofline_share": encoder_seconds(case.work, ceilings) / typical if typical else None,
    }


def measure_group(
    case: EncoderCase, names: Sequence[str], features: torch.Tensor, expected: torch.Tensor
) -> list[Row]:
    """Measure systems that are loaded at the same time."""
    device = torch.device(case.device)
    encoders = [build_encoder(case, name) for name in names]
    rows: list[Row] = [
        {
            "status": "ok",
            "parameters": sum(each.numel() for each in encoder.model.get_encoder().parameters()),
            "attention": {"encoder self-attention": encoder.attention},
            "seconds": [],
            "first_call_seconds": timed_call(encoder.encode, features, device)[0],
        }
        for encoder in encoders
    ]
    for row, encoder in zip(rows, encoders, strict=True):
        row["activation_bytes"] = activation_bytes(encoder, features)
    for turn in range(case.warm_up + case.repeats):
        for row, encoder in zip(rows, encoders, strict=True):
            seconds, states = timed_call(encoder.encode, features, device)
            if turn >= case.warm_up:
                row["seconds"].append(seconds)
            if turn == 0:
                row["states_error"] = relative_error(states, expected)
            del states
    for encoder in encoders:
        Engine.forget(encoder.model)
    return rows


def timed_call(
    encode: Encode, features: torch.Tensor, device: torch.device
) -> tuple[float, torch.Tensor]:
    """Seconds of one call from an idle device, by events on a GPU, and its states."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        states = encode(features)
        synchronize(device)
        return time.perf_counter() - start, states
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))
    states = encode(features)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, states


def activation_bytes(encoder: Encoder, features: torch.Tensor) -> int | None:
    """Peak of one call's device memory above that in use before, without its states."""
    if not features.is_cuda:
        return None
    if encoder.name == FLASH:
        Engine.of(encoder.model).release()
    free("cuda")
    before = torch.cuda.memory_allocated(features.device)
    torch.cuda.reset_peak_memory_stats(features.device)
    states = encoder.encode(features)
    torch.cuda.synchronize(features.device)
    return torch.cuda.max_memory_allocated(features.device) - before - states.nbytes


def show_timings(rows: list[Row]) -> None:
    """Print one line per row; the ratios are stock's time over the row's."""

    def key(row: Mapping[str, Any], system: str) -> tuple[str, int, str]:
        return row["checkpoint"], row["batch_size"], system

    times = {key(row, row["system"]): row["seconds_per_batch"] for row in rows}

    def ratio(system: str) -> Callable[[Mapping[str, Any]], str]:
        # A TypeError where either was not timed, which becomes a dash.
        return lambda row: f"{times.get(key(row, system)) / row['seconds_per_batch']:.2f}"

    columns: dict[str, Any] = {"checkpoint": "{checkpoint}", "batch": "{batch_size}"}
    columns |= {"system": "{system}", "ms": lambda row: f"{1e3 * row['seconds_per_batch']:.2f}"}
    columns |= {f"x vs {STOCK_ATTENTION[each]}": ratio(each) for each in STOCK_ATTENTION}
    columns |= {
        "TFLOP/s": "{tflops_per_second:.2f}",
        "% of matmul": lambda row: f"{100 * row['matmul_share']:.0f}",
        "peak MB": lambda row: f"{row['activation_bytes'] / 1e6:.0f}",
        "error": lambda row: row["error"] or f"{row['states_error']:.1e}",
    }
    name = rows[0]["environment"]["device_name"]
    print_rows(f"encoder, {name}, {rows[0]['dtype']}, medians", rows, columns)


# --- errors of a checkpoint ----------------------------------------------------------------------


def measure_fidelity(
    checkpoint: str,
    stock: Any,
    ours: Any,
    speech: Speech,
    environment: Environment,
    dtypes: Sequence[str] = FIDELITY_DTYPES,
) -> list[Row]:
    """Two rows per dtype: stock with SDPA, and ours.

    `stock` and `ours` have the same weights in float32, on one device; they are not changed.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        errors = states_errors(stock, ours, speech, getattr(torch, dtype))
        bound = FLOAT32_BOUND if dtype == "float32" else HALF_FACTOR * errors["sdpa"][0]
        for system, (error, position_error) in errors.items():
            rows.append(
                {
                    "setting": "encoder-fidelity",
                    "checkpoint": checkpoint,
                    "encoder_layers": int(stock.config.encoder_layers),
                    "system": system,
                    "device": str(stock.device),
                    "dtype": dtype,
                    "batch_size": speech.batch_size,
                    "clips": len(speech.features),
                    "features": speech.description,
                    "environment": environment.as_json(),
                    "states_error": error,
                    "position_error": position_error,
                    "states_bound": bound if system == FLASH else None,
                    "within_bound": error <= bound if system == FLASH else None,
                }
            )
    return rows


def states_errors(
    stock: Any, ours: Any, speech: Speech, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """`states_error` and `position_error` in this dtype, by system."""
    features = speech.features.to(stock.device, dtype)
    rounded, model = copy.deepcopy(stock).to(dtype), copy.deepcopy(ours).to(dtype)
    expected = reference(copy.deepcopy(rounded), features, speech.batch_size)
    cudnn = torch.backends.cudnn
    # Stock's convolutions in float32 would be TensorFloat-32.
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        sdpa = in_parts(stock_encoder(rounded, "sdpa"), features, speech.batch_size)
    states = {"sdpa": sdpa, FLASH: in_parts(our_encoder(model), features, speech.batch_size)}
    Engine.forget(model)

    def position_error(found: torch.Tensor) -> float:
        apart = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        return float(apart.median())

    return {
        name: (relative_error(found, expected), position_error(found))
        for name, found in states.items()
    }


def compare_checkpoint(
    source: str, path: Path | None, environment: Environment, device: str
) -> list[Row]:
    """Rows of a checkpoint on features from a file, or on the bundled speech.

    Raises:
        WhisperFlashError: the checkpoint or the file cannot be read, or holds no features that fit.
    """
    models = load_models(
        source, device=device, dtype="float32", attention="auto", needs_extractor=False
    )
    bins, frames = models.feature_shape
    if path is None:
        speech = bundled_speech(FIDELITY_CLIPS, bins)
    else:
        clips = read_features(path, (bins, frames), console.print).clips
        if not clips:
            raise WhisperFlashError(f"{path}: holds no features that {source} takes")
        speech = Speech(torch.from_numpy(np.stack([clip.features for clip in clips])), path.name)
    return measure_fidelity(source, models.stock, models.ours, speech, environment)


def show_fidelity(rows: list[Row]) -> None:
    """Print one line per dtype."""
    pairs = [
        {"dtype": ours["dtype"], "sdpa": sdpa, "ours": ours}
        for sdpa, ours in zip(rows[::2], rows[1::2], strict=True)
    ]
    columns: dict[str, Any] = {
        "dtype": "{dtype}",
        "sdpa": "{sdpa[states_error]:.2e}",
        "flash": "{ours[states_error]:.2e}",
        "bound": "{ours[states_bound]:.2e}",
        "": lambda row: "within" if row["ours"]["within_bound"] else "BEYOND",
        "sdpa, median position": "{sdpa[position_error]:.2e}",
        "flash, median position": "{ours[position_error]:.2e}",
    }
    title = f"{rows[0]['checkpoint']}: error of the states, {rows[0]['clips']} clips of speech"
    print_rows(title, pairs, columns)


def main(
    checkpoint: Annotated[list[str] | None, typer.Option(help="Random; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Clips; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Default: by device.")] = None,
    repeats: Annotated[int | None, typer.Option(min=0, help="Timed calls; 0: none.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU.")] = None,
    weights: Annotated[str | None, typer.Option(help="A checkpoint, for its errors.")] = None,
    features: Annotated[Path | None, typer.Option(help="As `parity --features`.")] = None,
    commit: Commit = None,
    output: Output = None,
) -> None:
    """Time the encoder, and measure its error."""
    if threads is not None:
        torch.set_num_threads(threads)
    target = str(resolve_device(device))
    names, batches, calls = CPU_DEFAULTS if target == "cpu" else GPU_DEFAULTS
    names, batches = tuple(checkpoint or names), tuple(batch or batches)
    calls = calls if repeats is None else repeats
    precision = dtype or str(resolve_dtype("auto", torch.device(target))).removeprefix("torch.")
    one_of("checkpoint", names, MODEL_SIZES)
    one_of("dtype", [precision], DTYPES)
    environment = describe_environment(target, commit)
    compared = compare_checkpoint(weights, features, environment, target) if weights else []
    timed: list[Row] = []
    if calls:
        ceilings = measure_ceilings(target, precision)
        bins = {MODEL_SIZES[name].mel_bins for name in names}
        speech = {each: bundled_speech(max(batches), each) for each in bins}
        for name in names:
            for clips in batches:
                case = EncoderCase(name, MODEL_SIZES[name], clips, target, precision, calls)
                found = measure_case(case, speech[case.size.mel_bins], environment, ceilings)
                exact = f"{found[-1]['states_error_float32']:.1e} from stock's states"
                console.print(f"{name}, batch {clips}: done; ours in float32 is {exact}")
                timed += found
    write_json(output, target, commit, {"rows": [*timed, *compared]})
    if compared:
        show_fidelity(compared)
    if timed:
        show_timings(timed)


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
