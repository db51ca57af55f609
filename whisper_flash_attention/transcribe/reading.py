"""A recording that is read window by window: where it is, and what is known of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from whisper_flash_attention.transcribe.prompts import PromptFields
from whisper_flash_attention.transcribe.results import Segment


class Windows(Protocol):
    """Features of one recording, as `MelWindows` has them."""

    @property
    def frames(self) -> int:
        """Of the recording, at least 1."""

    def window(self, start: int, length: int) -> Tensor:
        """Features `[mel bins, length]` from frame `start` on; starts do not decrease."""


@dataclass
class Reading:
    """A recording that is being read.

    Args:
        features: of which windows are taken.
        task: "transcribe" or "translate".
        language: code of the language spoken, in the latest window if it is detected in every one;
            None until it is detected.
        prompt_fields: what its windows are told.
        parts: first frames and ends of what is read, in order; None is all.
        said: tokens so far, the initial prompt's first.
        reset: from which of them on they are told to the next window.
        seek: the frame at which the next window begins.
        end: the frame at which the part ends that it belongs to.
        last_speech: where the last word ended, in seconds, if words are looked for.
        detected: probabilities of languages by code, of every window in which they were detected.
    """

    features: Windows
    task: str
    language: str | None
    prompt_fields: PromptFields = field(default_factory=PromptFields)
    parts: tuple[tuple[int, int], ...] | None = None
    said: list[int] = field(default_factory=list)
    reset: int = 0
    seek: int = 0
    end: int = 0
    last_speech: float = 0.0
    detected: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go_on()

    @property
    def frames(self) -> int:
        """Of the recording; features beyond are silence."""
        return self.features.frames

    @property
    def is_done(self) -> bool:
        return self.seek >= self.frames

    @property
    def is_first(self) -> bool:
        """Whether nothing was read."""
        return self.seek == (self.parts[0][0] if self.parts else 0)

    def go_on(self) -> None:
        """Move on to the next part if this one was read to its end."""
        parts = ((0, self.frames),) if self.parts is None else self.parts
        for begin, end in parts:
            if self.seek < end:
                self.seek, self.end = max(self.seek, begin), end
                return
        self.seek = self.end = self.frames

    def window(self, length: int) -> Tensor:
        """Features of the next window, `[mel bins, length]`, zeros beyond the end."""
        if self.end == self.frames:
            return self.features.window(self.seek, length)
        covered = min(length, self.end - self.seek)
        part = self.features.window(self.seek, covered)
        return torch.nn.functional.pad(part, (0, length - covered))


@dataclass(frozen=True)
class Read:
    """What one window gave.

    Args:
        index: which recording it belongs to, counted from 0.
        segments: those that say something, in seconds of the recording.
        done, total: frames read so far, and of the recording.
    """

    index: int
    segments: tuple[Segment, ...]
    done: int
    total: int
