"""From a recording to text with times, and to the files that people read.

Read `transcriber.py` first: its `_run` passes each `Recording` to a reader, `sequential.py`,
`batched.py` or, without the engine, `hf_long_form.py`. `window_decoder.py` decodes the windows of
the first two, with their prompts, language detection and fallback; `segmentation.py` and `words.py`
turn its results into segments, which `writers/` writes to files. The command is `command.py`:
`inputs.py` finds recordings, `runner.py` transcribes them, `output.py` writes the results. The room
stands on `audio/`, `weights/`, `engine/` and `hf/`; it must not know kernels or the benchmark, and
only modules of the command know terminals.
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
