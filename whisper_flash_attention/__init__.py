"""Whisper for Hugging Face Transformers with memory-efficient attention.

    from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration

Names are imported when they are first used, so that `import whisper_flash_attention` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from whisper_flash_attention._version import __version__

if TYPE_CHECKING:
    from whisper_flash_attention.flash_attention import attend
    from whisper_flash_attention.modeling_whisper_flash_attention import (
        WhisperFlashAttentionForConditionalGeneration,
    )
    from whisper_flash_attention.options import DecodeOptions
    from whisper_flash_attention.transcribe import (
        Segment,
        SubtitleOptions,
        Transcriber,
        Transcription,
        Word,
        write,
    )
    from whisper_flash_attention.weights import load_processor

_HOMES = {
    "DecodeOptions": "options",
    "Segment": "transcribe",
    "SubtitleOptions": "options",
    "Transcriber": "transcribe",
    "Transcription": "transcribe",
    "WhisperFlashAttentionForConditionalGeneration": "modeling_whisper_flash_attention",
    "Word": "transcribe",
    "attend": "flash_attention",
    "load_processor": "weights",
    "write": "transcribe",
}

__all__ = [
    "DecodeOptions",
    "Segment",
    "SubtitleOptions",
    "Transcriber",
    "Transcription",
    "WhisperFlashAttentionForConditionalGeneration",
    "Word",
    "__version__",
    "attend",
    "load_processor",
    "write",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
