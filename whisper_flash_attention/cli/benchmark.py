"""The commands `benchmark`, `benchmark throughput` and `benchmark mlperf`: from options to rows.

Exit codes: 0 every row is ok; 1 some are not; 2 the options are invalid or nothing could be
measured; 130 interrupted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from whisper_flash_attention import validation as check
from whisper_flash_attention.benchmark import settings as plan
from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    options_of,
    takes,
)
from whisper_flash_attention.errors import BenchmarkError, OptionError
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.terminal import print_line

if TYPE_CHECKING:
    from whisper_flash_attention.benchmark.features import Samples
    from whisper_flash_attention.benchmark.runner import Options, Outcome
    from whisper_flash_attention.benchmark.throughput import ThroughputCase, ThroughputRow


@takes("benchmark", ModelOptions)
def benchmark_command(
    *,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="default (batch 1, 25 tokens, 100 batches), large (32, 256, 10) or small "
            "(1, 8, 5). Repeatable. Left out: default and large; on a CPU, small.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="tiny, base, small, medium, large-v3 or large-v3-turbo. Repeatable. Left out: "
            "the first four.",
        ),
    ] = None,
    decoder_layers: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Only rows with N decoder layers. Repeatable. Left out: all."
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="orig, sdpa, static, flash, or flash:<back-end>. Repeatable. Left out: orig, "
            "sdpa and flash.",
        ),
    ] = None,
    batches: Annotated[
        int | None, typer.Option(metavar="N", help="Timed calls, instead of the setting's.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens per clip, instead of the setting's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Clips per call, instead of the setting's.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Speech: bundled (with this package) or librispeech (from the Hub).",
        ),
    ] = "bundled",
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder for results; made if missing."
        ),
    ] = Path("benchmark-results"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Keep rows that an earlier run finished in this folder."
        ),
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Seconds after which a row is given up as failed."),
    ] = 1800.0,
    commit: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Commit to record instead of git's."),
    ] = None,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report", help="Measure nothing: tables and plots from the output folder's rows."
        ),
    ] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show systems and rows, and what can run here; stop.")
    ] = False,
    **given: Any,
) -> None:
    """Measure this package against stock Whisper, row by row.

    A row is one system on one model at one setting, in a process of its own.
    Weights are random, the speech is real, and every system decodes the same
    number of tokens from the same features. A row that fails records the reason,
    and the run goes on. After an interruption, the same command resumes it.

    Written to the output folder: results.jsonl (as it goes), results.json,
    results.csv, results.md, plots, tokens.jsonl, and failures.log if a row failed.

    \b
    Examples:
      whisper-flash benchmark   # both tables of a GPU, or the small one of a CPU
      whisper-flash benchmark --setting default --checkpoint tiny --checkpoint base
      whisper-flash benchmark --system orig --system flash:sdpa_flash --dtype bfloat16
      whisper-flash benchmark --report --output benchmarks/results/h100
      whisper-flash benchmark --list
      whisper-flash benchmark throughput --help   # from samples in memory to text
      whisper-flash benchmark mlperf --help   # MLPerf's load generator, unofficially
      whisper-flash benchmark peers --help   # beside other systems, from files to text
    """
    model = options_of(ModelOptions, given)
    device, dtype = model.device, model.compute_type
    if report_only:
        show_outcome(report_again(output), Console(stderr=True))
        return
    systems = system or plan.DEFAULT_SYSTEMS
    rows = plan.select_rows(checkpoint or (), decoder_layers or ())
    sizes = {"batch_size": batch_size, "new_tokens": new_tokens, "batches": batches}
    plan.select_settings(setting or (), **sizes)  # mistakes come out before heavy imports
    if timeout <= 0:
        raise OptionError(f"timeout is {timeout:g}: give a number of seconds above 0")

    from whisper_flash_attention.benchmark.processes import start_server
    from whisper_flash_attention.devices import resolve_device, resolve_dtype

    if list_only:
        show_list(device, dtype)
        return
    start_server()  # imports there while we import here
    target = resolve_device(device)
    precision = str(resolve_dtype(dtype, target)).removeprefix("torch.")
    chosen = plan.select_settings(setting or plan.default_settings(target.type), **sizes)

    from whisper_flash_attention.benchmark.runner import Options
    from whisper_flash_attention.benchmark.systems import named

    for name in systems:
        named(name)
    jobs = plan.plan_jobs(chosen, rows, systems, device=str(target), dtype=precision)
    console = Console(stderr=True)
    if not setting and target.type == "cpu":
        console.print("no GPU: the small setting; --setting default --setting large for the rest")
    outcome = run_or_explain_resuming(
        jobs, Options(output, features, timeout, resume, commit), console
    )
    show_outcome(outcome, console)
    if any(row.status != "ok" for row in outcome.requested):
        raise typer.Exit(EXIT_FAILED)


def report_again(folder: Path) -> Outcome:
    """The outcome of the rows that `folder` holds, its derived files written anew.

    Raises:
        BenchmarkError: there are no rows.
    """
    from whisper_flash_attention.benchmark.report import write_outputs
    from whisper_flash_attention.benchmark.results import Store
    from whisper_flash_attention.benchmark.runner import Outcome

    rows = Store(folder).rows() if (folder / "results.jsonl").is_file() else []
    if not rows:
        raise BenchmarkError(f"{folder} holds no rows (results.jsonl): measure some first")
    return Outcome(rows, rows, write_outputs(rows, folder, Console(stderr=True)))


def run_or_explain_resuming(
    jobs: Sequence[plan.Job], options: Options, console: Console
) -> Outcome:
    """The run's outcome; on Ctrl-C, a hint and exit code 130."""
    from whisper_flash_attention.benchmark.runner import run

    try:
        return run(jobs, options, console)
    except KeyboardInterrupt as error:
        console.print("interrupted; the same command resumes where this one stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from error


def show_outcome(outcome: Outcome, console: Console) -> None:
    """The tables on standard output; where the files are on standard error."""
    from whisper_flash_attention.benchmark.report import as_renderable

    terminal = Console()
    # A file or a pipe has no width of its own: give the tables the room they need.
    out = terminal if terminal.is_terminal else Console(width=220)
    out.print(as_renderable(outcome.requested))
    for path in outcome.files:
        print_line(console, f"wrote {path}")


def show_list(device: str, dtype: str) -> None:
    """Systems and whether they can run here, settings, and rows, on standard output."""
    from whisper_flash_attention.benchmark.systems import SYSTEMS, backend_systems
    from whisper_flash_attention.devices import resolve_device, resolve_dtype

    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    systems = Table("System", "What it is", f"On {target}, {str(precision).removeprefix('torch.')}")
    for system in (*SYSTEMS.values(), *backend_systems().values()):
        reason = system.why_not(target, precision) or "can run"
        # As text: in markup, the brackets of a package's extra would vanish.
        systems.add_row(system.name, system.summary, Text(reason))
    settings = Table("Setting", "Batch size", "New tokens", "Batches")
    for item in plan.SETTINGS.values():
        settings.add_row(item.name, str(item.batch_size), str(item.new_tokens), str(item.batches))
    rows = Table("Checkpoint", "Decoder layers", "Left out unless named")
    for name, layers in plan.DECODER_LAYERS.items():
        named_only = "" if name in plan.DEFAULT_CHECKPOINTS else "yes"
        rows.add_row(name, ", ".join(map(str, layers)), named_only)
    out = Console()
    for table in (systems, settings, rows):
        out.print(table)


FILES_PANEL = "From files"

# Enough batches for host and device to work side by side.
LEAST_BATCHES, LEAST_WINDOWS = 4, 8
# What makes two rows stand for the same thing: the newer one is kept.
SLOT = (
    *("setting", "checkpoint", "system", "batch_size", "new_tokens", "word_timestamps"),
    *("device", "dtype", "entry", "mode", "container", "workers", "recordings", "threads"),
)


@takes("throughput", ModelOptions)
def throughput_command(
    *,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="tiny, base, small, medium, large-v3 or large-v3-turbo. Repeatable. Left out: "
            "tiny.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Windows at a time. Repeatable. Left out: 16; 2 on a CPU."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of every window of 30 s.")
    ] = 100,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="N", help="Sound to transcribe. Left out: four batches of it."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Recordings to take, over and over. Repeatable. Left out: this package's own.",
        ),
    ] = None,
    word_timestamps: Annotated[
        bool,
        typer.Option("--word-timestamps", help="Measure each row with words' times, too."),
    ] = False,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="flash (this package, from samples to text) or sdpa (stock Transformers, from "
            "features to text). Repeatable. Left out: flash.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed runs.")] = 3,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="NAME",
            help="memory (windows of 30 s), or files (from files on disk to written text).",
        ),
    ] = "memory",
    entry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="From files: memory (the same recordings as arrays), transcribe, transcribe_each, "
            "command, batch-local or batch-ray. Repeatable. Left out: all but batch-ray.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="batched or sequential. Repeatable. Left out: batched.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    container: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="wav, flac (16 kHz mono), mp3 or m4a (44.1 kHz stereo). Repeatable. Left out: "
            "all of them.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    recordings: Annotated[
        int, typer.Option(metavar="N", help="Files.", rich_help_panel=FILES_PANEL)
    ] = 8,
    length: Annotated[
        str,
        typer.Option(
            metavar="SECONDS",
            help="Of every file, or a range (1-15).",
            rich_help_panel=FILES_PANEL,
        ),
    ] = "60",
    threads: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Measure decoding alone in N processes, too. Repeatable.",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(metavar="N", help="GPUs of batch-ray.", rich_help_panel=FILES_PANEL),
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            *("--output", "-o"),
            metavar="FILE",
            help="JSON file for the rows; rows that it has of other cases stay.",
        ),
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Commit to record instead of git's."),
    ] = None,
    **given: Any,
) -> None:
    """Measure how much faster than real time recordings become text.

    From samples in memory to text, or from files to written text, by random weights that give the
    same number of tokens for every window of 30 s. Besides the factor, the time of each part of a
    batch, run alone: copies, log-mel, encoder, decoder, text and segments, words.

    \b
    Examples:
      whisper-flash benchmark throughput --checkpoint large-v3-turbo --batch-size 128
      whisper-flash benchmark throughput --checkpoint tiny --batch-size 1 --word-timestamps
      whisper-flash benchmark throughput --system sdpa --system flash --output rows.json

      whisper-flash benchmark throughput --from files --container flac --recordings 96 --length 300
    """
    model = options_of(ModelOptions, given)
    device, dtype = model.device, model.compute_type
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.throughput import ThroughputCase, measure_throughput
    from whisper_flash_attention.devices import resolve_device, resolve_dtype

    target = resolve_device(device)
    precision = str(resolve_dtype(dtype, target)).removeprefix("torch.")
    sizes = batch_size or ([2] if target.type == "cpu" else [16])
    kinds = [(name, False) for name in system or ["flash"]]
    if word_timestamps:
        kinds += [(name, True) for name, _ in kinds if name == "flash"]
    cases = [
        ThroughputCase(name, kind, size, new_tokens, words, repeats, str(target), precision)
        for name in checkpoint or ["tiny"]
        for size in sizes
        for kind, words in kinds
    ]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    environment = describe_environment(str(target), commit).as_json()
    keeper = Keeper(output)
    check.one_of("source", source, ("memory", "files"))
    if source == "files":
        from whisper_flash_attention.benchmark.from_files import (
            CONTAINERS,
            ENTRIES,
            FilesCase,
            lengths_of,
            measure_files,
        )

        check.whole_number("recordings", recordings, least=1)
        lengths = lengths_of(length, recordings)
        for work in cases:
            chosen = [
                FilesCase(work, each, name, kind, workers if each == "batch-ray" else 1)
                for kind in container or CONTAINERS
                for name in mode or ["batched"]
                for each in entry or [each for each in ENTRIES if each != "batch-ray"]
            ]
            sound, _ = speech(audio or [], LEAST_WINDOWS)
            for found in measure_files(chosen, lengths, sound, threads or (), environment):
                keeper.keep(found)
                print_line(console, describe_files(found))
        if output is not None:
            print_line(console, f"wrote {output}")
        return
    rows = []
    for case in cases:
        samples, description = speech(audio or [], windows_of(case, minutes))
        row = measure_throughput(case, samples, description, environment)
        rows.append(row)
        keeper.keep(row.as_json())
        print_line(console, summarize(row))
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=200)).print(as_table(rows))
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(EXIT_FAILED)


