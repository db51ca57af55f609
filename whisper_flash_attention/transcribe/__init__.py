"""From a recording to text with times, and to the files that people read.

This folder owns `Transcriber` (a model and its processor, put to work), the results it returns, the
formats they are written in (`writers/`) and the command: `inputs.py` finds recordings,
`destination.py` knows where results go, `session.py` does the work. It stands on `audio/`,
`weights/` and the modeling file; it must not know attention kernels or the benchmark. Terminals are
known to the command's modules, `progress.py` and `quiet.py` alone.
"""

from whisper_flash_attention.transcribe.results import Segment, Transcription, Word
from whisper_flash_attention.transcribe.transcriber import Transcriber
from whisper_flash_attention.transcribe.writers import FORMATS, SubtitleOptions, render, write

__all__ = [
    "FORMATS",
    "Segment",
    "SubtitleOptions",
    "Transcriber",
    "Transcription",
    "Word",
    "render",
    "write",
]
