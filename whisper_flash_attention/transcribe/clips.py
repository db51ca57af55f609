"""The parts of a recording that are read, where not all of it is: `clip_timestamps`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.transcribe.segmentation import FRAMES_PER_SECOND

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
    """First frames and ends of the spans within a recording of so many frames."""
    most = total / FRAMES_PER_SECOND
    return tuple(
        (round(start * FRAMES_PER_SECOND), min(round(min(end, most) * FRAMES_PER_SECOND), total))
        for start, end in spans
        if start < most
    )


def chunks_within(chunks: Iterable[Chunk], spans: Spans) -> Iterator[Chunk]:
    """What of chunks, in order of time, is within the spans."""
    for chunk in chunks:
        for start, end in spans:
            if start < chunk.end and end > chunk.start:
                part = chunk.part(start, end)
                if part.samples.size:
                    yield part


def spans_within(spans: Spans, others: Spans) -> Spans:
    """What of spans, in order of time, is within others."""
    both = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return tuple((start, end) for start, end in both if start < end)
