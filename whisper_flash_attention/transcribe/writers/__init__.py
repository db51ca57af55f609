"""A transcription as a file: plain text, JSON, subtitles, a table, lyrics.

`cues` decides what a subtitle shows and when; `formats` spells it and the other
formats out; `files` puts them on the disk. None of them knows recordings, models or terminals.
"""

from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.transcribe.writers.files import write
from whisper_flash_attention.transcribe.writers.formats import FORMATS, SUBTITLES, render

__all__ = ["FORMATS", "SUBTITLES", "SubtitleOptions", "render", "write"]
