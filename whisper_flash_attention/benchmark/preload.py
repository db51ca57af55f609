"""Imported once by the server that forks a process for every row, so that no row pays for it.

The server must not touch CUDA: a process forked from one that did cannot use the GPU. Counting
devices through the driver's library instead of the runtime keeps PyTorch from doing so.
"""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch  # noqa: F401
import transformers.generation
import transformers.models.whisper.modeling_whisper  # noqa: F401

import whisper_flash_attention.benchmark.measure
import whisper_flash_attention.modeling_whisper_flash_attention  # noqa: F401
