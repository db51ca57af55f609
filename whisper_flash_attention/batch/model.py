"""The only place where an archive's stages and `Transcriber` meet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import ChannelSources
from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.options import DecodeOptions, ModelOptions, TranscribeOptions
from whisper_flash_attention.transcribe.arguments import MOST_WINDOWS
from whisper_flash_attention.transcribe.results import Segment, Transcription


class Speech(Protocol):
    """What the stages need of a `Transcriber`."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows."""

    def transcribe_each(
        self,
        recordings: Iterable[Any],
        *,
        language: str | None,
        task: str,
        options: DecodeOptions | None,
        batch_size: int,
        on_progress: Callable[[int, float], None] | None,
    ) -> Generator[tuple[int, Transcription]]:
        """As `Transcriber.transcribe_each`."""


class Opener(Protocol):
    """Something that can be sent to a worker and opens a transcriber there."""

    @property
    def source(self) -> str:
        """What messages and settings call the model."""

    def open(self) -> Speech:
        """Load the model, where this is called."""


class Model(ModelOptions):
    """A checkpoint, and where a worker opens it."""

    __slots__ = ()

    def open(self) -> Speech:
        """Load it; raises what `Transcriber.from_pretrained` raises."""
        from whisper_flash_attention.transcribe.transcriber import Transcriber

        return Transcriber.from_pretrained(**asdict(self), quiet=True)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a whole archive, where an item has none of its own.

    Args:
        options: language and task, channel and audio track.
        decode: how recordings are decoded.
        batch_size: windows or chunks at a time, at most; 1 to 10,000.

    Raises:
        OptionError: a value is of another type, or out of its range.
    """

    options: TranscribeOptions = field(default_factory=TranscribeOptions)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    batch_size: int = 16

    def __post_init__(self) -> None:
        check.instance("options", self.options, TranscribeOptions)
        check.instance("decode", self.decode, DecodeOptions)
        size = check.whole_number("batch_size", self.batch_size, least=1, most=MOST_WINDOWS)
        object.__setattr__(self, "batch_size", size)

    def resolved(self, item: Item) -> Item:
        """The recording with what is read of it, as the stage that decodes needs it."""
        channel, track = self.options.channel, self.options.audio_track
        return replace(
            item,
            channel=channel if item.channel is None else item.channel,
            audio_track=track if item.audio_track is None else item.audio_track,
        )

    def of(self, item: Item) -> RunOptions:
        """The options for this recording."""
        language = self.options.language if item.language is None else item.language
        task = item.task or self.options.task
        options = replace(self.options, language=language, task=task)
        if item.prompt is None:
            return replace(self, options=options)
        return replace(
            self, options=options, decode=replace(self.decode, initial_prompt=item.prompt)
        )


def transcriptions(
    speech: Speech,
    recordings: Iterable[Samples | ChannelSources],
    run_options: RunOptions,
    seed: int,
    on_progress: Callable[[int, float], None] | None = None,
) -> Generator[tuple[int, Transcription]]:
    """Transcribe recordings side by side, as `Transcriber.transcribe_each` does.

    Args:
        recordings: samples `[T]` at 16 kHz of every one, or its channels.
        on_progress: called with the number of a recording and the share of it that is done, perhaps
            by another thread.

    At temperatures above 0 tokens are sampled; with the same `seed` they are the same ones,
    whichever worker samples them and whatever it did before.
    """
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield from speech.transcribe_each(
            recordings,
            language=run_options.options.language,
            task=run_options.options.task,
            options=run_options.decode,
            batch_size=run_options.batch_size,
            on_progress=on_progress,
        )


def shifted(transcription: Transcription, seconds: float) -> Transcription:
    """The transcription of a part that begins at `seconds`, in the times of the whole recording."""
    if not seconds:
        return transcription
    segments = tuple(_shifted_segment(segment, seconds) for segment in transcription.segments)
    return replace(transcription, segments=segments)


def _shifted_segment(segment: Segment, by: float) -> Segment:
    words = tuple(replace(word, start=word.start + by, end=word.end + by) for word in segment.words)
    return replace(
        segment,
        start=segment.start + by,
        end=segment.end + by,
        words=words,
        seek=segment.seek + round(100 * by),
    )
