"""Small random Whispers as folders, with features for them, so that comparisons take seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration

from tests.random_whisper import perturbed, small_whisper_config
from whisper_flash_attention.weights.tokens import SpecialTokens, generation_values

FRAMES = 200
ENGLISH_ONLY, MULTILINGUAL = 51864, 51865


def write_checkpoint(folder: Path, vocab_size: int, *, longest: int = 14) -> Path:
    """A Transformers folder with perturbed weights, whose texts are `longest` ids at most."""
    tokens = SpecialTokens.of_vocabulary(vocab_size)
    assert tokens is not None
    config = small_whisper_config(
        vocab_size=vocab_size,
        max_target_positions=longest,
        bos_token_id=tokens.end_of_text,
        eos_token_id=tokens.end_of_text,
        pad_token_id=tokens.end_of_text,
        decoder_start_token_id=tokens.start_of_transcript,
    )
    torch.manual_seed(0)
    model = perturbed(WhisperForConditionalGeneration(config), scale=0.1)
    # An output bound to the input's embeddings repeats one word.
    positions = model.model.decoder.embed_positions.weight
    torch.nn.init.normal_(positions, std=2.0)
    values = generation_values(tokens, max_length=longest)
    model.generation_config = GenerationConfig(**values)
    model.save_pretrained(folder)
    return folder


def write_features(path: Path, count: int = 3, frames: int = FRAMES, seed: int = 0) -> Path:
    """Random features for such models, under the names clip0, clip1, ..."""
    generator = np.random.default_rng(seed)
    arrays = {
        f"clip{index}": generator.standard_normal((80, frames)).astype(np.float32)
        for index in range(count)
    }
    np.savez(path, **arrays)
    return path
