"""A transcription's file, whole or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import SubtitleOptions
from whisper_flash_attention.transcribe.results import Transcription
from whisper_flash_attention.transcribe.writers.formats import render


def write(
    transcription: Transcription,
    path: Path,
    output_format: str,
    *,
    options: SubtitleOptions | None = None,
    overwrite: bool = False,
) -> None:
    """Write `path` in UTF-8, whole or not at all: an interrupted write leaves what was there.

    Args:
        transcription: what was said.
        path: in a folder that exists.
        output_format: one of `FORMATS`.
        options: how subtitles are cut.
        overwrite: replace a file that is there.

    Raises:
        OptionError: the format is unknown, the file is there already and not to be overwritten, or
            it cannot be written.
    """
    text = render(transcription, output_format, options)
    # Short, as the file's own name may be as long as the file system allows.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if not overwrite and path.is_file():
            raise OptionError(f"{path}: is there already; overwrite must be asked for")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if temporary.exists():
            temporary.unlink()
