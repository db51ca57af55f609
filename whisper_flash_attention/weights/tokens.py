"""Whisper's special tokens and generation configuration, which follow from its vocabulary's size.

The numbering is that of OpenAI's `whisper/tokenizer.py`: text, end of text, start of transcript,
languages, tasks and markers, then 1,501 timestamps (0.00 s to 30.00 s in steps of 0.02 s).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from whisper_flash_attention.languages import LANGUAGES

TIMESTAMPS = 1501
SECONDS_PER_TIMESTAMP = 0.02
# `bos_token_id` of every repository of OpenAI's on the Hub; Whisper itself has no such token.
BEGIN_OF_SEQUENCE = 50257

# Vocabulary -> number of languages. English-only models carry the 99 language tokens, unused.
_LANGUAGES_OF = {51864: 99, 51865: 99, 51866: 100}

# Tokens that are no speech (brackets, musical notes, speaker dashes, ...), by OpenAI's rule
# `Tokenizer.non_speech_tokens`, for the GPT-2 and for the multilingual vocabulary.
# fmt: off
_NON_SPEECH_ENGLISH = (
    1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 357,
    366, 438, 532, 685, 705, 796, 930, 1058, 1220, 1267, 1279, 1303, 1343, 1377, 1391, 1635, 1782,
    1875, 2162, 2361, 2488, 3467, 4008, 4211, 4600, 4808, 5299, 5855, 6329, 7203, 9609, 9959,
    10563, 10786, 11420, 11709, 11907, 13163, 13697, 13700, 14808, 15306, 16410, 16791, 17992,
    19203, 19510, 20724, 22305, 22935, 27007, 30109, 30420, 33409, 34949, 40283, 40493, 40549,
    47282, 49146,
)
_NON_SPEECH_MULTILINGUAL = (
    1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 359,
    503, 522, 542, 873, 893, 902, 918, 922, 931, 1350, 1853, 1982, 2460, 2627, 3246, 3253, 3268,
    3536, 3846, 3961, 4183, 4667, 6585, 6647, 7273, 9061, 9383, 10428, 10929, 11938, 12033, 12331,
    12562, 13793, 14157, 14635, 15265, 15618, 16553, 16604, 18362, 18956, 20075, 21675, 22520,
    26130, 26161, 26435, 28279, 29464, 31650, 32302, 32470, 36865, 42863, 47425, 49870, 50254,
)
# fmt: on
_BLANK = 220  # a lone space, in both vocabularies


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The ids of the special tokens of one vocabulary."""

    multilingual: bool
    languages: tuple[str, ...]
    end_of_text: int

    @classmethod
    def of_vocabulary(cls, vocab_size: int) -> SpecialTokens | None:
        """The special tokens of a vocabulary of 51864, 51865 or 51866; None for any other size."""
        if vocab_size not in _LANGUAGES_OF:
            return None
        multilingual = vocab_size >= 51865
        languages = tuple(LANGUAGES)[: _LANGUAGES_OF[vocab_size]]
        return cls(multilingual, languages, 50257 if multilingual else 50256)

    @property
    def start_of_transcript(self) -> int:
        return self.end_of_text + 1

    @property
    def language_ids(self) -> dict[str, int]:
        """`{"<|en|>": 50259, ...}`: the tokens as Transformers' `lang_to_id` names them."""
        first = self.start_of_transcript + 1
        return {f"<|{code}|>": first + index for index, code in enumerate(self.languages)}

    @property
    def translate(self) -> int:
        return self.start_of_transcript + 1 + len(self.languages)

    @property
    def transcribe(self) -> int:
        return self.translate + 1

    @property
    def start_of_lm(self) -> int:
        return self.translate + 2

    @property
    def start_of_previous(self) -> int:
        return self.translate + 3

    @property
    def no_speech(self) -> int:
        return self.translate + 4

    @property
    def no_timestamps(self) -> int:
        return self.translate + 5

    @property
    def first_timestamp(self) -> int:
        return self.no_timestamps + 1

    @property
    def suppressed(self) -> tuple[int, ...]:
        """What is never sampled: non-speech and the special tokens that only a prompt may hold."""
        text = _NON_SPEECH_MULTILINGUAL if self.multilingual else _NON_SPEECH_ENGLISH
        markers = (self.translate, self.transcribe, self.start_of_lm, self.start_of_previous)
        return (*text, self.start_of_transcript, *markers, self.no_speech)

    @property
    def suppressed_at_begin(self) -> tuple[int, ...]:
        """What is not sampled first: a blank, and the end."""
        return (_BLANK, self.end_of_text)


def timestamp_names() -> list[str]:
    """`<|0.00|>` to `<|30.00|>`, in the order of their ids."""
    return [f"<|{index * SECONDS_PER_TIMESTAMP:.2f}|>" for index in range(TIMESTAMPS)]


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
