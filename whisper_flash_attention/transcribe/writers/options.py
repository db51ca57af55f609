"""How subtitles are cut, checked when it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from whisper_flash_attention import validation as check
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
            number = check.optional(check.whole_number, name, getattr(self, name), least=1)
            object.__setattr__(self, name, number)
        if self.max_line_count is not None and self.max_line_width is None:
            raise OptionError("max_line_count has no effect without max_line_width; give both")
        gap = check.optional(check.number, "max_gap", self.max_gap, "seconds, 0 or more", least=0)
        object.__setattr__(self, "max_gap", gap)
        check.flag("highlight_words", self.highlight_words)
