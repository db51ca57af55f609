"""Whisper's encoder alone, ours and stock's, timed on one device in one process.

All systems get the same numbers: weights and features rounded to the dtype. The states are compared
with those that stock with eager attention makes of the same numbers in float32, so that the error
is what the arithmetic in the dtype loses. Systems that are timed together take turns call by call.
PyTorch's settings are as they come: on a GPU stock's convolutions in float32 are TensorFloat-32.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration as StockWhisper

from whisper_flash_attention.benchmark.ceilings import synchronize
from whisper_flash_attention.benchmark.environment import Environment
from whisper_flash_attention.benchmark.random_weights import build_model
from whisper_flash_attention.benchmark.roofline import (
    Ceilings,
    Workload,
    encoder_flops,
    encoder_seconds,
)
from whisper_flash_attention.benchmark.settings import ModelSize, Setting
from whisper_flash_attention.benchmark.systems import FLASH
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.flash_attention import survey
from whisper_flash_attention.modeling_whisper_flash_attention import (
    WhisperFlashAttentionForConditionalGeneration as OurWhisper,
)

ENCODER = "encoder"
# The main benchmark's names, and stock's attention by them.
STOCK_ATTENTION = {"orig": "eager", "sdpa": "sdpa"}
SYSTEMS = (*STOCK_ATTENTION, FLASH)
# Untimed calls before the timed ones; a GPU also has to raise its clocks.
CPU_WARM_UP, GPU_WARM_UP = 2, 10
# The yardstick goes through few clips at a time: eager attention holds every score.
YARDSTICK_CLIPS = 4

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
    per call. `states_error` is relative (Frobenius) to the yardstick, `states_error_float32` that
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

    def forget_recordings(self) -> None:
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
    """States [B, 1500, D] of features [B, mel bins, 3000], so many clips at a time."""
    return torch.cat([encode(part) for part in torch.split(features, clips)])


def yardstick(case: EncoderCase, features: torch.Tensor) -> torch.Tensor:
    """Stock's float32 states [B, 1500, D], eager attention, of the case's numbers.

    `features` [B, mel bins, 3000] are on the device and rounded to the case's dtype. TensorFloat-32
    is off meanwhile.
    """
    model = _build(StockWhisper, case).float()
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        encode = stock_encoder(model, "eager")
        return encode_in_parts(encode, features.float(), YARDSTICK_CLIPS)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted|| over all elements (Frobenius), both in float32."""
    wanted = wanted.float()
    apart = torch.linalg.vector_norm(found.float() - wanted, dtype=torch.float64)
    return float(apart / torch.linalg.vector_norm(wanted, dtype=torch.float64))


def float32_error(case: EncoderCase, features: torch.Tensor, wanted: torch.Tensor) -> float:
    """`relative_error` of our encoder in float32 on the case's numbers."""
    model = _build(OurWhisper, case).float()
    error = relative_error(our_encoder(model)(features.float()), wanted)
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
    wanted = yardstick(case, on_device)
    exact = float32_error(case, on_device, wanted)
    _free(case.device)
    groups = [SYSTEMS] if case.device == "cpu" else [(name,) for name in SYSTEMS]
    rows = []
    for names in groups:
        blank = [_blank_row(case, name, description, environment, ceilings) for name in names]
        try:
            rows += _measure_group(case, blank, on_device, wanted)
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
        flops=encoder_flops(case.work),
    )


def _measure_group(
    case: EncoderCase, blank: Sequence[EncoderRow], features: torch.Tensor, wanted: torch.Tensor
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
                errors[place] = relative_error(states, wanted)
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
    encoder.forget_recordings()
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
