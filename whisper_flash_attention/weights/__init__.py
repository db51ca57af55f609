"""Weights from anywhere: what reads checkpoints that Transformers itself cannot read.

This folder owns the file formats (OpenAI's `.pt`, CTranslate2's `model.bin`, the packages that
carry them), their conversion to Transformers' parameter names and configurations, and the
processors that go with them. It knows files, tensors and configurations; it must not know the
modeling file, attention back-ends or the command line. Every file is taken to be hostile: what
cannot be read is a `WeightsError` that names the file and what is wrong with it.
"""

from whisper_flash_attention.weights.checkpoint import Checkpoint
from whisper_flash_attention.weights.packaged import PackagedSource, packaged_source
from whisper_flash_attention.weights.processor import load_processor
from whisper_flash_attention.weights.sources import hub_id, read_checkpoint

__all__ = [
    "Checkpoint",
    "PackagedSource",
    "hub_id",
    "load_processor",
    "packaged_source",
    "read_checkpoint",
]
