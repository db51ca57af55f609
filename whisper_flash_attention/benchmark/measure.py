"""One row of the benchmark, measured in a process of its own, and the ceilings of the machine.

The clock covers what a user pays for: the copy of the features to the device, `generate`, and the
wait for its result. Building the model, reading features and counting tokens are outside it.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from whisper_flash_attention.benchmark.environment import driver_memory
from whisper_flash_attention.benchmark.features import FeatureFile, batch_of
from whisper_flash_attention.benchmark.roofline import Ceilings
from whisper_flash_attention.benchmark.settings import MODEL_SIZES, Job
from whisper_flash_attention.benchmark.systems import Loaded, named
from whisper_flash_attention.errors import BenchmarkError

GB = 1e9


@dataclass(frozen=True)
class Measurement:
    """The measurements of a row. Times are in seconds, memory in units of 1e9 bytes.

    `tokens` are the ids of the first timed batch; `skipped` is the reason why nothing was run.
    """

    skipped: str | None = None
    first_call_seconds: float = 0.0
    seconds: tuple[float, ...] = ()
    tokens_checked: int = 0
    tokens: tuple[tuple[int, ...], ...] = ()
    attention: dict[str, str] = field(default_factory=dict)
    vram_driver_gb: float | None = None
    vram_source: str | None = None
    vram_allocated_gb: float | None = None
    rss_peak_gb: float = 0.0


def measure(job: Job, features: FeatureFile, report: Callable[[int], None]) -> Measurement:
    """Build the job's system, warm it up, and time it.

    Args:
        job: what to run.
        features: the clips; all systems get the same ones in the same order.
        report: called with the number of timed batches that are done, outside the clock.

    Raises:
        BenchmarkError: a call gave another number of tokens than requested.
    """
    # Stock `generate` warns at every call.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    system, size = named(job.system), MODEL_SIZES[job.row.checkpoint]
    if reason := system.why_not(device, dtype):
        return Measurement(skipped=reason)
    layers, setting = job.row.decoder_layers, job.setting
    loaded = system.load(size, layers, setting.batch_size, device, dtype)
    clips = torch.from_numpy(np.load(features.path)).to(dtype)
    _forget_building(device)
    first, _ = _timed_call(loaded, _host_batch(clips, 0, job), job)
    _timed_call(loaded, _host_batch(clips, 1, job), job)
    seconds, outputs = [], []
    for index in range(setting.batches):
        took, ids = _timed_call(loaded, _host_batch(clips, index, job), job)
        seconds.append(took)
        outputs.append(check_tokens(ids, job))
        report(index + 1)
    driver, source = driver_memory(device)
    return Measurement(
        first_call_seconds=first,
        seconds=tuple(seconds),
        tokens_checked=sum(ids.numel() for ids in outputs),
        tokens=tuple(tuple(row) for row in outputs[0].tolist()),
        attention=loaded.attention,
        vram_driver_gb=driver,
        vram_source=source,
        vram_allocated_gb=_peak_allocated(device),
        rss_peak_gb=peak_rss(),
    )


def check_tokens(ids: torch.Tensor, job: Job) -> torch.Tensor:
    """The ids on the CPU, after counting them.

    Raises:
        BenchmarkError: they are not [batch size, new tokens] ids of the vocabulary.
    """
    wanted = (job.setting.batch_size, job.setting.new_tokens)
    if tuple(ids.shape) != wanted:
        raise BenchmarkError(f"wanted {wanted} new tokens, the system gave {tuple(ids.shape)}")
    ids = ids.cpu()
    vocabulary = MODEL_SIZES[job.row.checkpoint].vocabulary
    if ids.is_floating_point() or ids.min() < 0 or ids.max() >= vocabulary:
        found = f"{ids.dtype} from {ids.min().item()} to {ids.max().item()}"
        raise BenchmarkError(f"wanted ids below {vocabulary}, the system gave {found}")
    return ids


def peak_rss() -> float:
    """Peak resident memory of this process, in units of 1e9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def _host_batch(clips: torch.Tensor, index: int, job: Job) -> torch.Tensor:
    batch = batch_of(clips, index, job.setting.batch_size)
    return batch.pin_memory() if job.device.startswith("cuda") else batch


def _timed_call(loaded: Loaded, batch: torch.Tensor, job: Job) -> tuple[float, torch.Tensor]:
    device = torch.device(job.device)
    synchronize(device)
    start = time.perf_counter()
    ids = loaded.generate(batch, job.setting.new_tokens)
    synchronize(device)
    return time.perf_counter() - start, ids


def _forget_building(device: torch.device) -> None:
    """Exclude memory needed to build the weights from the peaks."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_allocated(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None


MIB = 2**20
ROUNDS = 5


def measure_ceilings(device_name: str, dtype_name: str) -> Ceilings:
    """Copy a large array and multiply two large matrices on the device.

    Bandwidth counts bytes read plus bytes written. Sizes are smaller on a CPU. Both are the best of
    a few rounds, which are long compared with a launch.
    """
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    on_cpu = device.type == "cpu"
    count = (128 if on_cpu else 1024) * MIB // dtype.itemsize
    origin = torch.ones(count, dtype=dtype, device=device)
    target = torch.zeros_like(origin)  # touched, so that no page faults are timed
    copied = _best_seconds(lambda: target.copy_(origin), device)
    side = 8192
    if on_cpu:
        side = 2048 if dtype is torch.float32 else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    multiplied = _best_seconds(lambda: torch.mm(a, b, out=product), device)
    return Ceilings(2 * count * dtype.itemsize / copied, 2 * side**3 / multiplied)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, in the best of `ROUNDS` rounds."""
    calls = 1 if device.type == "cpu" else 10
    rounds = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
