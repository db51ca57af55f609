"""Jobs of a scheduler, and their recordings as they wait for a turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event

from torch import Tensor

from whisper_flash_attention.audio.audio_source import Audio, AudioSource
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.errors import AudioError, WhisperFlashError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.arguments import RecordingOptions, TranscribeArguments
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.sequential import SequentialReader
from whisper_flash_attention.transcribe.transcriber import Reader
from whisper_flash_attention.transcribe.window_decoder import DecodingResult

# Uploads of more bytes are prepared by threads of their own, and fewer of them at a time.
LONG_BYTES = 2 * 2**20


class Cancelled(WhisperFlashError):
    """Nobody waits for the result of a job any more."""


class TooLong(AudioError):
    """A recording is longer than the server takes."""


@dataclass(frozen=True, slots=True)
class BoundedSource(AudioSource):
    """A recording that is not held, up to a length; reading it ends once nobody waits for it."""

    most_seconds: float = float("inf")
    stop: Event = field(default_factory=Event)

    def blocks(self, seconds: float = 30.0) -> Iterator[Samples]:
        done = 0
        # `super()` without arguments does not know the class that `slots=True` makes.
        for block in AudioSource.blocks(self, seconds):
            done += block.size
            if self.stop.is_set():
                raise Cancelled(f"{self.name}: is not needed any more")
            check_length(self.name, done / SAMPLING_RATE, self.most_seconds)
            yield block


def check_length(name: str, seconds: float, most_seconds: float) -> None:
    """Raise `TooLong` if a recording is longer than `most_seconds`."""
    if seconds > most_seconds:
        raise TooLong(f"{name}: is longer than {most_seconds:g} s, the most that this server takes")


@dataclass(eq=False)
class Job:
    """One recording to transcribe.

    Args:
        audio: what is transcribed.
        arguments: as `Transcriber.transcribe` takes them, but `batch_size`.
        languages: codes of those among which the language is detected; empty for all.
        size: bytes of the upload.
        most_seconds: a longer recording is refused.
        on_segments: called with the segments of every window, and their recording.
        on_end: called once, with the transcription or the error.
        on_close: called once, when `audio` is not read any more.

    Attributes:
        decode, options: of the arguments, checked against the model.
        recordings: once it is prepared, its channels that are transcribed.
        cancelled: set by whoever does not want the result any more.
        began: when it was submitted, in seconds of `time.monotonic`.
    """

    audio: Audio
    arguments: TranscribeArguments
    on_end: Callable[[Transcription | BaseException], None]
    on_segments: Callable[[Recording, Sequence[Segment]], None] = lambda *_: None
    on_close: Callable[[], None] = lambda: None
    languages: tuple[str, ...] = ()
    size: int = 0
    most_seconds: float = float("inf")
    cancelled: Event = field(default_factory=Event)
    began: float = field(default_factory=time.monotonic)
    recordings: list[Recording] = field(default_factory=list)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    options: RecordingOptions = field(default_factory=RecordingOptions)
    has_ended: bool = False

    @property
    def is_long(self) -> bool:
        return self.size > LONG_BYTES

    def end(self, result: Transcription | BaseException) -> None:
        """Release the recording, and report the result."""
        self.audio = b""
        self.on_close()
        self.on_end(result)


@dataclass(eq=False)
class Entry:
    """A recording of a job that waits for its turn, or is in a slot.

    Args:
        steps: yields the segments of one chunk after the other, where it is decoded by itself.
        is_alone: whether it is decoded alone because a failure among others is to be located.
        window: features of its next window, where a `SequentialReader` decodes it.
        states, prompt, results: of that window, once it was encoded.
    """

    job: Job
    recording: Recording
    reader: Reader
    steps: Iterator[tuple[Recording, tuple[Segment, ...]]] | None = None
    is_alone: bool = False
    window: Tensor | None = None
    states: Tensor | None = None
    prompt: Sequence[int] = ()
    results: list[DecodingResult] = field(default_factory=list)

    def __str__(self) -> str:
        return f"the window at {self.recording.seek / 100:.1f} s"


def take_window(entry: Entry) -> None:
    """Take the next window of a recording; silence before it has no window."""
    recording, reader = entry.recording, entry.reader
    entry.window = None
    while isinstance(reader, SequentialReader) and entry.window is None and not recording.is_done:
        [entry.window] = reader.take_windows([recording])
        if entry.window is None:
            recording.add_window((), recording.seek)
