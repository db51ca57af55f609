"""Where results are written: standard output, or a folder with the layout of the recordings'."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError, WhisperFlashError
from whisper_flash_attention.terminal import StandardOutput, json_line, printable
from whisper_flash_attention.transcribe.inputs import Input
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.writers import (
    FORMATS,
    SUBTITLES,
    SubtitleOptions,
    render,
    render_line,
    write,
)
from whisper_flash_attention.transcribe.writers.files import colliding, distinguishes_names


def chosen_formats(values: Sequence[str]) -> tuple[str, ...]:
    """Return the formats of options such as "srt,vtt" or "all", each once; none chooses "txt".

    Raises `OptionError` if one is unknown.
    """
    chosen: list[str] = []
    for name in (part.strip() for value in values for part in value.split(",")):
        check.one_of("output_format", name, (*FORMATS, "all"))
        chosen += FORMATS if name == "all" else [name]
    return tuple(dict.fromkeys(chosen)) or ("txt",)


@dataclass(frozen=True, slots=True)
class Output:
    """The formats of a transcription, and where they are written.

    Args:
        formats: of `FORMATS`.
        folder: for files; None for standard output.
        subtitles: how they are laid out.
        overwrite: replace files that are there.
        json_lines: write each segment to standard output, as a line of JSON.
        live: print the text of one recording as it is decoded, where that goes to a terminal.
        timed: with the times of segments.
        coloured: with words in the colours of their probabilities.
        stdout: where text goes.
    """

    formats: tuple[str, ...] = ("txt",)
    folder: Path | None = None
    subtitles: SubtitleOptions = field(default_factory=SubtitleOptions)
    overwrite: bool = False
    json_lines: bool = False
    live: bool = False
    timed: bool = False
    coloured: bool = False
    stdout: StandardOutput = field(default_factory=StandardOutput)

    def prepare(self, inputs: Sequence[Input]) -> None:
        """Check what can go wrong before any work is done, and make the folder.

        Raises `OptionError` if options do not go together, the output of the only recording named
        is there already, or the folder cannot be made or written to.
        """
        if self.subtitles != SubtitleOptions() and not set(self.formats) & set(SUBTITLES):
            raise OptionError(
                f"lines and cues are for {', '.join(SUBTITLES)}, and the output is "
                f"{', '.join(self.formats)}"
            )
        if self.folder is None:
            self._check_standard_output(several=len(inputs) > 1)
            return
        taken: dict[Path, str] = {}
        for entry in inputs:
            for target in self.targets(entry).values():
                if target in taken:
                    raise OptionError(
                        f"{taken[target]} and {entry.name} would both be written to {target}"
                    )
                taken[target] = entry.name
        if len(inputs) == 1 and inputs[0].named and not self.overwrite:
            for target in filter(os.path.isfile, taken):
                raise OptionError(f"{target}: exists already; --overwrite replaces it")
        _make(self.folder)
        probe(self.folder)
        _check_distinct(self.folder, taken)

    def _check_standard_output(self, several: bool) -> None:
        if self.overwrite:
            raise OptionError("--overwrite is about files, and needs --output-dir")
        if self.json_lines:
            if self.formats != ("txt",):
                raise OptionError(
                    f"{', '.join(self.formats)} beside --json-lines needs --output-dir"
                )
        elif len(self.formats) > 1:
            raise OptionError(f"several formats ({', '.join(self.formats)}) need --output-dir")
        elif several and self.formats != ("txt",):
            raise OptionError(f"{self.formats[0]} of several files needs --output-dir")

    @property
    def resumes(self) -> bool:
        """Whether the same command, given again, goes on where it was interrupted."""
        return self.folder is not None and not self.overwrite

    def targets(self, entry: Input) -> dict[str, Path]:
        """The file for each format; none if they go to standard output."""
        if self.folder is None:
            return {}
        beside = self.folder / entry.place.parent
        return {name: beside / f"{entry.stem}.{name}" for name in self.formats}

    def is_done(self, entry: Input) -> bool:
        """Whether every file of this recording is there, and is to be kept."""
        return self.resumes and all(map(os.path.isfile, self.targets(entry).values()))

    @property
    def shows_text(self) -> bool:
        """Whether the text of a single recording is printed as it is decoded."""
        plain = self.folder is not None or self.formats == ("txt",)
        return self.live and plain and not self.json_lines and sys.stdout.isatty()

    def show(self, entry: Input, segments: Sequence[Segment]) -> None:
        """Print segments, which are part of a recording's transcription.

        Raises:
            WhisperFlashError: standard output cannot be written.
        """
        for segment in segments:
            if self.json_lines:
                row = json_line({"file": entry.name, "segment": segment.to_dict()})
                with _failures_told():
                    self.stdout.write_json(row)
            else:
                line = render_line(segment, timed=self.timed, coloured=self.coloured)
                with _failures_told():
                    self.stdout.write(line)

    def deliver(
        self, entry: Input, transcription: Transcription, *, headed: bool, shown: int = 0
    ) -> None:
        """Write every output; of files that are to be kept, those that are missing.

        Args:
            entry: the recording.
            transcription: of the recording.
            headed: whether text on standard output says which recording it is of.
            shown: number of segments that `show` has printed.

        Raises:
            OptionError: a file or its folder cannot be made; the text is printed instead.
            WhisperFlashError: standard output cannot be written.
        """
        rest = transcription.segments[shown:]
        if self.json_lines or (self.shows_text and not headed):
            self.show(entry, rest)
        elif self.folder is None:
            self._print(entry, transcription, self.formats[0], headed=headed)
        try:
            self._write_files(entry, transcription)
        except OptionError:
            if not (self.json_lines or self.shows_text):
                self._print(entry, transcription, "txt", headed=headed)
            raise

    def _print(
        self, entry: Input, transcription: Transcription, output_format: str, *, headed: bool
    ) -> None:
        heading = f"==> {printable(entry.name)} <==\n" if headed else ""
        text = heading + render(transcription, output_format, self.subtitles)
        with _failures_told():
            self.stdout.write(text)

    def _write_files(self, entry: Input, transcription: Transcription) -> None:
        for name, target in self.targets(entry).items():
            if self.overwrite or not os.path.isfile(target):
                _make(target.parent)
                write(
                    *(transcription, target, name),
                    options=self.subtitles,
                    overwrite=self.overwrite,
                )


@contextmanager
def _failures_told() -> Iterator[None]:
    """Tell in one line that standard output cannot be written; who closed a pipe needs no word.

    It ends the run, as an `OptionError` would not: the same would happen with every recording.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise WhisperFlashError(f"standard output cannot be written ({reason})") from error


def _check_distinct(folder: Path, targets: Mapping[Path, str]) -> None:
    """Raise `OptionError` for targets that are one file on the file system that they are on."""
    by_name = {str(target): name for target, name in targets.items()}
    pairs = colliding(by_name)
    try:
        if not pairs or distinguishes_names(folder):
            return
    except OSError as error:
        raise OptionError(f"{folder}: cannot be written to ({error.strerror})") from error
    first, second = pairs[0]
    raise OptionError(
        f"{by_name[first]} and {by_name[second]} would both be written to {second}: this file "
        "system does not tell upper from lower case, or forms of Unicode; rename one"
    )


def probe(folder: Path) -> None:
    """Raise `OptionError` if no file can be written to a folder, in which nothing is left."""
    file = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        file.write_bytes(b"a full disk takes a file, and nothing in it")
        file.unlink()
    except OSError as error:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        raise OptionError(f"{folder}: cannot be written to ({error.strerror})") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{folder}: cannot be made ({error.strerror})") from error
    except RecursionError as error:  # as deep as `mkdir` calls itself
        raise OptionError(f"{folder}: cannot be made (too many folders)") from error
