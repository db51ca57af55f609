"""The channels of one recording, transcribed side by side as recordings, and merged by time.

In a recording of a telephone call each channel has one speaker; mixed, they speak over one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from whisper_flash_attention.audio.audio_source import AudioSource, ChannelSources
from whisper_flash_attention.transcribe.results import Segment, Transcription
from whisper_flash_attention.transcribe.work import Work

if TYPE_CHECKING:
    from whisper_flash_attention.transcribe.reading import Read


def split(work: Work, sound: AudioSource | ChannelSources) -> list[tuple[Work, AudioSource]]:
    """Return what is read of a recording: itself, or a work for every channel."""
    if isinstance(sound, AudioSource):
        return [(work, sound)]
    return [
        (replace(work, channel=number, segments=[]), each)
        for number, each in enumerate(sound.sources, 1)
    ]


def share_of(works: Sequence[Work]) -> float:
    """Return the share of a recording that was read, 0 to 1."""
    return sum(work.share for work in works) / len(works)


def merged(works: Sequence[Work], tokenizer: Any) -> Transcription:
    """Merge the transcriptions of a recording's works into one.

    Segments of several channels are in order of their starts, and every turn (segments of one
    channel that follow one another) is a line of the text. The language and its probabilities
    are those of the first channel in which there is speech.
    """
    found = [work.transcription(tokenizer) for work in works]
    if len(works) == 1:
        return found[0]
    segments = sorted(
        (segment for each in found for segment in each.segments), key=lambda each: each.start
    )
    turns: list[list[Segment]] = []
    for segment in segments:
        if turns and turns[-1][-1].channel == segment.channel:
            turns[-1].append(segment)
        else:
            turns.append([segment])
    lines = (
        "".join(tokenizer.decode(each.tokens, skip_special_tokens=True) for each in turn).strip()
        for turn in turns
    )
    spoken = next((each for each in found if each.segments), found[0])
    return Transcription(
        text="\n".join(lines),
        language=spoken.language,
        segments=tuple(segments),
        seconds=max(each.seconds for each in found),
        language_probability=spoken.language_probability,
        all_language_probs=spoken.all_language_probs,
    )


def in_order_of_time(
    reads: Iterable[tuple[Work, Read]], works: Sequence[Work]
) -> Iterator[Segment]:
    """Yield the segments of a recording's works as soon as nothing earlier can follow.

    Args:
        reads: what windows gave, of all works.
        works: of the recording, once the first of `reads` is there.
    """
    waiting: list[tuple[float, int, int, Segment]] = []  # by start, then channel, then order
    count = 0
    for work, read in reads:
        if len(works) == 1:
            yield from map(work.within, read.segments)
            continue
        for segment in read.segments:
            found = work.within(segment)
            heappush(waiting, (found.start, work.channel or 0, count, found))
            count += 1
        reached = min(float("inf") if each.is_done else each.share * each.seconds for each in works)
        while waiting and waiting[0][0] < reached:
            yield heappop(waiting)[-1]
    while waiting:
        yield heappop(waiting)[-1]
