"""Time Whisper's encoder: this package's, and stock Transformers' with eager and SDPA attention.

    python benchmarks/encoder.py --output benchmarks/results/encoder-h100.json
    python benchmarks/encoder.py --repeats 0 --weights package:tiny.en --features speech.npz

Random weights, features of the bundled speech on the device, one process. The error is that of the
states, relative to stock's in float32 on the same numbers. `--weights` adds the errors of a
checkpoint in float32, float16 and bfloat16.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from whisper_flash_attention.benchmark.encoder import EncoderCase, EncoderRow, measure_case
from whisper_flash_attention.benchmark.encoder_fidelity import (
    FidelityRow,
    Speech,
    measure_fidelity,
)
from whisper_flash_attention.benchmark.environment import Environment, describe_environment
from whisper_flash_attention.benchmark.features import prepare_features
from whisper_flash_attention.benchmark.measure import measure_ceilings
from whisper_flash_attention.benchmark.settings import DTYPES, MODEL_SIZES, default_dtype
from whisper_flash_attention.config import resolve_device
from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.parity.cases import read_features
from whisper_flash_attention.parity.models import load_models

CPU_CHECKPOINTS, CPU_BATCHES, CPU_REPEATS = ("tiny", "base"), (1,), 5
GPU_CHECKPOINTS, GPU_BATCHES = ("tiny", "base", "small", "medium", "large-v3"), (1, 8, 32)
GPU_REPEATS = 20
# Clips of bundled speech that a checkpoint's errors are measured on where no file is given.
FIDELITY_CLIPS = 4
WIDTH = 130


def bundled_speech(clips: int, mel_bins: int) -> Speech:
    """Features of so many clips, as the main benchmark makes them."""
    with tempfile.TemporaryDirectory() as folder:
        made = prepare_features("bundled", mel_bins, clips, Path(folder) / "features.npy")
        return Speech(torch.from_numpy(np.load(made.path)), made.description)


def time_encoders(
    cases: list[EncoderCase], environment: Environment, console: Console
) -> list[EncoderRow]:
    """Rows of all cases; each is told when it is done."""
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
    source: str, path: Path | None, environment: Environment, device: str, console: Console
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


def timing_table(rows: list[EncoderRow]) -> Table:
    """One line per row; the ratios are stock's time over the row's."""
    times = {
        (row.checkpoint, row.batch_size, row.system): row.seconds_per_batch
        for row in rows
        if row.seconds
    }
    first = rows[0]
    columns = ("checkpoint", "batch", "system", "ms", "x vs eager", "x vs sdpa", "TFLOP/s")
    title = f"encoder, {first.environment['device_name']}, {first.dtype}, medians"
    table = Table(*columns, "% of matmul", "peak MB", "error", title=title)
    for row in rows:
        name = (row.checkpoint, str(row.batch_size), row.system)
        typical = row.seconds_per_batch
        if typical is None:
            table.add_row(*name, row.error)
            continue
        stock = [times.get((row.checkpoint, row.batch_size, each)) for each in ("orig", "sdpa")]
        numbers = row.as_json()
        peak = row.activation_bytes
        table.add_row(
            *name,
            f"{1e3 * typical:.2f}",
            *("-" if each is None else f"{each / typical:.2f}" for each in stock),
            f"{numbers['tflops_per_second']:.2f}",
            f"{100 * numbers['matmul_share']:.0f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
            f"{row.states_error:.1e}",
        )
    return table


def fidelity_table(rows: list[FidelityRow]) -> Table:
    """One line per dtype."""
    title = f"{rows[0].checkpoint}: error of the states, {rows[0].clips} clips of speech"
    table = Table("dtype", "sdpa", "flash", "may be", "", title=title)
    table.add_column("sdpa, median position")
    table.add_column("flash, median position")
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        numbers = (stock.states_error, ours.states_error, ours.states_bound)
        verdict = "within" if ours.within_bound else "BEYOND"
        cells = [f"{number:.2e}" for number in numbers if number is not None]
        medians = (f"{row.position_error:.2e}" for row in (stock, ours))
        table.add_row(ours.dtype, *cells, verdict, *medians)
    return table


def select_cases(
    checkpoints: list[str], batches: list[int], device: str, dtype: str, repeats: int
) -> list[EncoderCase]:
    """Every checkpoint with every batch size.

    Raises:
        typer.BadParameter: a checkpoint or the dtype is unknown.
    """
    if unknown := [name for name in checkpoints if name not in MODEL_SIZES]:
        raise typer.BadParameter(f"checkpoint {unknown[0]!r}; possible: {', '.join(MODEL_SIZES)}")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype {dtype!r}; possible: {', '.join(DTYPES)}")
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
    commit: Annotated[str | None, typer.Option(help="Instead of what git says.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time the encoder, and measure its error."""
    if threads is not None:
        torch.set_num_threads(threads)
    target = str(resolve_device(device))
    on_cpu = target == "cpu"
    names = checkpoint or list(CPU_CHECKPOINTS if on_cpu else GPU_CHECKPOINTS)
    batches = batch or list(CPU_BATCHES if on_cpu else GPU_BATCHES)
    calls = (CPU_REPEATS if on_cpu else GPU_REPEATS) if repeats is None else repeats
    console = Console(width=WIDTH)
    environment = describe_environment(target, commit)
    timed: list[EncoderRow] = []
    compared: list[FidelityRow] = []
    if weights is not None:
        compared = compare_checkpoint(weights, features, environment, target, console)
    if calls:
        cases = select_cases(names, batches, target, dtype or default_dtype(target), calls)
        timed = time_encoders(cases, environment, console)
    rows: list[dict[str, Any]] = [row.as_json() for row in (*timed, *compared)]
    if output is not None:
        document = {"environment": environment.as_json(), "rows": rows}
        output.write_text(json.dumps(document, indent=1) + "\n")
    if compared:
        console.print(fidelity_table(compared))
    if timed:
        console.print(timing_table(timed))


if __name__ == "__main__":
    typer.run(main)
