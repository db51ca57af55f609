"""Small random Whispers whose attention matters, for tests that need no real weights."""

from __future__ import annotations

import torch
from transformers import WhisperConfig


def small_whisper_config(**changes: object) -> WhisperConfig:
    options: dict[str, object] = {
        "vocab_size": 51865,
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "max_source_positions": 100,
        "num_mel_bins": 80,
    }
    return WhisperConfig(**(options | changes))


def perturbed(model: torch.nn.Module, seed: int = 0, scale: float = 0.08) -> torch.nn.Module:
    """Default initialisation hides mistakes (attention is almost uniform): make weights matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) * scale)
    return model.eval()
