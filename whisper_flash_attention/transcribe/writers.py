"""A transcription as plain text, JSON, SubRip (srt) or WebVTT (vtt), and its file.

Times are written to the millisecond. WebVTT follows https://www.w3.org/TR/webvtt1/: text is
escaped, and a cue ends after it starts. SubRip has no standard and no escapes: what would be read
as an arrow is broken up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.segments import Transcription


def render(transcription: Transcription, output_format: str) -> str:
    """Return the whole file's text in one of `FORMATS`; what is not empty ends with a newline.

    Raises `OptionError` if the format is unknown.
    """
    if output_format not in FORMATS:
        raise OptionError(f"unknown format {output_format!r}; possible: {', '.join(FORMATS)}")
    return FORMATS[output_format](transcription)


def write(transcription: Transcription, path: Path, output_format: str) -> None:
    """Write `path` in UTF-8, whole or not at all: an interrupted write leaves the old file.

    Raises `OptionError` if the format is unknown or the file cannot be written.
    """
    text = render(transcription, output_format)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _txt(transcription: Transcription) -> str:
    return "".join(f"{_one_line(segment.text)}\n" for segment in transcription.segments)


def _json(transcription: Transcription) -> str:
    return json.dumps(transcription.to_dict(), ensure_ascii=False) + "\n"


def _srt(transcription: Transcription) -> str:
    return "\n".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text.replace('-->', '->')}\n"
        for number, (start, end, text) in enumerate(_cues(transcription), start=1)
    )


def _vtt(transcription: Transcription) -> str:
    cues = (
        f"\n{_clock(start, '.')} --> {_clock(end, '.')}\n{_escaped(text)}\n"
        for start, end, text in _cues(transcription)
    )
    return "WEBVTT\n" + "".join(cues)


FORMATS: Mapping[str, Callable[[Transcription], str]] = MappingProxyType(
    {"txt": _txt, "json": _json, "srt": _srt, "vtt": _vtt}
)


def _cues(transcription: Transcription) -> Iterator[tuple[int, int, str]]:
    """Yield start and end in milliseconds, the end after the start, and the text in one line."""
    for segment in transcription.segments:
        start = round(segment.start * 1000)
        yield start, max(round(segment.end * 1000), start + 1), _one_line(segment.text)


def _clock(milliseconds: int, decimal_mark: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{decimal_mark}{milliseconds:03d}"


def _one_line(text: str) -> str:
    # A blank line would end a cue in both subtitle formats.
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
