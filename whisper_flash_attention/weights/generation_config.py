"""The generation configuration that the checkpoints on the Hub carry, for those from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from whisper_flash_attention.weights.tokens import BEGIN_OF_SEQUENCE, SpecialTokens

# Cross-attention heads (layer, head) that follow the audio, for word timestamps: OpenAI's
# `_ALIGNMENT_HEADS` in `whisper/__init__.py`. The key is (encoder layers, decoder layers,
# vocabulary). The first two large models have the same dimensions and different heads, so for them
# there is none.
# fmt: off
_ALIGNMENT_HEADS: dict[tuple[int, int, int], tuple[tuple[int, int], ...]] = {
    (4, 4, 51864): ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)),
    (4, 4, 51865): ((2, 2), (3, 0), (3, 2), (3, 3), (3, 4), (3, 5)),
    (6, 6, 51864): ((3, 3), (4, 7), (5, 1), (5, 5), (5, 7)),
    (6, 6, 51865): ((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6)),
    (12, 12, 51864): (
        (6, 6), (7, 0), (7, 3), (7, 8), (8, 2), (8, 5), (8, 7), (9, 0), (9, 4), (9, 8), (9, 10),
        (10, 0), (10, 1), (10, 2), (10, 3), (10, 6), (10, 11), (11, 2), (11, 4),
    ),
    (12, 12, 51865): (
        (5, 3), (5, 9), (8, 0), (8, 4), (8, 7), (8, 8), (9, 0), (9, 7), (9, 9), (10, 5),
    ),
    (24, 24, 51864): (
        (11, 4), (14, 1), (14, 12), (14, 14), (15, 4), (16, 0), (16, 4), (16, 9), (17, 12),
        (17, 14), (18, 7), (18, 10), (18, 15), (20, 0), (20, 3), (20, 9), (20, 14), (21, 12),
    ),
    (24, 24, 51865): ((13, 15), (15, 4), (15, 15), (16, 1), (20, 0), (23, 4)),
    (32, 32, 51866): (
        (7, 0), (10, 17), (12, 18), (13, 12), (16, 1), (17, 14), (19, 11), (21, 4), (24, 1),
        (25, 6),
    ),
    (32, 4, 51866): ((2, 4), (2, 11), (3, 3), (3, 6), (3, 11), (3, 14)),
}
# fmt: on
_HEADS_OF_LAYERS = {4: 6, 6: 8, 12: 12, 24: 16, 32: 20}


def known_alignment_heads(
    encoder_layers: int, decoder_layers: int, heads: int, vocab_size: int
) -> tuple[tuple[int, int], ...] | None:
    """OpenAI's alignment heads where the dimensions tell which checkpoint it is, else None."""
    if _HEADS_OF_LAYERS.get(encoder_layers) != heads:
        return None
    return _ALIGNMENT_HEADS.get((encoder_layers, decoder_layers, vocab_size))


def generation_values(
    tokens: SpecialTokens,
    *,
    max_length: int,
    suppress: Iterable[int] | None = None,
    suppress_at_begin: Iterable[int] | None = None,
    alignment_heads: Iterable[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """What `generation_config.json` of OpenAI's repositories on the Hub holds.

    Args:
        tokens: the special tokens of the vocabulary.
        max_length: positions of the decoder.
        suppress: ids that are never generated; OpenAI's list unless given.
        suppress_at_begin: ids that are not generated first; OpenAI's list unless given.
        alignment_heads: (layer, head) pairs for word timestamps. The attribute is absent without.
    """
    options: dict[str, Any] = {
        "bos_token_id": BEGIN_OF_SEQUENCE,
        "eos_token_id": tokens.end_of_text,
        "pad_token_id": tokens.end_of_text,
        "decoder_start_token_id": tokens.start_of_transcript,
        "prev_sot_token_id": tokens.start_of_previous,
        "no_timestamps_token_id": tokens.no_timestamps,
        "max_initial_timestamp_index": 50,
        "max_length": max_length,
        "return_timestamps": False,
        "is_multilingual": tokens.multilingual,
        "suppress_tokens": list(tokens.suppressed if suppress is None else suppress),
        "begin_suppress_tokens": list(
            tokens.suppressed_at_begin if suppress_at_begin is None else suppress_at_begin
        ),
    }
    if tokens.multilingual:
        options["lang_to_id"] = tokens.language_ids
        options["task_to_id"] = {"translate": tokens.translate, "transcribe": tokens.transcribe}
        # Without it Transformers leaves the task out of the prompt when it detects the language.
        options["forced_decoder_ids"] = [[1, None], [2, tokens.transcribe]]
    if alignment_heads is not None:
        options["alignment_heads"] = [list(pair) for pair in alignment_heads]
    return options
