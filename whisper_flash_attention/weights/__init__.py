"""Weights from anywhere: checkpoints as tensors, and the tokenizers that go with them.

This folder owns the file formats (safetensors, OpenAI's `.pt`, CTranslate2's `model.bin`, the
packages that carry them, tokenizers), their conversion to Transformers' parameter names and
configurations, and processors. `model_files` reads all that transcription needs; Transformers is
imported for processors only. The folder must not know the modeling file, attention back-ends or the
command line. Every file is taken to be hostile: what cannot be read is a `WeightsError` that names
the file and what is wrong with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_flash_attention.weights.checkpoint import Checkpoint
    from whisper_flash_attention.weights.packaged import PackagedSource, packaged_source
    from whisper_flash_attention.weights.processor import load_processor
    from whisper_flash_attention.weights.sources import hub_id, read_checkpoint

# Imported when first read: most of them need PyTorch, which the help of a command does not.
_HOMES = {
    "Checkpoint": "checkpoint",
    "PackagedSource": "packaged",
    "hub_id": "sources",
    "load_processor": "processor",
    "packaged_source": "packaged",
    "read_checkpoint": "sources",
}

__all__ = [
    "Checkpoint",
    "PackagedSource",
    "hub_id",
    "load_processor",
    "packaged_source",
    "read_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
