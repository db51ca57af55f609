"""A transcription as a file: plain text, JSON, subtitles, a table, lyrics.

`cues` determines what a subtitle shows and when; `formats` renders subtitles and the other formats;
`files` writes them to disk. None of them knows recordings, models or terminals.
"""

from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.transcribe.writers.files import write
from whisper_flash_attention.transcribe.writers.formats import (
    FORMATS,
    SUBTITLES,
    render,
    render_line,
)

__all__ = ["FORMATS", "SUBTITLES", "SubtitleOptions", "render", "render_line", "write"]
