"""The command `whisper-flash parity`: the same tokens as stock Transformers, and if not, why not.

Exit codes: 0 all differences are near-ties; 1 some are not, or logits are not finite; 2 the options
are invalid, or there is nothing to compare; 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    Commit,
    file,
    model_names,
    named,
    number,
    options_of,
    takes,
)
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.parity.cases import ParityOptions
from whisper_flash_attention.terminal import print_line

if TYPE_CHECKING:
    from whisper_flash_attention.parity.cases import Clips
    from whisper_flash_attention.parity.models import Models
    from whisper_flash_attention.parity.report import Report


@takes("parity", ModelOptions)
def parity_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="SOURCE",
            autocompletion=model_names,
            help="Short name (tiny.en, small, turbo ...), Hub id, folder (Transformers or "
            "faster-whisper), OpenAI .pt file, or package:tiny.en.",
        ),
    ],
    *,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="A recording, or a folder of recordings. Repeatable. A transcript beside one "
            "(talk.txt beside talk.flac) adds its word error rate.",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        file(help="Instead of recordings: an .npz file of log-mel features, [mel, 3000] each."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        named(
            help="greedy, timestamps, beams (5) or sampled (float32 on a CPU). Repeatable. Left "
            "out: all."
        ),
    ] = None,
    batch_size: Annotated[int, number(help="Recordings per call.")] = 8,
    limit: Annotated[int | None, number(help="At most N recordings.")] = None,
    language: Annotated[
        str,
        typer.Option(
            "--language",
            "-l",
            help="Spoken language, german or de; auto detects it with both, and compares that.",
        ),
    ] = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="GAP",
            help="Gap in logits that explains a difference. Left out: 0.001 in float32, 0.1 in "
            "float16, 0.7 in bfloat16, or more where stock itself errs more.",
        ),
    ] = None,
    seed: Annotated[int, number(help="Of the random numbers of sampled.")] = 0,
    output: Annotated[
        Path | None, file("--output", "-o", help="Write everything there, as JSON.")
    ] = None,
    commit: Commit = None,
    **given: Any,
) -> None:
    """Compare our tokens with those of stock Transformers.

    Runs stock Whisper (eager attention) and this package on the first 30 s of
    each recording, same features, dtype and device. Where tokens differ, stock's
    own scores (in float32) show whether that was a near-tie. Exit code 1 if
    anything stays unexplained.

    \b
    Examples:
      whisper-flash parity --model small --audio recordings
      whisper-flash parity --model package:tiny.en --audio talk.flac --mode greedy
      whisper-flash parity --model turbo --audio recordings --dtype float16 --output parity.json
    """
    spoken = _language(language)
    options = ParityOptions(mode or (), batch_size, limit, spoken, tolerance, seed)
    if bool(audio) == (features is not None):
        raise OptionError("give either --audio (recordings, folders) or --features (one file)")
    _check_output(output)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    sources = (model, audio or [], features)
    runs_on = options_of(ModelOptions, given)
    settings = (runs_on.device, runs_on.compute_type, runs_on.attention)
    report = _run(sources, settings, options, console, commit)
    terminal = Console(highlight=False, soft_wrap=True)
    # A file or a pipe has no width of its own: give the table the room it needs.
    out = terminal if terminal.is_terminal else Console(highlight=False, soft_wrap=True, width=160)
    report.show(out)
    if output is not None:
        report.write(output)
        print_line(console, f"wrote {output}")
    if not report.outcome.is_good:
        raise typer.Exit(EXIT_FAILED)


def _language(name: str) -> str:
    from whisper_flash_attention.languages import AUTO, language_or_auto

    return language_or_auto(name) or AUTO


def _check_output(output: Path | None) -> None:
    """Find out before the work, not after it."""
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise OptionError(f"{output}: cannot be written (it or its folder is no such thing)")


def _run(
    sources: tuple[str, list[Path], Path | None],
    settings: tuple[str, str, str],
    options: ParityOptions,
    console: Console,
    commit: str | None,
) -> Report:
    from whisper_flash_attention.benchmark.environment import describe_environment
    from whisper_flash_attention.options import TranscribeOptions
    from whisper_flash_attention.parity.cases import find_recordings
    from whisper_flash_attention.parity.compare import compare
    from whisper_flash_attention.parity.models import load_models
    from whisper_flash_attention.parity.report import Report
    from whisper_flash_attention.terminal import quiet_transformers, report_warnings

    model, audio, features = sources
    device, dtype, attention = settings
    recordings = find_recordings(audio)[: options.limit]
    print_line(console, f"loading {model}, for stock and for us")

    def report(line: str) -> None:
        print_line(console, line)

    with quiet_transformers(), report_warnings(report):
        models = load_models(
            model,
            device=device,
            dtype=dtype,
            attention=attention,
            needs_extractor=features is None,
        )
        models.check(options)
        if options.language != "auto":
            known = tuple(models.language_ids) or ("en",)
            TranscribeOptions(language=options.language).check_model(known)
        clips = _read(models, recordings, features, options.limit, console)
        outcome = compare(models, clips.clips, options, console)
    facts = {
        "model": model,
        "dtype": models.dtype_name,
        "device": str(models.device),
        "attention": attention,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "environment": describe_environment(str(models.device), commit).as_json(),
    }
    tokenizer = None if models.processor is None else models.processor.tokenizer
    return Report(outcome, clips, facts, options.bound(models.dtype_name), tokenizer)


def _read(
    models: Models,
    recordings: list[Path],
    features: Path | None,
    limit: int | None,
    console: Console,
) -> Clips:
    """The clips, of which there must be some."""
    from whisper_flash_attention.parity.cases import read_features, read_recordings
    from whisper_flash_attention.terminal import FileProgress

    def report(line: str) -> None:
        print_line(console, line)

    if features is not None:
        clips = read_features(features, models.feature_shape, report)
        clips.clips = clips.clips[:limit]
    else:
        assert models.processor is not None
        with FileProgress(console, [path.name for path in recordings]) as progress:
            extractor = models.processor.feature_extractor
            clips = read_recordings(recordings, extractor, progress.begin, progress.tell)
    if not clips.clips:
        raise OptionError("there is nothing to compare: no recording could be read")
    return clips
