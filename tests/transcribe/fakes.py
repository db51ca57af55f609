"""A transcriber that loads nothing, and the command with it in place of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from whisper_flash_attention.audio.audio_source import AudioSource
from whisper_flash_attention.transcribe import Segment, Transcription


@dataclass
class FakeTranscriber:
    """Gives every recording one segment, and records its calls.

    Args:
        before: called with the number of recordings transcribed before, and may raise.
        bad: lengths of recordings, in seconds, that cannot be transcribed, and why.
        language: of every recording, and its probability.
        side_by_side: how many recordings are taken before the first of them is done.
        loaded: arguments of `from_pretrained`.
    """

    before: Callable[[int], None] = lambda count: None
    segment: Segment = field(default_factory=lambda: Segment(0.0, 1.0, "one two three", (1, 2)))
    calls: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[float, Exception] = field(default_factory=dict)
    language: tuple[str, float | None] = ("en", None)
    side_by_side: int = 1
    loaded: dict[str, Any] = field(default_factory=dict)

    def running_engine(self) -> None:
        """It has none."""

    def describe(self) -> str:
        return "no model"

    def transcribe(
        self,
        audio: AudioSource,
        *,
        on_progress: Callable[[float], None],
        **options: Any,
    ) -> Transcription:
        on_progress(0.0)
        self.before(len(self.calls))
        on_progress(0.5)
        seconds = audio.seconds
        assert seconds is not None
        if seconds in self.bad:
            raise self.bad[seconds]
        self.calls.append(options)
        language, probability = self.language
        return Transcription(self.segment.text, language, (self.segment,), seconds, probability)

    def transcribe_each(
        self,
        recordings: Iterable[AudioSource],
        *,
        on_progress: Callable[[int, float], None],
        on_segments: Callable[[int, Sequence[Segment]], None] | None = None,
        **options: Any,
    ) -> Generator[tuple[int, Transcription]]:
        """The last recording that was taken is done first."""
        taken: list[tuple[int, AudioSource]] = []
        for number, audio in enumerate(recordings):
            taken.append((number, audio))
            if len(taken) == self.side_by_side:
                yield from self._done(taken, on_progress, on_segments, options)
        yield from self._done(taken, on_progress, on_segments, options)

    def _done(
        self,
        taken: list[tuple[int, AudioSource]],
        on_progress: Any,
        on_segments: Any,
        options: dict[str, Any],
    ) -> Iterator[tuple[int, Transcription]]:
        while taken:
            number, audio = taken.pop()
            tell = partial(on_progress, number)
            transcription = self.transcribe(audio, on_progress=tell, **options)
            if on_segments is not None:
                on_segments(number, transcription.segments)
            yield number, transcription
