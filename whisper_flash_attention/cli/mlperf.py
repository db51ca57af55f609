"""The command `benchmark mlperf`: MLPerf's load generator over this package, unofficially.

Exit codes: 0 measured; 2 the options are invalid or nothing could be measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from whisper_flash_attention import validation as check
from whisper_flash_attention.benchmark.processes import ended_by_sigterm
from whisper_flash_attention.cli.parameters import (
    Commit,
    RandomWeights,
    folder,
    number,
    options_of,
    takes,
)
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.terminal import error_console, print_line

# As many as published results have for a sample, 64 to 75.
RANDOM_TOKENS = 75


@takes("mlperf", ModelOptions)
@ended_by_sigterm()
def mlperf_command(
    manifest: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MANIFEST]",
            help="JSON, or lines of JSON, with a file and a transcript each. Left out: the "
            "recordings that come with this package, joined in 24 orders.",
            show_default=False,
        ),
    ] = None,
    *,
    random_weights: RandomWeights = None,
    new_tokens: Annotated[
        int | None,
        number(help="Tokens of every sample. Left out: the model decides; random weights give 75."),
    ] = None,
    batch_size: Annotated[
        int | None, number(help="Samples at a time. Left out: 128; 4 on a CPU.")
    ] = None,
    seconds: Annotated[
        float, number(help="Least duration of the performance run; the rules ask 600.")
    ] = 600.0,
    target_qps: Annotated[
        float | None,
        number(
            help="Samples per second that the load generator expects. Left out: measured before."
        ),
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy/--no-accuracy", help="Word error rate of all samples.")
    ] = True,
    performance: Annotated[
        bool, typer.Option("--performance/--no-performance", help="Samples per second.")
    ] = True,
    output: Annotated[
        Path, folder("--output", "-o", help="Folder for log files and row.json.")
    ] = Path("mlperf-results"),
    commit: Commit = None,
    **given: Any,
) -> None:
    """Run MLPerf Inference's Offline scenario for Whisper, unofficially.

    MLPerf's load generator (pip install mlcommons-loadgen) hands samples of up to 30 s to this
    package, takes the time and writes its log files. Samples are consecutive recordings of the
    manifest, joined. The result is not an MLPerf result: it is neither submitted nor reviewed, and
    the recordings are yours. Word error rates are after Whisper's normaliser of English; random
    weights have none.

    Written to the output folder: performance/ and accuracy/ with the load generator's log files,
    and row.json.

    \b
    Examples:
      whisper-flash benchmark mlperf --model tiny.en --seconds 60
      whisper-flash benchmark mlperf dev-all.json --model large-v3
      whisper-flash benchmark mlperf --random-weights large-v3 --seconds 120 --no-accuracy
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.mlperf import (
        MlperfCase,
        load_generator,
        measure_mlperf,
        sample_library,
    )
    from whisper_flash_attention.benchmark.settings import MODEL_SIZES
    from whisper_flash_attention.benchmark.throughput import ThroughputCase, random_transcriber
    from whisper_flash_attention.devices import device_and_dtype
    from whisper_flash_attention.transcribe import Transcriber

    model = options_of(ModelOptions, given)
    target, precision = device_and_dtype(model)
    check.optional(check.one_of, "random_weights", random_weights, MODEL_SIZES)
    if random_weights and new_tokens is None:
        new_tokens = RANDOM_TOKENS
    case = MlperfCase(
        random_weights or model.source,
        random_weights is not None,
        str(target),
        precision,
        batch_size or (4 if target.type == "cpu" else 128),
        new_tokens,
        seconds,
        target_qps,
        accuracy,
        performance,
    )
    load_generator()
    samples = sample_library(manifest)
    if random_weights:
        work = (case.batch_size, new_tokens or RANDOM_TOKENS)
        transcriber = random_transcriber(
            ThroughputCase(random_weights, "flash", *work, False, 1, str(target), precision)
        )
    else:
        transcriber = Transcriber.from_pretrained(
            model.source, device=model.device, compute_type=model.compute_type
        )
    environment = describe_environment(str(target), commit).as_json()
    row = measure_mlperf(case, transcriber, samples, output, environment)
    path = output / "row.json"
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    show_mlperf(row)
    print_line(error_console(), f"wrote {path}")


def show_mlperf(row: dict[str, Any]) -> None:
    """The figures on standard output, and what they are not."""
    lines = [f"{row['library_samples']} samples of {row['library_seconds']:.0f} s"]
    if "samples_per_second" in row:
        lines.append(
            f"{row['samples_per_second']:.2f} samples/s, {row['realtime_factor']:.1f} x real time, "
            f"{row['tokens_per_sample']:.1f} tokens a sample; {row['verdict']}"
        )
    if row.get("wer") is not None:
        lines.append(f"word error rate {row['wer']:.2%}")
    for line in (*lines, row["note"]):
        print_line(Console(soft_wrap=True, highlight=False), line)
