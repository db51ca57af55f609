"""The formats: plain text, JSON, SubRip (srt), WebVTT (vtt), SubStation Alpha (ass), tsv, lrc.

Times are written to the millisecond, in lyrics to the hundredth. WebVTT follows
https://www.w3.org/TR/webvtt1/: text is escaped, and a cue ends after it starts. SubRip has no
standard and no escapes: what would be read as an arrow is broken up, and in lyrics what would be
read as a time. SubStation Alpha has times in hundredths, and karaoke tags where words have times:
each word changes its colour when it is spoken. The table is openai-whisper's. Control characters
are shown as escapes everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from whisper_flash_attention import validation as check
from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.terminal import json_line, printable
from whisper_flash_attention.transcribe.results import Segment, Transcription, Word
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
        options: the layout of subtitles (srt, vtt and ass); without effect on other formats.

    Raises:
        OptionError: the format is unknown.
    """
    check.one_of("output_format", output_format, FORMATS)
    return FORMATS[output_format](transcription, options or SubtitleOptions())


def _line(segment: Segment) -> str:
    """A segment's text as one line, with its channel in front where it has one."""
    return label_of(segment) + one_line(segment.text)


def render_line(segment: Segment, *, timed: bool = False, coloured: bool = False) -> str:
    """Return a segment's text as a line for a terminal.

    Args:
        timed: with its times in front.
        coloured: with its words, if they have times, in colours from red (improbable) to green.
    """
    times = f"[{_clock_of(segment.start)} --> {_clock_of(segment.end)}] " if timed else ""
    text = _line(segment)
    if coloured and segment.words:
        words = "".join(map(_coloured, segment.words))
        text = label_of(segment) + words.removeprefix(" ")
    return f"{times}{text}\n"


# Numbers of colours in a terminal's palette of 256.
_COLOURS = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82)


def _coloured(word: Word) -> str:
    colour = _COLOURS[min(int(word.probability * len(_COLOURS)), len(_COLOURS) - 1)]
    text = printable(word.text, is_speech=True)
    return f"{' ' * text.startswith(' ')}\x1b[38;5;{colour}m{text.strip()}\x1b[0m"


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


_ASS_HEADER = """\
[Script Info]
ScriptType: v4.00+
WrapStyle: 2
ScaledBorderAndShadow: yes
PlayResX: 1280
PlayResY: 720

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, \
Italic, Underline, StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, \
Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,48,&H0000FFFF,&H00FFFFFF,&H00000000,&H80000000,0,0,0,0,100,100,0,0,1,2,1,2,\
40,40,40,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def _ass(transcription: Transcription, options: SubtitleOptions) -> str:
    # Words are coloured within their cue, which needs none for each of them.
    cues = build_cues(transcription.segments, replace(options, highlight_words=False))
    return _ASS_HEADER + "".join(map(_dialogue, cues))


def _dialogue(cue: Cue) -> str:
    times = f"{_ass_clock(cue.start)},{_ass_clock(cue.end)}"
    return f"Dialogue: 0,{times},Default,,0,0,0,,{_karaoke(cue)}\n"


def _karaoke(cue: Cue) -> str:
    """A cue's text, each word that has times with the hundredths until it is over."""
    if not cue.words:
        # The style's first colour is that of words that were spoken.
        return r"{\1c&HFFFFFF&}" + r"\N".join(map(_without_tags, cue.lines))
    lines = [""] * len(cue.lines)
    written = [0] * len(cue.lines)
    reached = _hundredths(cue.start)
    for number, first, last, start, end in cue.words:
        line = cue.lines[number]
        begin, over = max(_hundredths(start), reached), max(_hundredths(end), reached)
        pause = f"{{\\k{begin - reached}}}" if begin > reached else ""
        before, word = line[written[number] : first], line[first:last]
        lines[number] += f"{pause}{_without_tags(before)}{{\\k{over - begin}}}{_without_tags(word)}"
        written[number], reached = last, over
    return r"\N".join(lines)


def _without_tags(text: str) -> str:
    """Text in which nothing is read as a tag or an escape."""
    return text.replace("\\", "\\\u2060").replace("{", "\\{").replace("}", "\\}")


def _hundredths(milliseconds: int) -> int:
    return (milliseconds + 5) // 10


def _ass_clock(milliseconds: int) -> str:
    seconds, hundredths = divmod(_hundredths(milliseconds), 100)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}.{hundredths:02d}"


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
    {
        "txt": _txt,
        "json": _json,
        "srt": _srt,
        "vtt": _vtt,
        "ass": _ass,
        "tsv": _tsv,
        "lrc": _lrc,
    }
)
SUBTITLES = ("srt", "vtt", "ass")  # what `SubtitleOptions` are about


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
