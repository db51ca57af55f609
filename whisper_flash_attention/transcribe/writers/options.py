"""How subtitles are cut, checked when it is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from whisper_flash_attention.errors import OptionError


@dataclass(frozen=True, slots=True)
class SubtitleOptions:
    """How `srt` and `vtt` are cut into cues and lines; by default a segment is a cue of one line.

    Args:
        max_line_width: the most characters of a line, or None for any number. A longer word has
            a line of its own.
        max_line_count: the most lines of a cue, or None for any number. With words that have
            times, cues then go on from one segment into the next, as openai-whisper's do.
        max_gap: seconds of silence between two words above which a new cue starts, or None for
            never. Only words that have times can tell.
        highlight_words: a cue for each word that has times, in which that word is underlined.

    Raises:
        OptionError: a number is out of range, or `max_line_count` is given without the
            `max_line_width` that makes lines.
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_gap: float | None = 3.0
    highlight_words: bool = False

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise OptionError(f"{name} must be at least 1, got {number}")
        if self.max_line_count is not None and self.max_line_width is None:
            raise OptionError("max_line_count has no effect without max_line_width; give both")
        if self.max_gap is not None and not (math.isfinite(self.max_gap) and self.max_gap >= 0):
            raise OptionError(f"max_gap must be seconds, not negative, got {self.max_gap}")