def windows_of(case: ThroughputCase, minutes: float | None) -> int:
    """How many windows of 30 s a case transcribes.

    Raises:
        OptionError: it is less than one.
    """
    if minutes is None:
        return max(LEAST_BATCHES * case.batch_size, LEAST_WINDOWS)
    if minutes < 0.5:
        raise OptionError(f"minutes is {minutes:g}: give 0.5, a window, or more")
    return int(minutes * 2)


def speech(files: list[Path], windows: int) -> tuple[Samples, str]:
    """`count` windows of recordings, repeated as needed, and a description of them."""
    import numpy as np

    from whisper_flash_attention.benchmark.features import CLIP_SAMPLES, MOST_CLIPS, bundled_clips

    if files:
        from whisper_flash_attention.audio import load_audio

        loop = np.concatenate([load_audio(path) for path in files])
        origin = f"{len(files)} recordings of {loop.size / 16_000:.1f} s, repeated"
    else:
        clips, made_of = bundled_clips(min(windows, MOST_CLIPS))
        loop, origin = np.concatenate(clips), f"bundled: {made_of}"
    return np.resize(loop, windows * CLIP_SAMPLES), origin


class Keeper:
    """Rows in a JSON file, written anew with each one.

    Raises:
        BenchmarkError: the file is there and holds something else, or its folder is not there.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path is None:
            return
        if not path.parent.is_dir():
            raise BenchmarkError(f"output {path}: there is no folder {path.parent}")
        if path.exists():
            try:
                self._rows = json.loads(path.read_text())["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise BenchmarkError(f"output {path} is there and holds no rows") from error

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, or replace that of the same case."""
        slot = [row.get(name) for name in SLOT]
        kept = [each for each in self._rows if [each.get(name) for name in SLOT] != slot]
        self._rows = [*kept, row]
        if self._path is not None:
            self._path.write_text(json.dumps({"rows": self._rows}, indent=1) + "\n")


