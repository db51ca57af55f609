"""A processor and a generation config for random weights: they talk, with timestamps, of nothing.

Text tokens are names of made-up words, most with the blank before them, about as long as Whisper's.
Of the timestamps only <|0.00|> may be said, so that every window is one segment of given length.
"""

from __future__ import annotations

import random

from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

from whisper_flash_attention.benchmark.settings import DECODER_POSITIONS, ModelSize
from whisper_flash_attention.weights.generation import known_alignment_heads, make_generation_config
from whisper_flash_attention.weights.tokens import SpecialTokens, timestamp_names

LETTERS = "etaoinshrdlucmfwygpbvkxqjz"
BLANK = "Ġ"  # as GPT-2's vocabulary writes it


def random_processor(size: ModelSize) -> WhisperProcessor:
    """A processor whose tokenizer has the ids of a multilingual checkpoint of this size."""
    tokens = special_tokens(size)
    names = text_names(tokens.end_of_text)
    tokenizer = WhisperTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *tokens.language_ids,
        *("<|translate|>", "<|transcribe|>", "<|startoflm|>"),
        *("<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
    ]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(name, special=False) for name in timestamp_names()])
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=size.mel_bins), tokenizer)


def special_tokens(size: ModelSize) -> SpecialTokens:
    """The ids of the special tokens of a vocabulary of this size."""
    tokens = SpecialTokens.of_vocabulary(size.vocabulary)
    assert tokens is not None
    return tokens


def text_names(count: int) -> list[str]:
    """So many names of text tokens, none twice: letters, and words of two to eight of them."""
    dice = random.Random(0)
    names = dict.fromkeys(LETTERS)
    while len(names) < count:
        word = "".join(dice.choices(LETTERS, k=dice.randint(2, 8)))
        names.setdefault(BLANK + word if dice.random() < 0.7 else word)
    return list(names)


def talking_config(size: ModelSize, decoder_layers: int) -> GenerationConfig:
    """The generation config of a checkpoint of this size, whose only timestamp is <|0.00|>."""
    tokens = special_tokens(size)
    beyond = range(tokens.first_timestamp + 1, size.vocabulary)
    return make_generation_config(
        tokens,
        max_length=DECODER_POSITIONS,
        suppress=sorted({*tokens.suppressed, *beyond}),
        alignment_heads=known_alignment_heads(
            size.encoder_layers, decoder_layers, size.heads, size.vocabulary
        ),
    )
