"""The command `whisper-flash transcribe`: recordings in, text out, the rest on standard error.

Exit codes: 0 all done; 1 some recordings failed; 2 misuse, or no model; 130 interrupted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from whisper_flash_attention.cli.parameters import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Preset,
    TemperatureIncrement,
    completion,
    decode_options,
    options_of,
    takes,
)
from whisper_flash_attention.cli.process import settle
from whisper_flash_attention.languages import LANGUAGES
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
    error_console,
    print_line,
    quiet_transformers,
    report_warnings,
)
from whisper_flash_attention.transcribe.arguments import MOST_ON_GPU, ON_CPU, parse_batch_size
from whisper_flash_attention.transcribe.inputs import find_inputs
from whisper_flash_attention.transcribe.output import Output, chosen_formats
from whisper_flash_attention.transcribe.runner import Runner
from whisper_flash_attention.transcribe.transcriber import Transcriber
from whisper_flash_attention.transcribe.writers import FORMATS


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
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up",
            help="Compile and allocate what the batch size needs before the first recording.",
            rich_help_panel=DECODING_PANEL,
        ),
    ] = False,
    output_format: Annotated[
        list[str] | None,
        typer.Option(
            *("--output-format", "-f"),
            metavar="NAME",
            autocompletion=completion((*FORMATS, "all")),
            help=f"{', '.join(FORMATS)} or all. Repeatable, or several with commas. Left out: txt.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            *("--output-dir", "-o"),
            metavar="DIR",
            help="Write files here instead of standard output. Existing files are skipped.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json-lines", help="Print a line of JSON per segment as it is decoded (UTF-8)."
        ),
    ] = False,
    colors: Annotated[
        bool,
        typer.Option(
            "--colors",
            help="Colour the words on a terminal by their probability, from red to green; brings "
            "word times.",
        ),
    ] = False,
    temperature_increment_on_fallback: TemperatureIncrement = None,
    verbose: Annotated[
        bool,
        typer.Option(
            *("--verbose", "-v"),
            help="Show the times of segments on a terminal, what the model runs on, and "
            "Transformers' own messages.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            *("--quiet", "-q"),
            help="Show only errors and warnings: no text as it is decoded, no progress and no last "
            "line.",
        ),
    ] = False,
    **given: Any,
) -> None:
    """Turn recordings into text or subtitles.

    The text goes to standard output, or into files with --output-dir, in which the
    sub-folders of a folder are kept. Interrupted, the same command then goes on where it stopped.

    \b
    Examples:
      whisper-flash transcribe talk.mp3
      whisper-flash transcribe talk.mp3 --model turbo --language german
      whisper-flash transcribe recordings -f srt,txt --output-dir subtitles --max-line-width 42
      whisper-flash transcribe lecture.mp4 --mode batched --batch-size 32
      whisper-flash transcribe call.wav --hotwords "Kubernetes, Istio" --preset accurate
      whisper-flash transcribe call.wav --channel each  (a speaker on each channel)
      whisper-flash transcribe 'talks/**/*.flac' --json-lines > segments.jsonl
      whisper-flash transcribe - < talk.mp3
      whisper-flash transcribe talk.mp3 --model package:tiny.en  (needs no Hub)

    Exit codes: 0 all done; 1 some recordings failed; 2 misuse, or the model cannot be
    loaded; 130 interrupted.
    """
    inputs = find_inputs(files)
    subtitles = options_of(SubtitleOptions, given)
    output = Output(
        *(chosen_formats(output_format or ()), output_dir, subtitles),
        overwrite=overwrite,
        json_lines=json_lines,
        live=not quiet,
        timed=verbose,
        coloured=colors,
    )
    model = options_of(ModelOptions, given)
    options = options_of(TranscribeOptions, given)
    if colors:
        given.setdefault("word_timestamps", True)
    decode = decode_options(preset, given, temperature_increment_on_fallback)
    windows = parse_batch_size(batch_size)
    output.prepare(inputs)
    todo = [entry for entry in inputs if not output.is_done(entry)]
    console = error_console()
    progress = FileProgress(console, [entry.name for entry in todo], ahead=True, shown=not quiet)
    runner = Runner(
        *(options, decode, windows, output, progress), headed=len(inputs) > 1, warm_up=warm_up
    )
    try:
        level = logging.INFO if verbose else logging.WARNING
        with ExitStack() as stack, report_warnings(progress.tell, level=level):

            def open_model() -> Transcriber:
                transcriber = Transcriber.from_pretrained(**asdict(model), quiet=not verbose)
                settle()
                if not verbose:
                    stack.enter_context(quiet_transformers())
                return transcriber

            runner.run(todo, open_model)
    except KeyboardInterrupt as error:
        print_line(console, _interruption(runner, len(inputs), len(todo)))
        raise typer.Exit(EXIT_INTERRUPTED) from error
    if output.stdout.lost is not None:
        print_line(
            console,
            f"warning: standard output is {output.stdout.lost}, which lacks some characters of the "
            "text; they are ? there. PYTHONIOENCODING=utf-8, --json-lines or --output-dir keeps "
            "them",
        )
    if verbose and runner.transcriber is not None:
        print_line(console, f"{model.source}: {runner.transcriber.describe()}")
    for line in [] if quiet else _summary(runner, len(inputs), len(todo)):
        print_line(console, line)
    if runner.failures:
        raise typer.Exit(EXIT_FAILED)


def _summary(runner: Runner, total: int, todo: int) -> Sequence[str]:
    """Lines that say what was not done, and last the languages, the files and the speed."""
    lines = []
    if todo < total:
        skipped = "1 recording" if total - todo == 1 else f"{total - todo} recordings"
        lines.append(f"{skipped} skipped: the files are there already (--overwrite replaces them)")
    if runner.failures and total > 1:
        lines.append(f"{runner.failures} of {total} failed")
    if runner.languages:
        parts = [spoken(runner.languages)]
        if runner.done and runner.output.folder is not None:
            files = runner.done * len(runner.output.formats)
            count = "1 file" if files == 1 else f"{files} files"
            parts.append(f"{count} written to {runner.output.folder}")
        parts.append(describe_speed(runner.audio_seconds, runner.work_seconds))
        lines.append(", ".join(parts))
    return lines


def spoken(languages: Sequence[tuple[str, float | None]]) -> str:
    """The languages of recordings: of one with its probability, of several with their numbers."""
    if len(languages) == 1:
        [(code, probability)] = languages
        # An English-only model is sure of it.
        sure = "" if probability in (None, 1.0) else f" ({100 * (probability or 0.0):.0f} %)"
        return f"{LANGUAGES[code]}{sure}"
    counts = Counter(code for code, _ in languages).most_common()
    return ", ".join(f"{LANGUAGES[code]}: {count}" for code, count in counts)


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