def describe_files(row: dict[str, Any]) -> str:
    """A row of files, or of decoding alone, in a line."""
    factor = f"{row['realtime_factor']:.0f} x real time"
    if row["setting"] == "decode":
        return f"decoding {row['container']}, {row['threads']} at a time: {factor}"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in row["shares"].items())
    what = f"{row['checkpoint']}, {row['container']}, {row['mode']}, {row['entry']}"
    return f"{what}: {factor} ({shares})"


def summarize(row: ThroughputRow) -> str:
    """A row in one line, and what its parts take."""
    case = row.case
    words = ", words" if case.word_timestamps else ""
    head = f"{case.checkpoint}, {case.system}, batch {case.batch_size}{words}"
    if row.realtime_factor is None:
        return f"{head}: {row.status}: {row.error}"
    parts = "; ".join(f"{name} {1e3 * took:.2f} ms" for name, took in row.parts.items())
    return f"{head}: {row.realtime_factor:.0f} x real time" + (f" ({parts})" if parts else "")


def as_table(rows: list[ThroughputRow]) -> Table:
    """Cases and their factors."""
    device_name = rows[0].environment["device_name"]
    table = Table(
        *("checkpoint", "system", "dtype", "batch", "words", "x real time", "audio, min"),
        *("seconds", "GPU memory, GB"),
        title=f"{rows[0].case.new_tokens} tokens per 30 s, {device_name}",
    )
    for row in rows:
        case, factor, memory = row.case, row.realtime_factor, row.vram_allocated_gb
        table.add_row(
            *(case.checkpoint, case.system, case.dtype, str(case.batch_size)),
            "yes" if case.word_timestamps else "",
            row.error or f"{factor:.0f}",
            f"{row.audio_seconds / 60:.0f}",
            ", ".join(f"{each:.3f}" for each in row.seconds),
            "" if memory is None else f"{memory:.2f}",
        )
    return table


