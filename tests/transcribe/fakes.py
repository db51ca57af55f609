"""A transcriber that loads nothing, and the command with it in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from whisper_flash_attention.audio import SAMPLING_RATE
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
        audio: npt.NDArray[np.float32],
        *,
        on_progress: Callable[[float], None],
        **options: Any,
    ) -> Transcription:
        on_progress(0.0)
        self.before(len(self.calls))
        on_progress(0.5)
        self.calls.append(options)
        seconds = len(audio) / SAMPLING_RATE
        return Transcription(self.segment.text, "en", (self.segment,), seconds)
