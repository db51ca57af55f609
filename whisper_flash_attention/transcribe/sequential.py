"""OpenAI's sequential algorithm, for many recordings side by side.

A recording is decoded window by window: each begins where the last complete segment of the previous
one ended, with the text so far as its context. Windows of one recording follow one another; those
of several are decoded side by side, in slots where that is possible: a recording whose window has
ended continues with its next one, and one that is done makes room for another.

Source: `transcribe` in whisper/transcribe.py of OpenAI. As there and in the long form of
Transformers, features are normalized over the whole recording, and zeros follow its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from whisper_flash_attention.audio.log_mel import HOP, MelWindows, frame_levels
from whisper_flash_attention.audio.samples import SHORTEST
from whisper_flash_attention.audio.threads import threads_beside
from whisper_flash_attention.audio.vad import find_stretches
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.hallucination import AlignedWindow, last_end, skip_silence
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment
from whisper_flash_attention.transcribe.segmentation import (
    FRAMES_PER_SECOND,
    TokenSpan,
    ends_in_silence,
    frames_of,
    segment_of,
    spans_of,
    spans_within,
    split_at_timestamps,
)
from whisper_flash_attention.transcribe.tokenizer import Vocabulary
from whisper_flash_attention.transcribe.window_decoder import (
    DecodingResult,
    Window,
    WindowDecoder,
)
from whisper_flash_attention.transcribe.words import SpokenWindow, WindowWords, WordAligner

# Text that needed a higher temperature than this is no context for the next window.
UNSURE_TEMPERATURE = 0.5
# Log-mel features of sound within two steps of 16 bits around 0 are below this, whatever it is.
FAINT = -0.75
# Fewer frames than this at the end of a recording hold no word.
SHORTEST_FRAMES = SHORTEST // HOP

Entry = TypeVar("Entry")
# A recording, and the segments of one window of it.
WindowSegments = tuple[Recording, tuple[Segment, ...]]


class ReadyQueue(Generic[Entry]):
    """Recordings whose next window can be decoded now.

    Args:
        recordings: taken as there is room for them.
        most: bound of the recordings that have begun and are not done.
    """

    def __init__(self, recordings: Iterable[Entry], most: int) -> None:
        self._waiting = iter(recordings)
        self._room = most
        self._ready: deque[Entry] = deque()

    def take(self, count: int) -> list[Entry]:
        """Take at most `count` recordings; those that have begun come first."""
        known = min(count, len(self._ready))
        taken = [self._ready.popleft() for _ in range(known)]
        new = list(islice(self._waiting, min(count - known, self._room)))
        self._room -= len(new)
        return taken + new

    def put_back(self, recording: Entry, *, is_done: bool) -> None:
        """Return a recording that was taken, one window further or decoded to its end."""
        if is_done:
            self._room += 1
        else:
            self._ready.append(recording)


@dataclass(frozen=True)
class _Position:
    """Owner of a window, by the name that errors give it."""

    recording: Recording

    def __str__(self) -> str:
        seconds = self.recording.seek / FRAMES_PER_SECOND
        return f"the window at {seconds:.1f} s of recording {self.recording.index + 1}"


class SequentialReader:
    """Transcribes recordings window by window on an engine."""

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        tokenizer: Any,
        options: DecodeOptions,
        aligner: WordAligner | None = None,
    ) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._options = options
        self._aligner = aligner
        self.decoder = WindowDecoder(engine, vocabulary, tokenizer, options)
        # Frames of a window: the second convolution of the encoder halves them.
        self._length = 2 * engine.weights.encoder.positions.shape[0]

    def prepare(self, recording: Recording) -> Recording:
        """Compute what windows of a recording need, and seek to its first clip.

        Raises:
            AudioError: the recording cannot be read.
            OptionError: its initial prompt contains a special token.
        """
        self.decoder.begin(recording)
        weights, options = self._engine.weights, self._options
        assert recording.source is not None
        features = MelWindows(
            recording.source,
            mel_bins=weights.encoder.conv1.weight.shape[1],
            device=weights.device,
            dtype=weights.dtype,
        )
        recording.seconds = features.seconds
        clips = spans_of(options.clip_timestamps)
        if options.uses_vad:
            found = find_stretches(
                recording.source,
                options.vad_parameters,
                threads=threads_beside(weights.device),
            )
            clips = spans_within(found, clips)
        recording.begin_windows(features, frames_of(clips, features.frames))
        return recording

    def prepared(self, recordings: Iterable[Recording]) -> Generator[Recording]:
        """Prepare all recordings, each when it is taken."""
        yield from map(self.prepare, recordings)

    def read(self, recordings: Iterable[Recording], batch_size: int) -> Iterator[WindowSegments]:
        """Transcribe all recordings; yield the segments of every window as it is done.

        Args:
            recordings: prepared ones, taken as there is room for them.
            batch_size: windows that are decoded side by side, at most.
        """
        in_slots, waiting = False, iter(recordings)
        if batch_size > 1 and self.decoder.fits_slots:
            in_slots, waiting = _several(waiting)
        yield from (self._read_in_slots if in_slots else self._read_together)(waiting, batch_size)

    def _read_in_slots(
        self, recordings: Iterator[Recording], slots: int
    ) -> Iterator[WindowSegments]:
        """A recording continues with its next window without waiting for the others."""
        queue = ReadyQueue(recordings, slots)
        skipped: deque[tuple[Recording, int]] = deque()

        def more(count: int) -> list[Window]:
            kept: list[Recording] = []
            features: list[Tensor] = []
            while len(kept) < count and (taken := queue.take(count - len(kept))):
                for recording, window in zip(taken, self.take_windows(taken), strict=True):
                    if window is None:
                        skipped.append((recording, recording.seek))
                        queue.put_back(recording, is_done=recording.is_at_end)
                    else:
                        kept.append(recording)
                        features.append(window)
            return self.windows(kept, self._engine.encode(torch.stack(features))) if kept else []

        for window, result in self.decoder.decode_windows(more, slots):
            recording = window.owner.recording
            [segments] = self.finish([recording], window.states[None], [result])
            yield from _drain(skipped)
            recording.add_window(segments, recording.seek)
            yield recording, segments
            queue.put_back(recording, is_done=recording.is_at_end)
        yield from _drain(skipped)

    def take_windows(self, recordings: Sequence[Recording]) -> list[Tensor | None]:
        """Features `[mel bins, length]` of the next windows; None of a silent one, now skipped."""
        windows = self._features(recordings)
        silent = _silent(windows, recordings)
        for recording, is_silent in zip(recordings, silent, strict=True):
            if is_silent:
                self._skip(recording)
        return [
            None if is_silent else window for window, is_silent in zip(windows, silent, strict=True)
        ]

    def windows(self, recordings: list[Recording], states: Tensor) -> list[Window]:
        """The next windows of recordings, of encoder states `[B, S, D]`."""
        self._detect_languages(recordings, states)
        # States of their own: those of all would be held until the last of them is done. This is
        # one operation, for each of which other threads get the interpreter.
        rows = torch._foreach_mul(states.unbind(), 1)
        return [
            Window(row, self._prompt(recording), _Position(recording))
            for row, recording in zip(rows, recordings, strict=True)
        ]

    def _read_together(
        self, recordings: Iterator[Recording], batch_size: int
    ) -> Iterator[WindowSegments]:
        """All recordings wait for the longest result of their windows."""
        active: list[Recording] = []
        while True:
            active += islice(recordings, batch_size - len(active))
            if not active:
                return
            yield from self.read_together(active)
            active = [recording for recording in active if not recording.is_at_end]

    def read_together(self, active: list[Recording]) -> Iterator[WindowSegments]:
        """Transcribe one window of every active recording."""
        windows = self._features(active)
        silent = _silent(windows, active)
        kept = [each for each, is_silent in zip(active, silent, strict=True) if not is_silent]
        if any(silent):
            windows = windows[[not is_silent for is_silent in silent]]
        found = iter(self._transcribe(kept, windows) if kept else ())
        for recording, is_silent in zip(active, silent, strict=True):
            segments: tuple[Segment, ...] = ()
            if is_silent:
                self._skip(recording)
            else:
                segments = next(found)
            recording.add_window(segments, recording.seek)
            yield recording, segments

    def _features(self, recordings: Sequence[Recording]) -> Tensor:
        """Features of the next windows, `[B, mel bins, length]`, zeros after the ends."""
        return torch.stack([_features_of(each, self._length) for each in recordings])

    def _skip(self, recording: Recording) -> None:
        """Move on after a window without sound."""
        recording.seek = min(recording.seek + self._length, recording.end)
        recording.enter_clip()

    def _transcribe(
        self, recordings: list[Recording], windows: Tensor
    ) -> list[tuple[Segment, ...]]:
        """Segments of windows `[B, mel bins, length]`, one per recording."""
        states = self._engine.encode(windows)
        self._detect_languages(recordings, states)
        results = self.decoder.decode(states, [self._prompt(each) for each in recordings])
        return self.finish(recordings, states, results)

    def finish(
        self, recordings: list[Recording], states: Tensor, results: list[DecodingResult]
    ) -> list[tuple[Segment, ...]]:
        """Segments of windows that were decoded; their recordings move on."""
        starts = [recording.seek for recording in recordings]
        taken = [
            self._take(recording, result)
            for recording, result in zip(recordings, results, strict=True)
        ]
        if self._aligner is not None:
            spoken = [
                self._spoken_window(recording, states[row], taken[row], starts[row])
                for row, recording in enumerate(recordings)
            ]
            for row, found in enumerate(self._aligner.add_words(spoken)):
                recordings[row].token_probabilities += found.token_probabilities
                taken[row] = self._seek_after_words(
                    recordings[row], results[row], found, starts[row]
                )
        for recording, result, segments in zip(recordings, results, taken, strict=True):
            self._extend_context(recording, result, segments)
            recording.enter_clip()
        return taken

    def _detect_languages(self, recordings: list[Recording], states: Tensor) -> None:
        """Detect the languages that are not known, in the first window or in every one."""
        every = self._options.multilingual
        unknown = [i for i, each in enumerate(recordings) if every or each.language is None]
        if unknown:
            self.decoder.detect_languages([recordings[i] for i in unknown], states[unknown])

    def _prompt(self, recording: Recording) -> list[int]:
        assert recording.language is not None
        return self.decoder.prompt(recording, recording.language, is_first=recording.is_at_start)

    def _take(self, recording: Recording, result: DecodingResult) -> tuple[Segment, ...]:
        """Segments of the window at `seek`, if there are any; the recording moves on."""
        frames = min(self._length, recording.end - recording.seek)
        if self.decoder.is_silent(result):
            recording.seek += frames
            return ()
        offset = recording.seek / FRAMES_PER_SECOND
        spans, advance = split_at_timestamps(result.tokens, frames, self._vocabulary)
        # Without an advance (nothing was complete) the window would be decoded for ever.
        recording.seek = min(recording.seek + (advance or frames), recording.end)
        spoken = [(span, text) for span in spans if (text := self._text(span))]
        language = recording.language if self._options.multilingual else None
        return tuple(segment_of(span, text, offset, result, language) for span, text in spoken)

    def _seek_after_words(
        self, recording: Recording, result: DecodingResult, found: WindowWords, start: int
    ) -> tuple[Segment, ...]:
        """Segments of a window with words; the next window begins after the last word."""
        before, recording.last_speech = recording.last_speech, found.last_speech
        is_partly = recording.seek < min(start + self._length, recording.end)
        if is_partly and found.last_word_end is not None:
            after = round(found.last_word_end * FRAMES_PER_SECOND)
            recording.seek = after if after > start else recording.seek
        threshold = self._options.hallucination_silence_threshold
        if threshold is None or not found.segments:
            recording.words_end = _words_end(found.segments, recording.words_end)
            return found.segments
        window = AlignedWindow(
            segments=found.segments,
            start=start,
            frames=min(self._length, recording.end - start),
            length=self._length,
            total=recording.frames,
            seek=recording.seek,
            last_speech=before,
            ends_in_silence=ends_in_silence(result.tokens, self._vocabulary),
        )
        kept, recording.seek = skip_silence(window, threshold)
        recording.last_speech = last_end(kept) if kept else before
        recording.words_end = _words_end(kept, recording.words_end)
        return kept

    def _extend_context(
        self, recording: Recording, result: DecodingResult, segments: tuple[Segment, ...]
    ) -> None:
        """Add the tokens of a window to the context of the next ones, unless it was silent."""
        if self.decoder.is_silent(result):
            return
        for segment in segments:
            recording.context += segment.tokens
        if not self._options.condition_on_previous_text or self._is_unsure(result):
            recording.context_start = len(recording.context)

    def _is_unsure(self, result: DecodingResult) -> bool:
        return result.temperature > UNSURE_TEMPERATURE or self.decoder.needs_fallback(result)

    def _text(self, span: TokenSpan) -> str:
        """Text of a span; empty if it takes no time."""
        return "" if span.start == span.end else self.decoder.text(span.tokens)

    def _spoken_window(
        self, recording: Recording, states: Tensor, segments: tuple[Segment, ...], start: int
    ) -> SpokenWindow:
        """What aligning words needs of a window that begins at frame `start`."""
        assert recording.language is not None and recording.features is not None
        frames = min(self._length, recording.end - start)
        return SpokenWindow(
            states=states,
            segments=segments,
            start=start / FRAMES_PER_SECOND,
            frames=frames,
            seconds=recording.frames / FRAMES_PER_SECOND,
            language=recording.language,
            task=recording.options.task,
            last_speech=recording.last_speech,
            words_end=recording.words_end,
            levels=frame_levels(recording.features.window(start, frames)) if segments else None,
        )


def _words_end(segments: Sequence[Segment], before: float) -> float:
    """Where the last word ends, in seconds; `before` without words."""
    return max((segment.words[-1].end for segment in segments if segment.words), default=before)


def _several(recordings: Iterator[Recording]) -> tuple[bool, Iterator[Recording]]:
    """Whether there is more than one; and all of them."""
    first = list(islice(recordings, 2))
    return len(first) > 1, chain(first, recordings)


def _drain(skipped: deque[tuple[Recording, int]]) -> Iterator[WindowSegments]:
    """Windows that were skipped, each with the frame up to which its recording was decoded."""
    while skipped:
        recording, seek = skipped.popleft()
        recording.add_window((), seek)
        yield recording, ()


def _features_of(recording: Recording, length: int) -> Tensor:
    """Features of the next window, `[mel bins, length]`, zeros after the end of the clip."""
    features = recording.features
    assert features is not None
    if recording.end == recording.frames:
        return features.window(recording.seek, length)
    covered = min(length, recording.end - recording.seek)
    return pad(features.window(recording.seek, covered), (0, length - covered))


def _silent(windows: Tensor, recordings: Sequence[Recording]) -> list[bool]:
    """In which windows `[B, mel bins, T]` there is no sound, for which Whisper invents words.

    The sound is a single number there (digital silence), or fainter than the noise of rounding to
    16 bits; or less is left of the recording than a word takes. After the end of a recording
    features are 0.
    """
    sound = windows.flatten(1)
    level, is_padding = sound[:, :1], sound == 0
    is_flat = ((sound == level) | is_padding).all(dim=1)
    is_faint = ((sound < FAINT) | is_padding).all(dim=1)
    silent: list[bool] = (is_flat | is_faint).tolist()
    return [
        is_silent or recording.end - recording.seek < SHORTEST_FRAMES
        for is_silent, recording in zip(silent, recordings, strict=True)
    ]