@takes("mlperf", ModelOptions)
def mlperf_command(
    manifest: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MANIFEST]",
            help="JSON, or lines of JSON, with a file and a transcript each. Left out: the "
            "recordings that come with this package.",
            show_default=False,
        ),
    ] = None,
    *,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Random weights instead of a checkpoint: tiny, base, small, medium, large-v3 or "
            "large-v3-turbo. Performance alone.",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens of every sample. Left out: the model decides; random weights give 75.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples at a time. Left out: 128; 4 on a CPU."),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(metavar="N", help="Least duration of the performance run; the rules ask 600."),
    ] = 600.0,
    target_qps: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Samples per second that the load generator expects. Left out: measured before.",
        ),
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy/--no-accuracy", help="Word error rate of all samples.")
    ] = True,
    performance: Annotated[
        bool, typer.Option("--performance/--no-performance", help="Samples per second.")
    ] = True,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for log files and row.json."),
    ] = Path("mlperf-results"),
    commit: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Commit to record instead of git's."),
    ] = None,
    **given: Any,
) -> None:
    """Run MLPerf Inference's Offline scenario for Whisper, unofficially.

    MLPerf's load generator (pip install mlcommons-loadgen) hands samples of up to 30 s to this
    package, takes the time and writes its log files. Samples are consecutive recordings of the
    manifest, joined. The result is not an MLPerf result: it is neither submitted nor reviewed, and
    the recordings are yours. Word error rates are after Whisper's normaliser of English.

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
    )
    from whisper_flash_attention.benchmark.settings import MODEL_SIZES
    from whisper_flash_attention.benchmark.throughput import ThroughputCase, random_transcriber
    from whisper_flash_attention.benchmark.utterances import read_utterances, repack
    from whisper_flash_attention.devices import resolve_device, resolve_dtype
    from whisper_flash_attention.transcribe import Transcriber

    model = options_of(ModelOptions, given)
    target = resolve_device(model.device)
    check.optional(check.one_of, "random_weights", random_weights, MODEL_SIZES)
    if random_weights and new_tokens is None:
        new_tokens = RANDOM_TOKENS
    precision = str(resolve_dtype(model.compute_type, target)).removeprefix("torch.")
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
    samples = repack(read_utterances(manifest))
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
    print_line(Console(stderr=True), f"wrote {path}")


# As many as published results have for a sample, 64 to 75.
RANDOM_TOKENS = 75


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


@takes("serving", ModelOptions)
def serve_benchmark_command(
    *,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Random weights instead of a checkpoint: tiny, base, small, medium, large-v3 or "
            "large-v3-turbo. Every window has the same text.",
        ),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Connections that send as fast as they are answered. Repeatable, a row each. "
            "Left out: 1 and 8, if nothing else is measured.",
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="N",
            help="Requests per second, whose times count from when they were due. Repeatable, a "
            "row each.",
        ),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="One request at a time, beside the same call in Python."),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Clips of 30 s over N connections, beside the same windows in memory, N at a "
            "time.",
        ),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Live streams that speak at once. Repeatable, a row each."),
    ] = None,
    utterances: Annotated[int, typer.Option(metavar="N", help="Of 5 s, of each live stream.")] = 3,
    requests: Annotated[int, typer.Option(metavar="N", help="Requests of a row, at most.")] = 64,
    seconds: Annotated[
        float, typer.Option(metavar="N", help="After which a row sends no more requests.")
    ] = 120.0,
    clip_seconds: Annotated[float, typer.Option(metavar="N", help="Length of a recording.")] = 5.0,
    container: Annotated[
        str, typer.Option(metavar="NAME", help="Of the recordings: flac or wav.")
    ] = "flac",
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens of a window, or one less. Left out: the model decides; random weights "
            "give 25.",
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", help="Of the server. Left out: what it chooses.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="JSON of the rows and the machine."),
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Commit to record instead of git's."),
    ] = None,
    **given: Any,
) -> None:
    """Measure a server: requests per second, how long they take, and live streams.

    The server and its clients are processes of their own, on the loopback. Percentiles and
    requests per second are of the time in which all clients are busy.

    \b
    Examples:
      whisper-flash benchmark serve --model tiny.en
      whisper-flash benchmark serve --model tiny.en --alone --streams 2
      whisper-flash benchmark serve --random-weights large-v3-turbo --clients 256 --requests 4096
      whisper-flash benchmark serve --random-weights large-v3-turbo --rate 50 --requests 1000
      whisper-flash benchmark serve --random-weights large-v3-turbo --batch 128 --requests 1280
    """
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.benchmark.serve import (
        BenchmarkedServer,
        Load,
        ServerBenchmark,
        rounded,
        running,
    )
    from whisper_flash_attention.benchmark.settings import MODEL_SIZES
    from whisper_flash_attention.devices import resolve_device, resolve_dtype

    model = options_of(ModelOptions, given)
    check.optional(check.one_of, "random_weights", random_weights, MODEL_SIZES)
    if random_weights is None:
        source, device, dtype = model.source, model.device, model.compute_type
    else:
        target = resolve_device(model.device)
        source, device = random_weights, str(target)
        dtype = str(resolve_dtype(model.compute_type, target)).removeprefix("torch.")
    if not (clients or rate or alone or batch or streams):
        clients = [1, 8]
    load = Load(1, requests, seconds, clip_seconds, container, new_tokens=new_tokens)
    loads = [replace(load, clients=count) for count in clients or ()]
    # As many connections as requests that are under way if each takes two seconds.
    paced = [replace(load, clients=max(1, round(2 * each)), rate=each) for each in rate or ()]
    most = max([1, batch or 1, *(each.clients for each in (*loads, *paced)), *(streams or ())])
    served = BenchmarkedServer(
        *(source, device, dtype, random_weights is not None),
        slots=slots,
        max_requests=2 * most,
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    environment = describe_environment(str(resolve_device(model.device)), commit).as_json()
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(rounded(row))
        print_line(console, describe_served(rows[-1]))
        if output is not None:
            found = {"environment": environment, "server": asdict(served), "rows": rows}
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder, running(served) as url:
        measured = ServerBenchmark(served, url, Path(folder))
        for each in (*loads, *paced):
            keep(measured.measure_load(each))
        if alone:
            keep(measured.measure_alone(load))
        if batch:
            keep(measured.measure_batch(replace(load, clients=batch)))
        for count in streams or ():
            keep(measured.measure_streams(count, utterances))
    Console().print(served_table(rows))
    if output is not None:
        print_line(console, f"wrote {output}")
    if any(row["failures"] for row in rows):
        raise typer.Exit(EXIT_FAILED)


def describe_served(row: dict[str, Any]) -> str:
    """A row on one line."""
    kinds = {"load": "clients", "rate": "rate", "batch": "clients", "streams": "streams"}
    about = kinds.get(row["measure"])
    head = row["measure"] if about is None else f"{row['measure']} {row[about]:g}"
    figures = {
        "requests/s": row.get("requests_per_second"),
        "p50 ms": _ms(row.get("p50")),
        "p95 ms": _ms(row.get("p95")),
        "over Python ms": _ms(row.get("over_python")),
        "of memory": row.get("share_of_memory"),
        "first text p50 ms": _ms(row.get("first_text_p50")),
        "p95 ms ": _ms(row.get("first_text_p95")),
        "final text p50 ms": _ms(row.get("final_text_p50")),
        "p95 ms  ": _ms(row.get("final_text_p95")),
        "failed": row["failures"] or None,
    }
    shown = [f"{name.strip()} {value:.4g}" for name, value in figures.items() if value is not None]
    return f"{head}: {', '.join(shown)}" + (f" ({row['reason']})" if row["reason"] else "")


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def served_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of a server as a table."""
    table = Table("measure", "clients")
    for head in ("requests/s", "audio/s", "p50 ms", "p95 ms", "p99 ms", "failed"):
        table.add_column(head, justify="right")
    for row in rows:
        if row["measure"] == "streams":
            firsts = [f"{1000 * row[f'first_text_{name}']:.0f}" for name in ("p50", "p95")]
            lasts = [f"{1000 * row[f'final_text_{name}']:.0f}" for name in ("p50", "p95")]
            for name, (middle, late) in (("first text", firsts), ("final text", lasts)):
                figures = ("", "", middle, late, "", str(row["failures"]))
                table.add_row(name, str(row["streams"]), *figures)
            continue
        times = (f"{1000 * row[name]:.0f}" for name in ("p50", "p95", "p99"))
        rates = f"{row['requests_per_second']:.1f}", f"{row['audio_per_second']:.1f}"
        table.add_row(row["measure"], str(row["clients"]), *rates, *times, str(row["failures"]))
    return table
