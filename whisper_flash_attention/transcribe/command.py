"""The command `whisper-flash transcribe`: recordings in, text out, the rest on standard error.

Exit codes: 0 all done; 1 some recordings failed; 2 misuse, or no model; 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from whisper_flash_attention.config import (
    TranscribeOptions,
    parse_audio_track,
    parse_channel,
    preset,
)
from whisper_flash_attention.terminal import print_line
from whisper_flash_attention.terminal.messages import quiet_transformers, warnings_told
from whisper_flash_attention.terminal.progress import FileProgress, describe_speed
from whisper_flash_attention.transcribe import command_options as opt
from whisper_flash_attention.transcribe.arguments import parse_batch_size
from whisper_flash_attention.transcribe.inputs import find_inputs
from whisper_flash_attention.transcribe.output import Output, chosen_formats
from whisper_flash_attention.transcribe.runner import Runner
from whisper_flash_attention.transcribe.transcriber import Transcriber
from whisper_flash_attention.transcribe.writers import SubtitleOptions

EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 130
SUBTITLE_PANEL = "Subtitles (srt, vtt)"


def transcribe_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Recordings (wav, flac, mp3, ogg, opus, m4a, mp4 ...), folders of them, quoted "
            "patterns ('talks/**/*.mp3'), or - for standard input.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Short name (tiny.en, base, small, medium, large-v3, turbo), Hub id, folder "
            "(Transformers or faster-whisper), OpenAI .pt file, or package:tiny.en.",
        ),
    ] = "small",
    language: Annotated[
        str | None,
        typer.Option(
            "--language", "-l", help="Spoken language: german or de. Detected if left out."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="transcribe, or translate (into English).")
    ] = "transcribe",
    channel: opt.Channel = "mix",
    audio_track: opt.AudioTrack = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="auto (float16 on CUDA, float32 elsewhere), float32, float16, bfloat16."),
    ] = "auto",
    attention: Annotated[
        str, typer.Option(help="Attention back-end, as `whisper-flash doctor` lists them.")
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
            help="Write files here instead of standard output. What is there already is skipped.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there already.")
    ] = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json-lines", help="Print a line of JSON per segment as each recording is done."
        ),
    ] = False,
    preset_name: opt.PresetName = "balanced",
    mode: opt.Mode = None,
    vad: opt.Vad = None,
    vad_parameters: opt.VadParameters = None,
    multilingual: opt.Multilingual = None,
    batch_size: opt.BatchSize = "auto",
    word_timestamps: opt.WordTimestamps = None,
    initial_prompt: opt.InitialPrompt = None,
    carry_initial_prompt: opt.CarryInitialPrompt = None,
    hotwords: opt.Hotwords = None,
    prefix: opt.Prefix = None,
    condition_on_previous_text: opt.ConditionOnPreviousText = None,
    without_timestamps: opt.WithoutTimestamps = None,
    max_new_tokens: opt.MaxNewTokens = None,
    clip_timestamps: opt.ClipTimestamps = None,
    hallucination_silence_threshold: opt.HallucinationSilence = None,
    temperature: opt.Temperature = None,
    beam_size: opt.BeamSize = None,
    best_of: opt.BestOf = None,
    length_penalty: opt.LengthPenalty = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    no_repeat_ngram_size: opt.NoRepeatNgramSize = None,
    suppress_tokens: opt.SuppressTokens = None,
    compression_ratio_threshold: opt.CompressionRatioThreshold = None,
    logprob_threshold: opt.LogprobThreshold = None,
    no_speech_threshold: opt.NoSpeechThreshold = None,
    max_line_width: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The most characters of a line.", rich_help_panel=SUBTITLE_PANEL
        ),
    ] = None,
    max_line_count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The most lines at a time; needs --max-line-width.",
            rich_help_panel=SUBTITLE_PANEL,
        ),
    ] = None,
    max_gap: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Silence between words that have times, above which a new cue starts.",
            rich_help_panel=SUBTITLE_PANEL,
        ),
    ] = 3.0,
    highlight_words: Annotated[
        bool,
        typer.Option(
            "--highlight-words",
            help="Underline each word that has times while it is spoken.",
            rich_help_panel=SUBTITLE_PANEL,
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Transformers' own messages, too.")
    ] = False,
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
    destination = Output(
        *(chosen_formats(output_format or ()), output_dir),
        SubtitleOptions(max_line_width, max_line_count, max_gap, highlight_words),
        overwrite=overwrite,
        json_lines=json_lines,
    )
    options = TranscribeOptions(
        language=language,
        task=task,
        channel=parse_channel(channel),
        audio_track=None if audio_track is None else parse_audio_track(audio_track),
    )
    decode = preset(
        preset_name,
        mode=mode,
        vad_filter=vad,
        vad_parameters=opt.vad_parameters(vad_parameters),
        multilingual=multilingual,
        word_timestamps=word_timestamps or highlight_words or None,
        initial_prompt=initial_prompt,
        carry_initial_prompt=carry_initial_prompt,
        hotwords=hotwords,
        prefix=prefix,
        condition_on_previous_text=condition_on_previous_text,
        without_timestamps=without_timestamps,
        max_new_tokens=max_new_tokens,
        clip_timestamps=opt.seconds(clip_timestamps),
        hallucination_silence_threshold=hallucination_silence_threshold,
        temperature=tuple(temperature) if temperature else None,
        beam_size=beam_size,
        best_of=best_of,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        suppress_tokens=opt.token_ids(suppress_tokens),
        compression_ratio_threshold=compression_ratio_threshold,
        logprob_threshold=logprob_threshold,
        no_speech_threshold=no_speech_threshold,
    )
    windows = parse_batch_size(batch_size)
    destination.prepare(inputs)
    todo = [entry for entry in inputs if not destination.is_done(entry)]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = FileProgress(console, [entry.name for entry in todo])
    session = Runner(*(options, decode, windows, destination, progress), headed=len(inputs) > 1)
    try:
        with ExitStack() as stack, warnings_told(progress.tell):

            def open_model() -> Transcriber:
                if not verbose:
                    stack.enter_context(quiet_transformers())
                return Transcriber.from_pretrained(
                    model, device=device, dtype=dtype, attention=attention
                )

            session.run(todo, open_model)
    except KeyboardInterrupt as error:
        print_line(console, _interruption(session, len(inputs), len(todo)))
        raise typer.Exit(EXIT_INTERRUPTED) from error
    for line in _summary(session, model, len(inputs), len(todo)):
        print_line(console, line)
    if session.failures:
        raise typer.Exit(EXIT_SOME_FAILED)


def _summary(session: Runner, model: str, total: int, todo: int) -> Sequence[str]:
    """Lines that say what ran, how fast, and what did not."""
    lines = []
    if session.transcriber is not None:
        lines.append(f"{model}: {describe(session.transcriber)}")
    if session.audio_seconds:
        lines.append(describe_speed(session.audio_seconds, session.work_seconds))
    if todo < total:
        lines.append(f"{total - todo} {'was' if total - todo == 1 else 'were'} there already")
    if session.failures and total > 1:
        lines.append(f"{session.failures} of {total} failed")
    return lines


def _interruption(session: Runner, total: int, todo: int) -> str:
    """One line that says how far it is, and how to go on."""
    done = total - todo + session.done
    if session.output.resumes:
        further = "the same command goes on with the others"
    elif total == 1:
        further = "the same command starts it again"
    elif session.output.folder is not None:
        further = "to go on, name the others"
    else:
        further = "to go on, name the others (into --output-dir, the same command would go on)"
    return (
        f"interrupted: {done} of {total} {'file is' if total == 1 else 'files are'} done; {further}"
    )


def describe(transcriber: Transcriber) -> str:
    """Say in one line what a transcriber runs on: loop, attention back-ends, device, dtype."""
    from whisper_flash_attention.flash_attention import survey

    model, config = transcriber.model, transcriber.model.config
    attention = str(getattr(model, "attention_backend", config._attn_implementation))
    if attention == "auto":
        rows = survey(
            model.device,
            model.dtype,
            heads=config.encoder_attention_heads,
            head_dim=config.d_model // config.encoder_attention_heads,
        )
        encoder, *decoder = (row.picked for row in rows)
        attention = f"encoder {encoder}"
        if not transcriber.runs_on_engine:
            attention += f", decoder {' and '.join(dict.fromkeys(decoder))}"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{transcriber.engine}; attention: {attention}; {model.device}, {dtype}"
