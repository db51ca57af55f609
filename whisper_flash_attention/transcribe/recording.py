"""`Recording`: an audio source with its options, the position of decoding in it, and its segments.

A reader (`sequential`, `batched`, `hf_long_form`) advances recordings and adds segments to them. An
audio of which every channel is transcribed by itself is one recording per channel, whose results
`merge_channels` combines: in a telephone call each channel has one speaker, and mixed they overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Protocol

from whisper_flash_attention.audio.audio_source import AudioSource, ChannelSources
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.results import Segment, Transcription

if TYPE_CHECKING:
    from torch import Tensor

    from whisper_flash_attention.audio.vad import Chunk


class Features(Protocol):
    """Log-mel features of one recording, as `MelWindows` provides them."""

    @property
    def frames(self) -> int:
        """Length of the recording, at least 1."""

    def window(self, start: int, length: int) -> Tensor:
        """Features `[mel bins, length]` from frame `start` on; starts must not decrease."""


@dataclass(eq=False)
class Recording:
    """A recording, or one channel of it, while it is transcribed.

    Attributes:
        source: what is read; None once the recording is done.
        options: language, task and prompts.
        index: number of the recording in its call, from 0.
        channel: number of the channel, from 1, where each is transcribed by itself.
        on_progress: called with the recording whenever more of it was decoded.
        language: code of the language spoken, in the latest window if it is detected in every
            one; None until it is detected.
        detected: probabilities of languages by code, of every window in which they were detected.
        seconds: length of the recording; 0.0 until a reader has opened it.
        segments: those of all windows so far.
        share: of the recording that was decoded, 0 to 1.
        is_done: whether all segments are there.
        context: tokens so far, those of the initial prompt first.
        context_start: tokens before this one are not in the prompt of the next window.
        features: in sequential mode, what windows are taken from.
        frames: length of the features.
        clips: first frames and ends of what is decoded, in order.
        seek: frame at which the next window begins.
        end: frame at which the clip ends that `seek` is in.
        last_speech: end of the last word, in seconds, if there are word timestamps, by which the
            next window is read and words are fitted.
        words_end: end of the last word, in seconds, as its segment has it.
        chunks: in batched mode, the chunks of speech.
        token_probabilities: in sequential mode with word timestamps, the text tokens so far, each
            with its probability after those before it in its window.
    """

    source: AudioSource | None
    options: RecordingOptions = field(default_factory=RecordingOptions)
    index: int = 0
    channel: int | None = None
    on_progress: Callable[[Recording], None] | None = None
    language: str | None = None
    detected: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    share: float = 0.0
    is_done: bool = False
    context: list[int] = field(default_factory=list)
    context_start: int = 0
    features: Features | None = None
    frames: int = 0
    clips: tuple[tuple[int, int], ...] = ()
    seek: int = 0
    end: int = 0
    last_speech: float = 0.0
    words_end: float = 0.0
    chunks: CountedChunks | None = None
    token_probabilities: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.language = self.options.language

    def begin_windows(
        self, features: Features, clips: tuple[tuple[int, int], ...] | None = None
    ) -> None:
        """Set the features that windows are taken from, and seek to the first clip.

        Args:
            clips: first frames and ends of what is decoded, in order; None is all.
        """
        self.features, self.frames = features, features.frames
        self.clips = ((0, self.frames),) if clips is None else clips
        self.enter_clip()

    def enter_clip(self) -> None:
        """Seek to the next clip if the current one is decoded to its end."""
        for begin, end in self.clips:
            if self.seek < end:
                self.seek, self.end = max(self.seek, begin), end
                return
        self.seek = self.end = self.frames

    @property
    def is_at_start(self) -> bool:
        """Whether no window was decoded."""
        return self.seek == (self.clips[0][0] if self.clips else 0)

    @property
    def is_at_end(self) -> bool:
        """Whether no window is left."""
        return self.seek >= self.frames

    def begin_chunks(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Set the chunks of speech that are decoded, of a recording of this length."""
        self.chunks, self.seconds = CountedChunks(chunks), seconds
        if self.chunks.are_done:  # there is no speech
            self._finish()

    def add_window(self, segments: Sequence[Segment], seek: int) -> None:
        """Add the segments of a window, up to frame `seek` of the recording."""
        reached = min(seek, self.frames)
        self._add(segments, reached / self.frames, is_done=reached >= self.frames)

    def add_chunk(self, segments: Sequence[Segment], share: float) -> None:
        """Add the segments of a chunk; what follows the last chunk is not decoded."""
        assert self.chunks is not None
        self.chunks.count_done()
        self._add(segments, share, is_done=self.chunks.are_done)

    def add_all(self, segments: Sequence[Segment]) -> None:
        """Add all segments of the recording."""
        self._add(segments, 1.0, is_done=True)

    def add_silence(self, seconds: float) -> None:
        """Note that the recording, of this length, has no sound."""
        self.seconds, self.share = seconds, 1.0
        self._finish()

    def report(self, share: float) -> None:
        """Note the share of the recording that was decoded, 0 to 1."""
        self.share = share
        if self.on_progress is not None:
            self.on_progress(self)

    def _add(self, segments: Sequence[Segment], share: float, *, is_done: bool) -> None:
        self.segments += segments
        if is_done:
            self._finish()
        self.report(share)

    def _finish(self) -> None:
        """Mark the recording as done, and release its samples."""
        self.is_done = True
        self.source = self.features = self.chunks = None

    def located(self, segment: Segment) -> Segment:
        """The segment with the channel, limited to the length of the recording."""
        if self.channel is not None:
            segment = replace(segment, channel=self.channel)
        if segment.end <= self.seconds:
            return segment
        return replace(segment, start=min(segment.start, self.seconds), end=self.seconds)

    def transcription(self, tokenizer: Any) -> Transcription:
        """The transcription of a recording that is done."""
        segments = numbered(map(self.located, self.segments))
        # Blanks between segments are in their tokens, where the language has any.
        texts = (tokenizer.decode(each.tokens, skip_special_tokens=True) for each in segments)
        # A recording without any sound has no language to detect.
        language, probabilities = self.language or "en", mean_probabilities(self.detected)
        if probabilities:
            language = probabilities[0][0]
        return Transcription(
            text="".join(texts).strip(),
            language=language,
            segments=segments,
            seconds=self.seconds,
            language_probability=probabilities[0][1] if probabilities else None,
            all_language_probs=probabilities,
        )


