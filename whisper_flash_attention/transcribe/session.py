"""One run of the command: decode ahead, transcribe, deliver, go on after a bad recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import cast

from whisper_flash_attention.audio.ahead import Opened, open_ahead
from whisper_flash_attention.audio.sound import Sound
from whisper_flash_attention.config import DecodeOptions, TranscribeOptions
from whisper_flash_attention.errors import AudioError, NotFinite, OptionError
from whisper_flash_attention.transcribe.destination import Destination
from whisper_flash_attention.transcribe.inputs import Input
from whisper_flash_attention.transcribe.progress import FileProgress
from whisper_flash_attention.transcribe.segments import Transcription
from whisper_flash_attention.transcribe.transcriber import Transcriber


@dataclass(slots=True)
class Session:
    """What is to be done, and how far it is.

    Args:
        options, decode: for every recording.
        batch_size: chunks at a time in batched mode.
        destination: of the results, prepared.
        progress: where it is shown.
        headed: whether there are several recordings, whose text on standard output has a heading.

    Attributes:
        transcriber: opened for the first recording that could be decoded.
        done, failures: numbers of recordings.
        audio_seconds: length of those that were transcribed.
        work_seconds: their transcription alone, without decoding files and loading.
        words_missing: whether words were to be highlighted, and a recording had none with times.
    """

    options: TranscribeOptions
    decode: DecodeOptions
    batch_size: int
    destination: Destination
    progress: FileProgress
    headed: bool = False
    transcriber: Transcriber | None = None
    done: int = 0
    failures: int = 0
    audio_seconds: float = 0.0
    work_seconds: float = 0.0
    words_missing: bool = False

    def run(self, inputs: Sequence[Input], open_model: Callable[[], Transcriber]) -> None:
        """Work through the recordings; a bad one is told, and the others go on.

        Raises what `open_model` raises, and what would be the same for every recording.
        """
        sounds = cast("Generator[Opened]", open_ahead(entry.source() for entry in inputs))
        with self.progress, closing(sounds):
            for entry in inputs:
                self.progress.begin(entry.name)
                self._take(entry, next(sounds), open_model)

    def _take(self, entry: Input, opened: Opened, open_model: Callable[[], Transcriber]) -> None:
        if opened.sound is None:
            self._fail(str(opened.error))
            return
        self.transcriber = self.transcriber or open_model()
        try:
            transcription = self._transcribe(self.transcriber, opened.sound)
        except (AudioError, NotFinite) as error:
            reason = str(error).removeprefix(f"{entry.name}: ")  # of one that is not held
            self._fail(f"{entry.name}: {reason}")
            return
        self._warn_of_words(transcription)
        try:
            with self.progress.aside():
                self.destination.deliver(entry, transcription, headed=self.headed)
        except OptionError as error:  # a file that cannot be written
            self._fail(str(error))
            return
        self.done += 1

    def _fail(self, message: str) -> None:
        self.failures += 1
        self.progress.tell(f"error: {message}")

    def _transcribe(self, transcriber: Transcriber, sound: Sound) -> Transcription:
        started = time.perf_counter()

        def show(share: float) -> None:
            self.progress.advance(share)
            if sound.seconds is not None:
                worked = self.work_seconds + time.perf_counter() - started
                self.progress.measure(self.audio_seconds + share * sound.seconds, worked)

        transcription = transcriber.transcribe(
            sound,
            language=self.options.language,
            task=self.options.task,
            options=self.decode,
            batch_size=self.batch_size,
            on_progress=show,
        )
        self.work_seconds += time.perf_counter() - started
        self.audio_seconds += transcription.seconds
        self.progress.measure(self.audio_seconds, self.work_seconds)
        return transcription

    def _warn_of_words(self, transcription: Transcription) -> None:
        """Tell once that words were to be highlighted, and have no times."""
        if self.words_missing or not self.destination.subtitles.highlight_words:
            return
        segments = transcription.segments
        self.words_missing = bool(segments) and not any(segment.words for segment in segments)
        if self.words_missing:
            self.progress.tell("warning: no word has times here, so that none is highlighted")
