"""Silence beside words that look invented."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.transcribe.test_segmentation import WORDS, at
from whisper_flash_attention.engine.request import DecodeOutput, Request
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.hallucination import (
    AlignedWindow,
    looks_invented,
    skip_silence,
)
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment, Word
from whisper_flash_attention.transcribe.sequential import SequentialReader
from whisper_flash_attention.transcribe.words import SpokenWindow, WindowWords


def spoken_segment(
    start: float, end: float, *, probability: float = 0.9, words: int = 4
) -> Segment:
    """A segment whose words share its time."""
    step = (end - start) / words
    each = [
        Word(start + i * step, start + (i + 1) * step, f"w{i}", probability) for i in range(words)
    ]
    return Segment(start, end, "w", words=tuple(each))


def invented(start: float, end: float) -> Segment:
    return spoken_segment(start, end, probability=0.01)


def aligned_window(*segments: Segment, **changes: object) -> AlignedWindow:
    """The window from 30 to 60 s of a recording of 100 s, after speech up to 29 s."""
    values: dict[str, object] = {
        "segments": segments,
        "start": 3000,
        "frames": 3000,
        "length": 3000,
        "total": 10_000,
        "seek": 6000,
        "last_speech": 29.0,
        "ends_in_silence": True,
    }
    return AlignedWindow(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        (spoken_segment(0, 2), False),
        (invented(0, 2), True),
        (spoken_segment(0, 0.2), True),  # words of 50 ms
        (spoken_segment(0, 9, words=2), True),  # of 4.5 s
        (Segment(0.0, 1.0, "without words"), False),
        (Segment(0.0, 1.0, ".", words=(Word(0.0, 1.0, ".", 0.9),)), True),  # no word at all
        (None, False),
    ],
)
def test_what_looks_invented(segment: Segment | None, expected: bool) -> None:
    assert looks_invented(segment) is expected


def test_speech_is_left_as_it_is() -> None:
    segments = spoken_segment(30.5, 33), spoken_segment(34, 40), spoken_segment(41, 59)
    assert skip_silence(aligned_window(*segments), 2.0) == (segments, 6000)
    assert skip_silence(aligned_window(), 2.0) == ((), 6000)


def test_silence_before_an_invented_first_segment_is_skipped() -> None:
    assert skip_silence(aligned_window(invented(35, 37), spoken_segment(38, 50)), 2.0) == ((), 3500)


def test_what_is_invented_between_silences_is_dropped_with_what_follows() -> None:
    first = spoken_segment(30.2, 33)
    window = aligned_window(first, invented(40, 42), spoken_segment(50, 58))
    assert skip_silence(window, 2.0) == ((first,), 4000)
    # Not where speech is near on one side.
    near = aligned_window(first, invented(34, 42), spoken_segment(50, 58))
    assert skip_silence(near, 2.0) == (near.segments, 6000)


def test_a_recording_that_ends_in_invention_is_done() -> None:
    first = spoken_segment(70.2, 73)
    window = aligned_window(*(first, invented(97, 99)), start=7000, seek=10_000, last_speech=69.0)
    assert skip_silence(window, 2.0) == ((first,), 10_000)


@pytest.mark.parametrize(("end", "seek"), [(45.0, 4500), (59.0, 6000)])
def test_long_silence_after_the_last_word_is_decoded_again(end: float, seek: int) -> None:
    segments = (spoken_segment(30.5, 40), spoken_segment(40.5, end, words=20))
    window = aligned_window(*segments, ends_in_silence=False, seek=5000)
    assert skip_silence(window, 2.0) == (segments, seek)


@given(
    st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 300), st.booleans()), min_size=1, max_size=5
    ),
    st.floats(0, 5),
    st.booleans(),
)
def test_reading_always_goes_on(
    rows: list[tuple[int, int, bool]], threshold: float, ends_in_silence: bool
) -> None:
    clock, segments = 3000, []
    for gap, length, is_invented in rows:
        start, clock = clock + gap, clock + gap + length
        segments.append(
            spoken_segment(start / 100, clock / 100, probability=0.01 if is_invented else 0.9)
        )
    window = aligned_window(*segments, ends_in_silence=ends_in_silence)
    kept, seek = skip_silence(window, threshold)
    assert kept == window.segments[: len(kept)]
    assert seek > window.start


A, B, C = 11, 12, 13
ANSWERS = (
    (at(0), A, at(3), at(20), B, at(22)),
    (at(4), C, at(9)),
)


class TwoWindows:
    """An engine that gives one result after the other, and notes its prompts."""

    weights = SimpleNamespace(encoder=SimpleNamespace(positions=torch.zeros(1500, 1)))

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(windows), 4, 8)

    def decode(
        self, states: torch.Tensor, prompt: torch.Tensor, request: Request, meanwhile: object
    ) -> DecodeOutput:
        result = torch.tensor([[*ANSWERS[len(self.prompts)], WORDS.end]])
        self.prompts.append(prompt[0].tolist())
        return DecodeOutput(torch.cat([prompt, result], 1), sum_logprobs=torch.tensor([-1.0]))


class Doubter:
    """An aligner that finds four words in each segment, and does not believe in B."""

    def add_words(self, windows: list[SpokenWindow]) -> list[WindowWords]:
        [window] = windows
        segments = []
        for each in window.segments:
            doubt = 0.01 if B in each.tokens else 0.9
            words = spoken_segment(each.start, each.end, probability=doubt).words
            segments.append(replace(each, words=words))
        end = segments[-1].end
        return [WindowWords(tuple(segments), end, end)]


class Letters:
    """A letter per token."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(chr(65 + token) for token in tokens)


class Ramp:
    """Features that differ everywhere."""

    frames = 5000

    def window(self, start: int, length: int) -> torch.Tensor:
        return torch.arange(80.0 * length).view(80, length) + 1


@pytest.mark.parametrize("threshold", [None, 2.0])
def test_the_reader_goes_back_to_what_it_doubts_and_does_not_repeat_it(
    threshold: float | None,
) -> None:
    engine = TwoWindows()
    options = DecodeOptions(
        temperature=0.0,
        no_speech_threshold=None,
        word_timestamps=True,
        hallucination_silence_threshold=threshold,
    )
    reader = SequentialReader(engine, WORDS, Letters(), options, Doubter())  # type: ignore[arg-type]
    recording = Recording(None, RecordingOptions(language="en"))
    recording.begin_windows(Ramp())
    windows = [(segments, each.share) for each, segments in reader.read([recording], 1)]
    tokens = [token for segments, _ in windows for each in segments for token in each.tokens]
    spoken = [token for token in tokens if token in (A, B, C)]
    assert spoken == ([A, B, C] if threshold is None else [A, C])
    assert [share for _, share in windows] == [0.6 if threshold is None else 0.4, 1.0]
    assert (B in engine.prompts[1]) is (threshold is None)
    assert A in engine.prompts[1]
    begins = windows[1][0][0].start
    assert begins == (30.0 if threshold is None else 20.0)
