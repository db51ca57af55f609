"""The command `whisper-flash transcribe`: recordings in, text out, the rest on standard error.

Exit codes: 0 all done; 1 some recordings failed; 2 misuse, or no model; 130 interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Preset,
    decode_options,
    options_of,
    takes,
)
from whisper_flash_attention.options import (
    DECODING_PANEL,
    DecodeOptions,
    ModelOptions,
    SubtitleOptions,
    TranscribeOptions,
)
from whisper_flash_attention.terminal import (
    FileProgress,
    describe_speed,
    print_line,
    quiet_transformers,
    report_warnings,
)
from whisper_flash_attention.transcribe.arguments import MOST_ON_GPU, ON_CPU, parse_batch_size
from whisper_flash_attention.transcribe.inputs import find_inputs
from whisper_flash_attention.transcribe.output import Output, chosen_formats
from whisper_flash_attention.transcribe.runner import Runner
from whisper_flash_attention.transcribe.transcriber import Transcriber


@takes("transcribe", ModelOptions, TranscribeOptions, DecodeOptions, SubtitleOptions)
def transcribe_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Recordings (wav, flac, mp3, ogg, opus, m4a, mp4 ...), folders of them, quoted "
            "patterns ('talks/**/*.mp3'), or - for standard input.",
        ),
    ],
    preset: Preset = "balanced",
    *,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Windows that are decoded at a time: of as many recordings, or chunks of speech "
            f"in batched mode. auto is {ON_CPU} on a CPU; on a GPU what fits into half of its free "
            f"memory, at most {MOST_ON_GPU['sequential']}, or {MOST_ON_GPU['batched']} chunks.",
            rich_help_panel=DECODING_PANEL,
        ),
    ] = "auto",
    output_format: Annotated[
        list[str] | None,
        typer.Option(
            *("--output-format", "-f"),
            metavar="NAME",
            help="txt, json, srt, vtt, tsv, lrc or all. Repeatable, or several with commas. Left "
            "out: txt.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            *("--output-dir", "-o"),
            help="Write files here instead of standard output. Existing files are skipped.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json-lines", help="Print a line of JSON per segment as each recording is done."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what Transformers prints, and why it is needed."
        ),
    ] = False,
    **given: Any,
) -> None:
    """Turn recordings into text or subtitles.

    The text goes to standard output, or into files with [b]--output-dir[/b], in which the
    sub-folders of a folder are kept. Interrupted, the same command then goes on where it stopped.

    [b]Examples[/b]

      whisper-flash transcribe talk.mp3

      whisper-flash transcribe talk.mp3 --model turbo --language german

      whisper-flash transcribe recordings -f srt,txt --output-dir subtitles --max-line-width 42

      whisper-flash transcribe lecture.mp4 --mode batched --batch-size 32

      whisper-flash transcribe call.wav --hotwords "Kubernetes, Istio" --preset accurate

      whisper-flash transcribe call.wav --channel each  [dim](a speaker on each channel)[/dim]

      whisper-flash transcribe 'talks/**/*.flac' --json-lines > segments.jsonl

      whisper-flash transcribe - < talk.mp3

      whisper-flash transcribe talk.mp3 --model package:tiny.en  [dim](needs no Hub)[/dim]

    [b]Exit codes[/b]: 0 all done; 1 some recordings failed; 2 misuse, or the model cannot be
    loaded; 130 interrupted.
    """
    inputs = find_inputs(files)
    subtitles = options_of(SubtitleOptions, given)
    output = Output(
        *(chosen_formats(output_format or ()), output_dir, subtitles),
        overwrite=overwrite,
        json_lines=json_lines,
    )
    model = options_of(ModelOptions, given)
    options = options_of(TranscribeOptions, given)
    decode = decode_options(preset, given)
    windows = parse_batch_size(batch_size)
    output.prepare(inputs)
    todo = [entry for entry in inputs if not output.is_done(entry)]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = FileProgress(console, [entry.name for entry in todo])
    runner = Runner(*(options, decode, windows, output, progress), headed=len(inputs) > 1)
    try:
        level = logging.INFO if verbose else logging.WARNING
        with ExitStack() as stack, report_warnings(progress.tell, level=level):

            def open_model() -> Transcriber:
                transcriber = Transcriber.from_pretrained(**asdict(model), quiet=not verbose)
                if not verbose:
                    stack.enter_context(quiet_transformers())
                return transcriber

            runner.run(todo, open_model)
    except KeyboardInterrupt as error:
        print_line(console, _interruption(runner, len(inputs), len(todo)))
        raise typer.Exit(EXIT_INTERRUPTED) from error
    for line in _summary(runner, model.source, len(inputs), len(todo)):
        print_line(console, line)
    if runner.failures:
        raise typer.Exit(EXIT_FAILED)


def _summary(runner: Runner, model: str, total: int, todo: int) -> Sequence[str]:
    """Lines that say what ran, how fast, and what did not."""
    lines = []
    if runner.transcriber is not None:
        lines.append(f"{model}: {runner.transcriber.describe()}")
    if runner.audio_seconds:
        lines.append(describe_speed(runner.audio_seconds, runner.work_seconds))
    if todo < total:
        lines.append(f"{total - todo} {'was' if total - todo == 1 else 'were'} there already")
    if runner.failures and total > 1:
        lines.append(f"{runner.failures} of {total} failed")
    return lines


def _interruption(runner: Runner, total: int, todo: int) -> str:
    """One line that says how far it is, and how to go on."""
    done = total - todo + runner.done
    if runner.output.resumes:
        further = "the same command goes on with the others"
    elif total == 1:
        further = "the same command starts it again"
    elif runner.output.folder is not None:
        further = "to go on, name the others"
    else:
        further = "to go on, name the others (into --output-dir, the same command would go on)"
    return (
        f"interrupted: {done} of {total} {'file is' if total == 1 else 'files are'} done; {further}"
    )
