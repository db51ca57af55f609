"""The formats: plain text, JSON, SubRip (srt), WebVTT (vtt), a table (tsv), lyrics (lrc).

Times are written to the millisecond, in lyrics to the hundredth. WebVTT follows
https://www.w3.org/TR/webvtt1/: text is escaped, and a cue ends after it starts. SubRip has no
standard and no escapes: what would be read as an arrow is broken up, and in lyrics what would be
read as a time. The table is openai-whisper's. Control characters are shown as escapes everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.terminal import json_line
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.writers.cues import (
    Cue,
    build_cues,
    label_of,
    one_line,
)


def render(
    transcription: Transcription, output_format: str, options: SubtitleOptions | None = None
) -> str:
    """Return the whole file's text; what is not empty ends with a newline.

    Args:
        transcription: of one recording.
        output_format: one of `FORMATS`.
        options: the layout of subtitles (srt and vtt); without effect on other formats.

    Raises:
        OptionError: the format is unknown.
    """
    if output_format not in FORMATS:
        raise OptionError(f"unknown format {output_format!r}; possible: {', '.join(FORMATS)}")
    return FORMATS[output_format](transcription, options or SubtitleOptions())


def _line(segment: Segment) -> str:
    """A segment's text as one line, with its channel in front where it has one."""
    return label_of(segment) + one_line(segment.text)


def render_line(segment: Segment, *, timed: bool = False) -> str:
    """Return a segment's text as a line, with its times in front if that is wanted."""
    times = f"[{_clock_of(segment.start)} --> {_clock_of(segment.end)}] " if timed else ""
    return f"{times}{_line(segment)}\n"


def _clock_of(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: `01:02.500`."""
    return _clock(round(1000 * seconds), ".").removeprefix("00:")


def _txt(transcription: Transcription, _: SubtitleOptions) -> str:
    return "".join(f"{_line(segment)}\n" for segment in transcription.segments)


def _json(transcription: Transcription, _: SubtitleOptions) -> str:
    return json_line(transcription.to_dict()) + "\n"


def _srt(transcription: Transcription, options: SubtitleOptions) -> str:
    return "\n".join(
        f"{number}\n{_times(cue, ',')}\n{_text(cue, _without_arrows)}\n"
        for number, cue in enumerate(build_cues(transcription.segments, options), start=1)
    )


def _vtt(transcription: Transcription, options: SubtitleOptions) -> str:
    cues = (
        f"\n{_times(cue, '.')}\n{_text(cue, _escaped)}\n"
        for cue in build_cues(transcription.segments, options)
    )
    return "WEBVTT\n" + "".join(cues)


def _tsv(transcription: Transcription, _: SubtitleOptions) -> str:
    rows = (
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{_line(segment)}\n"
        for segment in transcription.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


def _lrc(transcription: Transcription, _: SubtitleOptions) -> str:
    return "".join(
        f"[{_lyrics_clock(segment.start)}]{_without_times(_line(segment))}\n"
        for segment in transcription.segments
    )


FORMATS: Mapping[str, Callable[[Transcription, SubtitleOptions], str]] = MappingProxyType(
    {"txt": _txt, "json": _json, "srt": _srt, "vtt": _vtt, "tsv": _tsv, "lrc": _lrc}
)
SUBTITLES = ("srt", "vtt")  # what `SubtitleOptions` are about


def _times(cue: Cue, decimal_mark: str) -> str:
    return f"{_clock(cue.start, decimal_mark)} --> {_clock(cue.end, decimal_mark)}"


def _clock(milliseconds: int, decimal_mark: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{decimal_mark}{milliseconds:03d}"


def _lyrics_clock(seconds: float) -> str:
    whole, hundredths = divmod(round(seconds * 100), 100)
    return f"{whole // 60:02d}:{whole % 60:02d}.{hundredths:02d}"


def _text(cue: Cue, clean: Callable[[str], str]) -> str:
    lines = list(map(clean, cue.lines))
    if cue.spoken is not None:
        number, first, end = cue.spoken
        line = cue.lines[number]
        before, word, after = line[:first], line[first:end], line[end:]
        lines[number] = f"{clean(before)}<u>{clean(word)}</u>{clean(after)}"
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _without_arrows(text: str) -> str:
    return re.sub("-{2,}>", "->", text)


def _without_times(text: str) -> str:
    """Lyrics in which nothing that was spoken is read as a time: `[0:12]` becomes `[ 0:12]`."""
    return re.sub(r"([\[<])(?=\d+:\d)", r"\1 ", text)
