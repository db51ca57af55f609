"""Split the decoding result of a window at its timestamps, and locate what is decoded next.

The rules are those of `transcribe` in whisper/transcribe.py of OpenAI: two timestamps side by side
end one segment and begin another; a single one at the end says that nothing follows in this window;
without a pair the window is one segment. `clip_timestamps` selects the parts of a recording that
are decoded at all.

Whisper ends a result early if it takes the last sentence for one that continues in the next window,
and sometimes takes speech for silence. Among chunks that are decoded side by side no next window
covers that; `leftovers` makes chunks of their own of

- what follows the last timestamp, if there is speech in it;
- speech between two segments, which neither of them covers;
- both halves of a chunk whose text is much too short for its speech.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.tokenizer import Vocabulary

if TYPE_CHECKING:
    from whisper_flash_attention.transcribe.window_decoder import DecodingResult

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
    """The spans of a result, and the frames from this window to the next.

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


def segment_of(
    span: TokenSpan, text: str, offset: float, result: DecodingResult, language: str | None = None
) -> Segment:
    """The segment that a span of a window is, if the window begins `offset` seconds in.

    Args:
        language: of the window, if segments are to carry it.
    """
    # Timestamps are 0.02 s apart; rounding takes off what adding windows up left.
    start, end = round(offset + span.start, 2), round(offset + span.end, 2)
    return Segment(
        seek=round(offset * FRAMES_PER_SECOND),
        start=start,
        end=max(start, end),
        text=text,
        tokens=span.tokens,
        avg_logprob=result.avg_logprob,
        no_speech_prob=result.no_speech_prob,
        compression_ratio=result.compression_ratio,
        temperature=result.temperature,
        language=language,
    )


def ends_in_silence(tokens: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether a result ends with a single timestamp: nothing follows in the window."""
    return [token >= vocabulary.timestamp_begin for token in tokens[-2:]] == [False, True]


def _whole(
    tokens: Sequence[int], stamps: list[bool], frames: int, vocabulary: Vocabulary
) -> TokenSpan:
    """All of a window as one span, which ends at its last timestamp, if it has any."""
    end = frames / FRAMES_PER_SECOND
    found = [token for token, is_stamp in zip(tokens, stamps, strict=True) if is_stamp]
    if found and found[-1] != vocabulary.timestamp_begin:
        end = vocabulary.seconds(found[-1])
    return TokenSpan(0.0, end, tuple(tokens))


Spans = tuple[tuple[float, float], ...]


def spans_of(timestamps: Sequence[float]) -> Spans:
    """Starts and ends in seconds, of timestamps start, end, start ...; without any, of all.

    The last end may be left out: there is none then.
    """
    bounds = [*timestamps] or [0.0]
    if len(bounds) % 2:
        bounds.append(math.inf)
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))


def frames_of(spans: Spans, total: int) -> tuple[tuple[int, int], ...]:
    """First frames and ends of the spans within a recording of `total` frames."""
    most = total / FRAMES_PER_SECOND
    return tuple(
        (round(start * FRAMES_PER_SECOND), min(round(min(end, most) * FRAMES_PER_SECOND), total))
        for start, end in spans
        if start < most
    )


def chunks_within(chunks: Iterable[Chunk], spans: Spans) -> Iterator[Chunk]:
    """The parts of chunks, in order of time, that are within the spans."""
    for chunk in chunks:
        for start, end in spans:
            if start < chunk.end and end > chunk.start:
                part = chunk.part(start, end)
                if part.samples.size:
                    yield part


def spans_within(spans: Spans, others: Spans) -> Spans:
    """The parts of spans, in order of time, that are within others."""
    both = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return tuple((start, end) for start, end in both if start < end)


# Least seconds of speech that are decoded again: after a timestamp that begins a segment, after one
# that ends the last segment, and between segments. Timestamps are right within about half a second.
AFTER_A_BEGINNING, AFTER_AN_END, BETWEEN_SEGMENTS = 0.3, 0.6, 1.5
# Speech has three to five tokens a second. Text with fewer than this is not all that was spoken,
# if there are this many seconds of speech or more.
LEAST_TOKENS_PER_SECOND, LONG_SPEECH = 1.0, 8.0


@dataclass(frozen=True)
class Leftovers:
    """Parts of a chunk to be decoded again.

    Args:
        chunks: in order of time.
        is_split: whether they are the whole chunk, whose results replace that of the chunk.
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
        if chunk.has_speech(start, end, BETWEEN_SEGMENTS):
            found.append(chunk.part(start, end, is_doubtful=True))
    rest = _rest(chunk, tokens, vocabulary, uses_vad=uses_vad)
    return Leftovers((*found, *(() if rest is None else (rest,))))


def _is_sparse(chunk: Chunk, span: TokenSpan, vocabulary: Vocabulary) -> bool:
    enough_for = _text_tokens(span.tokens, vocabulary) / LEAST_TOKENS_PER_SECOND
    least = max(LONG_SPEECH, math.nextafter(enough_for, math.inf))
    return chunk.has_speech(chunk.start + span.start, chunk.start + span.end, least)


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
        return None  # text to the end, or a timestamp at the beginning of the chunk
    start = chunk.start + vocabulary.seconds(tokens[-1])
    if ends_in_silence(tokens, vocabulary):
        is_left = chunk.has_speech(start, chunk.end, AFTER_AN_END)
        return chunk.part(start, chunk.end, is_doubtful=True) if is_left else None
    if uses_vad:
        is_left = chunk.has_speech(start, chunk.end, AFTER_A_BEGINNING)
    else:
        is_left = chunk.end - start >= AFTER_A_BEGINNING
    return chunk.part(start, chunk.end) if is_left else None
