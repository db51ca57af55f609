"""Time Whisper's encoder against stock Transformers' (eager, SDPA), and measure its error.

    python benchmarks/encoder.py --output benchmarks/results/encoder-h100.json
    python benchmarks/encoder.py --repeats 0 --weights package:tiny.en --features speech.npz

Random weights, features of the bundled speech on the device, one process. All systems get the same
numbers, rounded to the dtype; the error is that of the states, relative to what stock with eager
attention computes from the same numbers in float32, so that it is what the arithmetic in the dtype
loses. Systems that are timed together take turns call by call. PyTorch keeps its default settings:
on a GPU stock's convolutions in float32 are TensorFloat-32. `--weights` adds the errors of a
checkpoint on speech in float32, float16 and bfloat16.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _harness import (
    Commit,
    Output,
    app_of,
    console,
    one_of,
    print_table,
    relative_error,
    write_json,
)
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
from whisper_flash_attention.benchmark.settings import (
    DTYPES,
    MODEL_SIZES,
    ModelSize,
    Setting,
)
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

ENCODER = "encoder"
# The main benchmark's names, and stock's attention by them.
STOCK_ATTENTION = {"orig": "eager", "sdpa": "sdpa"}
SYSTEMS = (*STOCK_ATTENTION, FLASH)
# Untimed calls before the timed ones; a GPU also has to raise its clocks.
CPU_WARM_UP, GPU_WARM_UP = 2, 10
# The reference encodes few clips at a time: eager attention holds every score.
REFERENCE_CLIPS = 4

Encode = Callable[[torch.Tensor], torch.Tensor]


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
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def warm_up(self) -> int:
        """Calls in turns before the timed ones."""
        return CPU_WARM_UP if self.device == "cpu" else GPU_WARM_UP

    @property
    def work(self) -> Workload:
        """What the roofline is computed from."""
        setting = Setting(ENCODER, self.batch_size, new_tokens=1, batches=self.repeats)
        return Workload.of(self.size, 1, setting, self.dtype)


@dataclass(frozen=True)
class EncoderRow:
    """One system on one case; names and units are those of `results.ResultRow`.

    Seconds are per call, on a GPU by its own events. `activation_bytes` is the peak of allocated
    device memory above weights, features and states; None on a CPU. A recording of a CUDA graph is
    in it, workspaces that PyTorch keeps for matrix products are not. `flops` counts matrix products
    per call. `states_error` is relative (Frobenius) to the reference, `states_error_float32` that
    of our encoder in float32 on the same numbers; None for stock.
    """

    setting: str
    checkpoint: str
    encoder_layers: int
    system: str
    device: str
    dtype: str
    batch_size: int
    parameters: int
    features: str
    environment: dict[str, Any]
    ceilings: dict[str, float]
    roofline_seconds_per_batch: float
    flops: int
    status: str = "failed"
    error: str | None = None
    attention: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    activation_bytes: int | None = None
    states_error: float | None = None
    states_error_float32: float | None = None

    @property
    def seconds_per_batch(self) -> float | None:
        """The median call."""
        return median(self.seconds) if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """All fields, and what follows from the times; that is None where nothing was timed."""
        typical = self.seconds_per_batch
        rate = self.flops / typical if typical else None
        return asdict(self) | {
            "batches": len(self.seconds),
            "seconds_per_batch": typical,
            "seconds_min": min(self.seconds, default=None),
            "seconds_max": max(self.seconds, default=None),
            "tflops_per_second": rate / 1e12 if rate else None,
            "matmul_share": rate / self.ceilings["flops_per_second"] if rate else None,
            "roofline_share": self.roofline_seconds_per_batch / typical if typical else None,
        }


@dataclass(frozen=True)
class Encoder:
    """A system that is ready to be timed: features [B, mel bins, 3000] to states [B, 1500, D]."""

    name: str
    model: Any
    encode: Encode
    attention: str

    def release_recordings(self) -> None:
        """Give back what the system keeps between calls."""
        if self.name == FLASH:
            Engine.of(self.model).release()


def stock_encoder(model: Any, attention: str) -> Encode:
    """Transformers' own encoder, with that attention from now on, without gradients."""
    model.set_attn_implementation(attention)

    def encode(features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states: torch.Tensor = model.get_encoder()(features).last_hidden_state
        return states

    return encode


def our_encoder(model: Any) -> Encode:
    """The engine's encoder, as `generate` calls it."""
    return lambda features: Engine.of(model).encode(features)


def build_encoder(case: EncoderCase, name: str) -> Encoder:
    """The system of this name (one of `SYSTEMS`) with the benchmark's random weights."""
    if name == FLASH:
        model: Any = _build(OurWhisper, case)
        heads, size = case.size.heads, case.size
        rows = survey(
            model.device,
            model.dtype,
            heads=heads,
            head_dim=size.d_model // heads,
            batch=case.batch_size,
        )
        attention = next(row.picked for row in rows if row.case.startswith("encoder"))
        return Encoder(name, model, our_encoder(model), attention)
    model, attention = _build(StockWhisper, case), STOCK_ATTENTION[name]
    return Encoder(name, model, stock_encoder(model, attention), attention)


def _build(kind: Any, case: EncoderCase) -> Any:
    # One decoder layer, of no use here; weights follow from their names.
    return build_model(kind, case.size, 1, device=case.device, dtype=case.torch_dtype)


def encode_in_parts(encode: Encode, features: torch.Tensor, clips: int) -> torch.Tensor:
    """States [B, 1500, D] of features [B, mel bins, 3000], `clips` at a time."""
    return torch.cat([encode(part) for part in torch.split(features, clips)])


def reference_states(case: EncoderCase, features: torch.Tensor) -> torch.Tensor:
    """Stock's float32 states [B, 1500, D], eager attention, of the case's numbers.

    `features` [B, mel bins, 3000] are on the device and rounded to the case's dtype. TensorFloat-32
    is off meanwhile.
    """
    model = _build(StockWhisper, case).float()
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        encode = stock_encoder(model, "eager")
        return encode_in_parts(encode, features.float(), REFERENCE_CLIPS)


def float32_error(case: EncoderCase, features: torch.Tensor, expected: torch.Tensor) -> float:
    """`relative_error` of our encoder in float32 on the case's numbers."""
    model = _build(OurWhisper, case).float()
    error = relative_error(our_encoder(model)(features.float()), expected)
    Engine.forget(model)
    return error


def measure_case(
    case: EncoderCase,
    features: torch.Tensor,
    description: str,
    environment: Environment,
    ceilings: Ceilings,
) -> list[EncoderRow]:
    """Time every system on a case. On a CPU they take turns; on a GPU one is there at a time.

    Args:
        case: what to run.
        features: float32 [batch size, mel bins, 3000] on the host.
        description: of the features.
        environment, ceilings: of this machine.

    Returns:
        A row per system in the order of `SYSTEMS`; one that the GPU's memory does not hold has the
        status "failed" and says so.
    """
    on_device = features.to(case.device, case.torch_dtype)
    expected = reference_states(case, on_device)
    exact = float32_error(case, on_device, expected)
    _free(case.device)
    groups = [SYSTEMS] if case.device == "cpu" else [(name,) for name in SYSTEMS]
    rows = []
    for names in groups:
        blank = [_blank_row(case, name, description, environment, ceilings) for name in names]
        try:
            rows += _measure_group(case, blank, on_device, expected)
        except torch.OutOfMemoryError:
            rows += [replace(row, error="out of memory") for row in blank]
        _free(case.device)
    return [replace(r, states_error_float32=exact) if r.system == FLASH else r for r in rows]


def _blank_row(
    case: EncoderCase, name: str, description: str, environment: Environment, ceilings: Ceilings
) -> EncoderRow:
    return EncoderRow(
        setting=ENCODER,
        checkpoint=case.checkpoint,
        encoder_layers=case.size.encoder_layers,
        system=name,
        device=case.device,
        dtype=case.dtype,
        batch_size=case.batch_size,
        parameters=0,
        features=description,
        environment=environment.as_json(),
        ceilings=asdict(ceilings),
        roofline_seconds_per_batch=encoder_seconds(case.work, ceilings),
        flops=sum(flops for _, flops in encoder_phases(case.work)),
    )


def _measure_group(
    case: EncoderCase, blank: Sequence[EncoderRow], features: torch.Tensor, expected: torch.Tensor
) -> list[EncoderRow]:
    """Fill the rows of systems that are there at the same time."""
    device = torch.device(case.device)
    encoders = [build_encoder(case, row.system) for row in blank]
    firsts = [timed_call(encoder.encode, features, device)[0] for encoder in encoders]
    peaks = [activation_bytes(encoder, features) for encoder in encoders]
    seconds: list[list[float]] = [[] for _ in encoders]
    errors = [0.0] * len(encoders)
    for turn in range(case.warm_up + case.repeats):
        for place, encoder in enumerate(encoders):
            took, states = timed_call(encoder.encode, features, device)
            if turn >= case.warm_up:
                seconds[place].append(took)
            if turn == 0:
                errors[place] = relative_error(states, expected)
            del states
    for encoder in encoders:
        Engine.forget(encoder.model)
    return [
        replace(
            row,
            status="ok",
            parameters=sum(each.numel() for each in encoder.model.get_encoder().parameters()),
            attention={"encoder self-attention": encoder.attention},
            seconds=times,
            first_call_seconds=first,
            activation_bytes=peak,
            states_error=error,
        )
        for row, encoder, times, first, peak, error in zip(
            blank, encoders, seconds, firsts, peaks, errors, strict=True
        )
    ]


def timed_call(
    encode: Encode, features: torch.Tensor, device: torch.device
) -> tuple[float, torch.Tensor]:
    """Seconds of one call, and its states. A GPU is idle before, and times itself."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        states = encode(features)
        synchronize(device)
        return time.perf_counter() - start, states
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    states = encode(features)
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, states


def activation_bytes(encoder: Encoder, features: torch.Tensor) -> int | None:
    """Peak of one call's device memory above what was there and its states, after a first call."""
    if not features.is_cuda:
        return None
    encoder.release_recordings()
    _free("cuda")
    before = torch.cuda.memory_allocated(features.device)
    torch.cuda.reset_peak_memory_stats(features.device)
    states = encoder.encode(features)
    torch.cuda.synchronize(features.device)
    return torch.cuda.max_memory_allocated(features.device) - before - states.nbytes


def _free(device: str) -> None:
    """Let go of models that nobody holds any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


FIDELITY = "encoder-fidelity"
FIDELITY_DTYPES = ("float32", "float16", "bfloat16")
# What our error may be: in float32, and in half precision times that of stock with SDPA.
FLOAT32_BOUND = 1e-5
HALF_FACTOR = 1.2

Errors = tuple[float, float]


@dataclass(frozen=True)
class FidelityRow:
    """One system in one dtype; names are those of `results.ResultRow`.

    `states_error` is relative (Frobenius), over all clips. In half precision a few positions make
    most of it; `position_error` is the median over positions of a position's own relative error.
    `states_bound` is what our `states_error` may be; None for stock.
    """

    checkpoint: str
    encoder_layers: int
    system: str
    device: str
    dtype: str
    batch_size: int
    clips: int
    features: str
    environment: dict[str, Any]
    states_error: float
    position_error: float
    states_bound: float | None = None
    setting: str = FIDELITY

    @property
    def within_bound(self) -> bool | None:
        """Whether the error is no larger than it may be; None where there is no bound."""
        return None if self.states_bound is None else self.states_error <= self.states_bound

    def as_json(self) -> dict[str, Any]:
        """All fields, and the verdict."""
        return asdict(self) | {"within_bound": self.within_bound}


@dataclass(frozen=True)
class Speech:
    """Features [clips, mel bins, 3000], float32, on the host; what they are; clips per call."""

    features: torch.Tensor
    description: str
    batch_size: int = 1


def measure_fidelity(
    checkpoint: str,
    stock: Any,
    ours: Any,
    speech: Speech,
    environment: Environment,
    dtypes: Sequence[str] = FIDELITY_DTYPES,
) -> list[FidelityRow]:
    """Two rows per dtype: stock with SDPA, and ours.

    Args:
        checkpoint: the name of the weights.
        stock, ours: both classes with the same weights in float32, on one device. They stay so.
        speech: what is encoded.
        environment: of this machine.
        dtypes: any of `FIDELITY_DTYPES`.
    """
    rows = []
    for dtype in dtypes:
        sdpa, flash = states_errors(stock, ours, speech, getattr(torch, dtype))
        bound = FLOAT32_BOUND if dtype == "float32" else HALF_FACTOR * sdpa[0]
        for system, errors, limit in (("sdpa", sdpa, None), (FLASH, flash, bound)):
            rows.append(
                FidelityRow(
                    checkpoint=checkpoint,
                    encoder_layers=int(stock.config.encoder_layers),
                    system=system,
                    device=str(stock.device),
                    dtype=dtype,
                    batch_size=speech.batch_size,
                    clips=len(speech.features),
                    features=speech.description,
                    environment=environment.as_json(),
                    states_error=errors[0],
                    position_error=errors[1],
                    states_bound=limit,
                )
            )
    return rows


def states_errors(
    stock: Any, ours: Any, speech: Speech, dtype: torch.dtype
) -> tuple[Errors, Errors]:
    """`states_error` and `position_error` in this dtype: of stock with SDPA, and of ours."""
    features = speech.features.to(stock.device, dtype)
    rounded = copy.deepcopy(stock).to(dtype)
    cudnn = torch.backends.cudnn
    # Stock's convolutions in float32 would be TensorFloat-32.
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        encode = stock_encoder(copy.deepcopy(rounded).float(), "eager")
        expected = encode_in_parts(encode, features.float(), speech.batch_size)
        encode = stock_encoder(rounded, "sdpa")
        sdpa = encode_in_parts(encode, features, speech.batch_size)
    model = copy.deepcopy(ours).to(dtype)
    found = encode_in_parts(our_encoder(model), features, speech.batch_size)
    Engine.forget(model)
    return _both_errors(sdpa, expected), _both_errors(found, expected)


def _both_errors(found: torch.Tensor, expected: torch.Tensor) -> Errors:
    """Over all elements, and the median over positions, for states [B, 1500, D]."""
    apart = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return relative_error(found, expected), float(apart.median())


CPU_CHECKPOINTS, CPU_BATCHES, CPU_REPEATS = ("tiny", "base"), (1,), 5
GPU_CHECKPOINTS, GPU_BATCHES = ("tiny", "base", "small", "medium", "large-v3"), (1, 8, 32)
GPU_REPEATS = 20
# Clips of bundled speech that a checkpoint's errors are measured on where no file is given.
FIDELITY_CLIPS = 4


def bundled_speech(clips: int, mel_bins: int) -> Speech:
    """Features of this many clips, as the main benchmark makes them."""
    with tempfile.TemporaryDirectory() as folder:
        made = prepare_features("bundled", mel_bins, clips, Path(folder) / "features.npy")
        return Speech(torch.from_numpy(np.load(made.path)), made.description)


def time_encoders(cases: list[EncoderCase], environment: Environment) -> list[EncoderRow]:
    """Rows of all cases; each is reported when it is done."""
    ceilings = measure_ceilings(cases[0].device, cases[0].dtype)
    most = max(case.batch_size for case in cases)
    bins = sorted({case.size.mel_bins for case in cases})
    speech = {each: bundled_speech(most, each) for each in bins}
    rows = []
    for case in cases:
        own = speech[case.size.mel_bins]
        features = own.features[: case.batch_size]
        found = measure_case(case, features, own.description, environment, ceilings)
        exact = found[-1].states_error_float32
        console.print(
            f"{case.checkpoint}, batch {case.batch_size}: done; "
            f"ours in float32 is {exact:.1e} from stock's states"
        )
        rows += found
    return rows


def compare_checkpoint(
    source: str, path: Path | None, environment: Environment, device: str
) -> list[FidelityRow]:
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


def show_timings(rows: list[EncoderRow]) -> None:
    """Print one line per row; the ratios are stock's time over the row's."""
    times = {
        (row.checkpoint, row.batch_size, row.system): row.seconds_per_batch
        for row in rows
        if row.seconds
    }
    lines: list[tuple[object, ...]] = []
    for row in rows:
        name, typical = (row.checkpoint, row.batch_size, row.system), row.seconds_per_batch
        if typical is None:
            lines.append((*name, row.error))
            continue
        stock = [times.get((row.checkpoint, row.batch_size, each)) for each in STOCK_ATTENTION]
        found, peak = row.as_json(), row.activation_bytes
        lines.append(
            (
                *(*name, f"{1e3 * typical:.2f}"),
                *(None if each is None else f"{each / typical:.2f}" for each in stock),
                f"{found['tflops_per_second']:.2f}",
                f"{100 * found['matmul_share']:.0f}",
                None if peak is None else f"{peak / 1e6:.0f}",
                f"{row.states_error:.1e}",
            )
        )
    columns = ("checkpoint", "batch", "system", "ms", "x vs eager", "x vs sdpa", "TFLOP/s")
    title = f"encoder, {rows[0].environment['device_name']}, {rows[0].dtype}, medians"
    print_table(title, (*columns, "% of matmul", "peak MB", "error"), lines)


def show_fidelity(rows: list[FidelityRow]) -> None:
    """Print one line per dtype."""
    lines = []
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        errors = (stock.states_error, ours.states_error, ours.states_bound)
        verdict = "within" if ours.within_bound else "BEYOND"
        medians = (f"{row.position_error:.2e}" for row in (stock, ours))
        lines.append((ours.dtype, *(f"{error:.2e}" for error in errors), verdict, *medians))
    columns = ("dtype", "sdpa", "flash", "bound", "", "sdpa, median position")
    title = f"{rows[0].checkpoint}: error of the states, {rows[0].clips} clips of speech"
    print_table(title, (*columns, "flash, median position"), lines)


def select_cases(
    checkpoints: list[str], batches: list[int], device: str, dtype: str, repeats: int
) -> list[EncoderCase]:
    """Every checkpoint with every batch size.

    Raises:
        typer.BadParameter: a checkpoint or the dtype is unknown.
    """
    one_of("checkpoint", checkpoints, MODEL_SIZES)
    one_of("dtype", [dtype], DTYPES)
    return [
        EncoderCase(name, MODEL_SIZES[name], batch, device, dtype, repeats)
        for name in checkpoints
        for batch in batches
    ]


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
    on_cpu = target == "cpu"
    names = checkpoint or list(CPU_CHECKPOINTS if on_cpu else GPU_CHECKPOINTS)
    batches = batch or list(CPU_BATCHES if on_cpu else GPU_BATCHES)
    calls = (CPU_REPEATS if on_cpu else GPU_REPEATS) if repeats is None else repeats
    environment = describe_environment(target, commit)
    timed: list[EncoderRow] = []
    compared: list[FidelityRow] = []
    if weights is not None:
        compared = compare_checkpoint(weights, features, environment, target)
    if calls:
        precision = dtype or str(resolve_dtype("auto", torch.device(target))).removeprefix("torch.")
        cases = select_cases(names, batches, target, precision, calls)
        timed = time_encoders(cases, environment)
    rows: list[dict[str, Any]] = [row.as_json() for row in (*timed, *compared)]
    write_json(output, target, commit, {"rows": rows})
    if compared:
        show_fidelity(compared)
    if timed:
        show_timings(timed)


app = app_of(__doc__, main)

if __name__ == "__main__":
    app()
