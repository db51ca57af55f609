"""What an result leaves out of its chunk, and where the chunk is read once more.

Whisper ends an result early if it takes the last sentence for one that goes on in the next window,
and sometimes takes speech for silence. In chunks that are decoded side by side no next window reads
that, so that it becomes a chunk of its own:

- what follows the last timestamp, if there is speech in it;
- speech between two segments, which neither of them covers;
- both halves of a chunk whose text is much too short for its speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.transcribe.segmentation import TokenSpan, ends_in_silence
from whisper_flash_attention.transcribe.vocabulary import Vocabulary

# Least seconds of speech that are read again: where the result says that a segment begins, where it
# says that nothing follows, and between segments. Timestamps are right within about half a second.
AFTER_A_BEGINNING, AFTER_AN_END, BETWEEN_SEGMENTS = 0.3, 0.6, 1.5
# Speech has three to five tokens a second. Text with fewer than this is not all that was spoken,
# if there are this many seconds of speech or more.
LEAST_TOKENS_PER_SECOND, LONG_SPEECH = 1.0, 8.0


@dataclass(frozen=True)
class Leftovers:
    """Parts of a chunk to be read again.

    Args:
        chunks: in order of time.
        is_split: whether they are the whole chunk, to be read again in place of the result.
    """

    chunks: tuple[Chunk, ...] = ()
    is_split: bool = False


def leftovers(
    chunk: Chunk,
    tokens: Sequence[int],
    spans: Sequence[TokenSpan],
    vocabulary: Vocabulary,
    *,
    uses_vad: bool,
) -> Leftovers:
    """Return the parts of a chunk that its result leaves out.

    Args:
        tokens: the result without its end, timestamps included.
        spans: all segments of the result, in seconds of the chunk.
        uses_vad: whether the chunk's speech was found by a detector. Otherwise it is sound that
            stands out, which there is none of in much noise.
    """
    spoken = [span for span in spans if _text_tokens(span.tokens, vocabulary)]
    # A chunk without any text counts as a whole.
    judged = spoken or [TokenSpan(0.0, chunk.seconds, ())]
    if any(_is_sparse(chunk, span, vocabulary) for span in judged):
        return Leftovers(_halves(chunk), is_split=True)
    found = []
    for before, after in pairwise(spoken):
        start, end = chunk.start + before.end, chunk.start + after.start
        if chunk.speech_within(start, end) >= BETWEEN_SEGMENTS:
            found.append(chunk.part(start, end, is_doubtful=True))
    rest = _rest(chunk, tokens, vocabulary, uses_vad=uses_vad)
    return Leftovers((*found, *(() if rest is None else (rest,))))


def _is_sparse(chunk: Chunk, span: TokenSpan, vocabulary: Vocabulary) -> bool:
    speech = chunk.speech_within(chunk.start + span.start, chunk.start + span.end)
    text = _text_tokens(span.tokens, vocabulary)
    return speech >= LONG_SPEECH and text < LEAST_TOKENS_PER_SECOND * speech


def _text_tokens(tokens: Sequence[int], vocabulary: Vocabulary) -> int:
    return sum(token < vocabulary.end for token in tokens)


def _halves(chunk: Chunk) -> tuple[Chunk, Chunk]:
    """Split the chunk at the longest pause of its middle half, or in the middle."""
    low, high = chunk.start + chunk.seconds / 4, chunk.end - chunk.seconds / 4
    pauses = [
        (begin - end, (begin + end) / 2)
        for (_, end), (begin, _) in pairwise(chunk.speech)
        if low < (begin + end) / 2 < high
    ]
    middle = max(pauses)[1] if pauses else chunk.start + chunk.seconds / 2
    return chunk.part(chunk.start, middle), chunk.part(middle, chunk.end)


def _rest(
    chunk: Chunk, tokens: Sequence[int], vocabulary: Vocabulary, *, uses_vad: bool
) -> Chunk | None:
    """What follows the last timestamp, if the result ends there and speech follows."""
    if not tokens or tokens[-1] <= vocabulary.timestamp_begin:
        return None  # text to the end, or a timestamp that reads the whole chunk again
    start = chunk.start + vocabulary.seconds(tokens[-1])
    speech = chunk.speech_within(start, chunk.end)
    if ends_in_silence(tokens, vocabulary):
        is_left = speech >= AFTER_AN_END
        return chunk.part(start, chunk.end, is_doubtful=True) if is_left else None
    is_left = (speech if uses_vad else chunk.end - start) >= AFTER_A_BEGINNING
    return chunk.part(start, chunk.end) if is_left else None
