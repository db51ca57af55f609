"""A transcriber that loads nothing, and the command with it in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from whisper_flash_attention.audio.sound import Sound
from whisper_flash_attention.transcribe import Segment, Transcription


@dataclass
class FakeTranscriber:
    """Hears one segment in each recording, and keeps what it was asked.

    Args:
        before: called with the number of recordings heard before, and may raise.
    """

    before: Callable[[int], None] = lambda heard: None
    segment: Segment = field(default_factory=lambda: Segment(0.0, 1.0, "one two three", (1, 2)))
    calls: list[dict[str, Any]] = field(default_factory=list)

    def transcribe(
        self,
        audio: Sound,
        *,
        on_progress: Callable[[float], None],
        **options: Any,
    ) -> Transcription:
        on_progress(0.0)
        self.before(len(self.calls))
        on_progress(0.5)
        self.calls.append(options)
        seconds = audio.seconds
        assert seconds is not None
        return Transcription(self.segment.text, "en", (self.segment,), seconds)
