"""Cut what a window says into segments at its timestamps, and tell where the next window begins.

The rules are those of `transcribe` in OpenAI's whisper/transcribe.py: two timestamps side by side
end one segment and begin another; a lone one at the end says that nothing more is said in this
window; without a pair the window is one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from whisper_flash_attention.transcribe.vocabulary import Vocabulary

# Frames of features per second, and per timestamp.
FRAMES_PER_SECOND = 100
FRAMES_PER_TIMESTAMP = 2


@dataclass(frozen=True)
class TokenSpan:
    """A segment in its window: seconds from the window's beginning, and its tokens."""

    start: float
    end: float
    tokens: tuple[int, ...]


def split_at_timestamps(
    tokens: Sequence[int], frames: int, vocabulary: Vocabulary
) -> tuple[list[TokenSpan], int]:
    """The spans of a window's result, and by how many frames the next window begins later.

    Args:
        tokens: the result without its end, timestamps included.
        frames: of the recording that the window covers, at most 3000.
    """
    stamps = [token >= vocabulary.timestamp_begin for token in tokens]
    pairs = [i for i in range(1, len(tokens)) if stamps[i - 1] and stamps[i]]
    ends_alone = ends_in_silence(tokens, vocabulary)
    if not pairs:
        return [_whole(tokens, stamps, frames, vocabulary)], frames
    bounds = [0, *pairs, *([len(tokens)] if ends_alone else [])]
    spans = [
        TokenSpan(
            vocabulary.seconds(tokens[begin]),
            vocabulary.seconds(tokens[end - 1]),
            tuple(tokens[begin:end]),
        )
        for begin, end in pairwise(bounds)
    ]
    if ends_alone:
        return spans, frames
    last = tokens[bounds[-1] - 1] - vocabulary.timestamp_begin
    return spans, last * FRAMES_PER_TIMESTAMP


def ends_in_silence(tokens: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether an result's last timestamp stands alone: nothing more is said in the window."""
    return [token >= vocabulary.timestamp_begin for token in tokens[-2:]] == [False, True]


def _whole(
    tokens: Sequence[int], stamps: list[bool], frames: int, vocabulary: Vocabulary
) -> TokenSpan:
    """All of a window as one span, which ends where its last timestamp says, if it has any."""
    end = frames / FRAMES_PER_SECOND
    said = [token for token, is_stamp in zip(tokens, stamps, strict=True) if is_stamp]
    if said and said[-1] != vocabulary.timestamp_begin:
        end = vocabulary.seconds(said[-1])
    return TokenSpan(0.0, end, tuple(tokens))