class CountedChunks:
    """Chunks of a recording, and whether all of them are done.

    The next chunk is taken ahead, so that the last one is known as the last. One thread may take
    chunks while another counts those that are done.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = iter(chunks)
        self._next = next(self._chunks, None)
        self._given = self._done = 0  # each is counted by one thread

    def __iter__(self) -> Iterator[Chunk]:
        while self._next is not None:
            # In this order: a thread that finds no chunk left has counted all that were given.
            chunk = self._next
            self._given += 1
            self._next = next(self._chunks, None)
            yield chunk

    def count_done(self) -> None:
        """Count one more chunk as done."""
        self._done += 1

    @property
    def are_done(self) -> bool:
        return self._next is None and self._given == self._done


def recordings_of(
    audio: AudioSource | ChannelSources,
    options: RecordingOptions,
    index: int,
    on_progress: Callable[[Recording], None] | None = None,
) -> list[Recording]:
    """The recording that an audio source is, or one recording per channel."""
    if isinstance(audio, AudioSource):
        return [Recording(audio, options, index, on_progress=on_progress)]
    return [
        Recording(source, options, index, channel, on_progress)
        for channel, source in enumerate(audio.sources, 1)
    ]


def share_of(channels: Sequence[Recording]) -> float:
    """Share of an audio that was decoded, 0 to 1."""
    return sum(recording.share for recording in channels) / len(channels)


def are_done(channels: Sequence[Recording]) -> bool:
    """Whether all channels of an audio are done."""
    return all(recording.is_done for recording in channels)


def mean_probabilities(detected: Sequence[Mapping[str, float]]) -> tuple[tuple[str, float], ...]:
    """Pairs of languages and their mean probabilities over several windows, likeliest first."""
    totals: dict[str, float] = {}
    for each in detected:
        for code, probability in each.items():
            totals[code] = totals.get(code, 0.0) + probability
    pairs = ((code, total / len(detected)) for code, total in totals.items())
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def merge_channels(channels: Sequence[Recording], tokenizer: Any) -> Transcription:
    """Merge the transcriptions of the channels of an audio into one; a single one stays as it is.

    Segments are in the order of their starts, and every turn (consecutive segments of one channel)
    is a line of the text. The language and its probabilities are those of the first channel in
    which there is speech.
    """
    found = [recording.transcription(tokenizer) for recording in channels]
    if len(channels) == 1:
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
        segments=numbered(segments),
        seconds=max(each.seconds for each in found),
        language_probability=spoken.language_probability,
        all_language_probs=spoken.all_language_probs,
    )


def numbered(segments: Iterable[Segment], first: int = 0) -> tuple[Segment, ...]:
    """The segments with their ids, from `first` on."""
    return tuple(replace(segment, id=number) for number, segment in enumerate(segments, first))


def stream_segments(
    windows: Iterable[tuple[Recording, Sequence[Segment]]], channels: Sequence[Recording]
) -> Iterator[Segment]:
    """Yield the segments of an audio as soon as no earlier one can follow.

    Args:
        windows: segments of every window, with the channel that they are of.
        channels: of the audio, complete when the first window is there.
    """
    waiting: list[tuple[float, int, int, Segment]] = []  # by start, then channel, then count
    count = 0
    for recording, segments in windows:
        if len(channels) == 1:
            yield from map(recording.located, segments)
            continue
        for segment in segments:
            found = recording.located(segment)
            heappush(waiting, (found.start, recording.channel or 0, count, found))
            count += 1
        reached = min(
            float("inf") if each.is_done else each.share * each.seconds for each in channels
        )
        while waiting and waiting[0][0] < reached:
            yield heappop(waiting)[-1]
    while waiting:
        yield heappop(waiting)[-1]
