"""The command `whisper-flash transcribe`: files in, text out, the rest on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.config import TranscribeOptions
from whisper_flash_attention.errors import AudioError, OptionError
from whisper_flash_attention.transcribe.progress import FileProgress
from whisper_flash_attention.transcribe.quiet import quiet_transformers, warnings_told
from whisper_flash_attention.transcribe.segments import Transcription
from whisper_flash_attention.transcribe.transcriber import Transcriber
from whisper_flash_attention.transcribe.writers import FORMATS, render, write

EXIT_SOME_FAILED = 2


def transcribe_command(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Recordings: wav, flac, mp3, ogg, opus, m4a, mp4 ..."),
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="auto (float16 on CUDA, float32 elsewhere), float32, float16, bfloat16."),
    ] = "auto",
    attention: Annotated[
        str, typer.Option(help="Attention back-end, as `whisper-flash doctor` lists them.")
    ] = "auto",
    output_format: Annotated[
        str, typer.Option("--output-format", "-f", help="txt, json, srt or vtt.")
    ] = "txt",
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Write files here instead of standard output."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show Transformers' own messages, too.")
    ] = False,
) -> None:
    """Turn recordings into text or subtitles.

    The text goes to standard output, or into one file per recording with [b]--output-dir[/b].

    [b]Examples[/b]

      whisper-flash transcribe talk.mp3

      whisper-flash transcribe talk.mp3 --model turbo --language german

      whisper-flash transcribe *.flac --output-format srt --output-dir subtitles

      whisper-flash transcribe talk.mp3 --model package:tiny.en  [dim](needs no Hub)[/dim]
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    session = _Session(
        TranscribeOptions(language=language, task=task),
        _Destination.prepare(files, output_format, output_dir),
        FileProgress(console, files),
    )
    with ExitStack() as stack, warnings_told(session.progress.tell):

        def open_model() -> Transcriber:
            if not verbose:
                stack.enter_context(quiet_transformers())
            return Transcriber.from_pretrained(
                model, device=device, dtype=dtype, attention=attention
            )

        transcriber = session.run(files, open_model)
    if transcriber is not None:
        console.print(f"{model}: {describe(transcriber)}", markup=False)
        console.print(session.speed(), markup=False)
    if session.failures:
        raise typer.Exit(EXIT_SOME_FAILED)


@dataclass(frozen=True, slots=True)
class _Destination:
    """Where results go: standard output, or a file per recording in a folder."""

    output_format: str
    folder: Path | None
    several: bool

    @classmethod
    def prepare(cls, files: Sequence[str], output_format: str, folder: Path | None) -> Self:
        """Check what can go wrong before any work is done, and make the folder."""
        if output_format not in FORMATS:
            raise OptionError(f"unknown format {output_format!r}; possible: {', '.join(FORMATS)}")
        destination = cls(output_format, folder, several=len(files) > 1)
        if folder is None:
            if destination.several and output_format != "txt":
                raise OptionError(f"{output_format} of several files needs --output-dir")
            return destination
        taken: dict[Path, str] = {}
        for file in files:
            target = destination.target(folder, file)
            if target in taken:
                raise OptionError(f"{taken[target]} and {file} would both be written to {target}")
            taken[target] = file
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"{folder}: cannot be made ({error.strerror})") from error
        return destination

    def target(self, folder: Path, file: str) -> Path:
        return folder / f"{Path(file).stem}.{self.output_format}"

    def deliver(self, file: str, transcription: Transcription) -> None:
        if self.folder is not None:
            write(transcription, self.target(self.folder, file), self.output_format)
            return
        if self.several:
            typer.echo(f"==> {file} <==")
        typer.echo(render(transcription, self.output_format), nl=False)


@dataclass(slots=True)
class _Session:
    """One run over files: a bad one is reported, and the others go on."""

    options: TranscribeOptions
    destination: _Destination
    progress: FileProgress
    failures: int = 0
    audio_seconds: float = 0.0
    work_seconds: float = 0.0

    def run(
        self, files: Sequence[str], open_model: Callable[[], Transcriber]
    ) -> Transcriber | None:
        """Work through the files; return the model, opened for the first file that is audio."""
        transcriber = None
        with self.progress:
            for file in files:
                self.progress.begin(file)
                try:
                    samples = load_audio(file)
                except AudioError as error:
                    self.failures += 1
                    self.progress.tell(f"error: {error}")
                    continue
                transcriber = transcriber or open_model()
                self._transcribe(transcriber, file, samples)
        return transcriber

    def _transcribe(
        self, transcriber: Transcriber, file: str, samples: npt.NDArray[np.float32]
    ) -> None:
        started = time.perf_counter()
        transcription = transcriber.transcribe(
            samples,
            language=self.options.language,
            task=self.options.task,
            on_progress=self.progress.advance,
        )
        self.work_seconds += time.perf_counter() - started
        self.audio_seconds += transcription.seconds
        with self.progress.aside():
            self.destination.deliver(file, transcription)

    def speed(self) -> str:
        """Length and time of the transcription alone, without decoding files and loading."""
        return (
            f"{self.audio_seconds:.1f} s of audio in {self.work_seconds:.1f} s: "
            f"{self.audio_seconds / self.work_seconds:.1f} x real time"
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
