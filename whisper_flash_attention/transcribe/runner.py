"""One run of the command: decode ahead, transcribe, write, continue after a failed recording.

Recordings are transcribed side by side, and each is written as soon as it is done. An error that
stops all of them, such as damage in the middle of a file, is located by transcribing those in
progress once more, one by one. One thread may take recordings while another writes results.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from threading import RLock

from whisper_flash_attention.audio.audio_source import AudioInput, AudioSource, ChannelSources
from whisper_flash_attention.audio.opener import AudioOpener
from whisper_flash_attention.errors import AudioError, NotFinite, OptionError
from whisper_flash_attention.options import DecodeOptions, TranscribeOptions
from whisper_flash_attention.terminal import FileProgress, printable
from whisper_flash_attention.transcribe.arguments import TranscribeArguments, automatic_batch_size
from whisper_flash_attention.transcribe.inputs import Input
from whisper_flash_attention.transcribe.output import Output
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.transcriber import Transcriber


@dataclass(frozen=True, slots=True)
class Opened:
    """A recording that can be read."""

    entry: Input
    audio: AudioSource | ChannelSources


@dataclass(slots=True)
class Runner:
    """Transcribes the recordings of a command line.

    Args:
        options, decode: for every recording.
        batch_size: windows at a time; None is what suits the device.
        output: of the results, prepared.
        progress: shows it.
        headed: whether there are several recordings, whose text on standard output has a heading.
        warm_up: compile and allocate before the first recording.

    Attributes:
        transcriber: opened for the first recording that could be decoded.
        done, failures: numbers of recordings.
        audio_seconds: length of those that were transcribed.
        work_seconds: since the model was there.
        languages: of the recordings that were transcribed, each with its probability if it was
            detected.
        words_missing: whether the warning about words without times was given.
    """

    options: TranscribeOptions
    decode: DecodeOptions
    batch_size: int | None
    output: Output
    progress: FileProgress
    headed: bool = False
    warm_up: bool = False
    transcriber: Transcriber | None = None
    done: int = 0
    failures: int = 0
    audio_seconds: float = 0.0
    languages: list[tuple[str, float | None]] = field(default_factory=list)
    words_missing: bool = False
    _began: float = 0.0
    _shown: Counter[str] = field(default_factory=Counter)
    _lock: RLock = field(default_factory=RLock)

    @property
    def work_seconds(self) -> float:
        return time.perf_counter() - self._began if self._began else 0.0

    def run(self, inputs: Sequence[Input], open_model: Callable[[], Transcriber]) -> None:
        """Transcribe the recordings; a failure is reported, and the others continue.

        Raises what `open_model` raises, and what would be the same for every recording.
        """
        with (
            self.progress,
            AudioOpener() as opener,
            closing(self._open(opener, inputs)) as waiting,
        ):
            first = next(waiting, None)
            if first is None:
                return
            with self.progress.loading():
                self.transcriber = open_model()
            if self.batch_size is None:
                self.batch_size = _automatic(self.transcriber, self.decode)
            if self.warm_up:
                self.transcriber.warm_up(**self._arguments())
            self._began = time.perf_counter()
            rest = chain([first], waiting)
            while not self._all_done(self.transcriber, rest):
                pass

    def _open(self, opener: AudioOpener, inputs: Sequence[Input]) -> Generator[Opened]:
        """Recordings that can be read, decoded ahead; the others are reported."""
        channel, track = self.options.channel, self.options.audio_track
        each = (AudioInput(entry.source(), channel, track) for entry in inputs)
        with closing(opener.open_each(each)) as sources:
            for entry in inputs:
                self.progress.begin(entry.name)
                try:
                    audio = next(sources).result()
                except AudioError as error:
                    self._fail(entry, str(error))
                else:
                    self.progress.measured(entry.name, audio.seconds)
                    yield Opened(entry, audio)

    def _all_done(self, transcriber: Transcriber, waiting: Iterator[Opened]) -> bool:
        """Transcribe recordings side by side; False if some were not taken."""
        in_progress: dict[int, Opened] = {}

        def taken() -> Iterator[AudioSource | ChannelSources]:
            for index, opened in enumerate(waiting):
                in_progress[index] = opened
                yield opened.audio

        found = transcriber.transcribe_each(
            taken(),
            on_progress=lambda index, share: self._advance(in_progress[index], share),
            on_segments=(
                (lambda index, segments: self._show(in_progress[index].entry, segments))
                if self.output.json_lines or (self.output.shows_text and not self.headed)
                else None
            ),
            **self._arguments(),
        )
        try:
            with closing(found):
                for index, transcription in found:
                    self._deliver(in_progress.pop(index).entry, transcription)
        except (AudioError, NotFinite):
            for opened in in_progress.values():
                self._alone(transcriber, opened)
            return False
        return True

    def _alone(self, transcriber: Transcriber, opened: Opened) -> None:
        """Transcribe one recording by itself."""
        entry = opened.entry
        try:
            transcription = transcriber.transcribe(
                opened.audio,
                on_progress=lambda share: self._advance(opened, share),
                **self._arguments(),
            )
        except (AudioError, NotFinite) as error:
            name = printable(entry.name)
            reason = str(error).removeprefix(f"{name}: ")  # of one that is not held
            self._fail(entry, f"{name}: {reason}")
            return
        self._deliver(entry, transcription)

    def _arguments(self) -> TranscribeArguments:
        assert self.batch_size is not None
        return TranscribeArguments(
            language=self.options.language,
            task=self.options.task,
            options=self.decode,
            batch_size=self.batch_size,
        )

    def _deliver(self, entry: Input, transcription: Transcription) -> None:
        with self._lock:
            self.audio_seconds += transcription.seconds
            self.progress.measured(entry.name, transcription.seconds)
            self.progress.advance(entry.name, 1.0)
        self._warn_of_words(transcription)
        self.languages.append((transcription.language, transcription.language_probability))
        try:
            with self.progress.aside():
                shown = self._shown.pop(entry.name, 0)
                self.output.deliver(entry, transcription, headed=self.headed, shown=shown)
        except OptionError as error:  # a file that cannot be written
            self._fail(entry, str(error))
            return
        self.done += 1
        self.progress.end(entry.name)

    def _fail(self, entry: Input, message: str) -> None:
        with self._lock:
            self.failures += 1
            self.progress.end(entry.name)
        self.progress.tell(f"error: {message}")

    def _show(self, entry: Input, segments: Sequence[Segment]) -> None:
        """Print segments of a recording as they are decoded."""
        with self.progress.aside():
            self.output.show(entry, segments)
        self._shown[entry.name] += len(segments)

    def _advance(self, opened: Opened, share: float) -> None:
        """A recording is done to this share."""
        with self._lock:
            # The length of one that is not held is known when it was read.
            self.progress.measured(opened.entry.name, opened.audio.seconds)
            self.progress.advance(opened.entry.name, share)

    def _warn_of_words(self, transcription: Transcription) -> None:
        """Warn once that words were to be highlighted, and have no times."""
        if self.words_missing or not self.output.subtitles.highlight_words:
            return
        segments = transcription.segments
        self.words_missing = bool(segments) and not any(segment.words for segment in segments)
        if self.words_missing:
            self.progress.tell("warning: no word has times here, so that none is highlighted")


def _automatic(transcriber: Transcriber, decode: DecodeOptions) -> int:
    beams = max(decode.beam_size or 1, decode.best_of or 1)
    return automatic_batch_size(transcriber.running_engine(), decode.mode, beams)
