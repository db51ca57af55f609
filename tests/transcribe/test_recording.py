"""The position of decoding in a recording, its chunks, and the order of channels' segments."""

from __future__ import annotations

import numpy as np

from whisper_flash_attention.audio.audio_source import AudioSource, ChannelSources
from whisper_flash_attention.audio.vad import Chunk
from whisper_flash_attention.transcribe import Segment
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.recording import (
    CountedChunks,
    Recording,
    are_done,
    recordings_of,
    share_of,
    stream_segments,
)

SEGMENT = Segment(0.0, 1.0, "one")


class Silence:
    """Features."""

    frames = 1000

    def window(self, start: int, length: int) -> object:
        return start, length


def recording(clips: tuple[tuple[int, int], ...] | None) -> Recording:
    found = Recording(None)
    found.begin_windows(Silence(), clips)  # type: ignore[arg-type]
    return found


def test_a_recording_goes_from_clip_to_clip() -> None:
    found = recording(((100, 300), (500, 1000)))
    assert (found.seek, found.end, found.is_at_start) == (100, 300, True)
    for seek, expected in ((250, (250, 300)), (300, (500, 1000)), (1000, (1000, 1000))):
        found.seek = seek
        found.enter_clip()
        assert (found.seek, found.end) == expected
    assert found.is_at_end and not found.is_at_start
    assert recording(()).is_at_end
    assert recording(None).end == 1000


def test_a_recording_releases_its_samples_when_it_is_done() -> None:
    found = Recording(AudioSource(np.zeros(1, np.float32)))
    shares: list[tuple[float, bool]] = []
    found.on_progress = lambda each: shares.append((each.share, each.is_done))
    found.begin_windows(Silence())  # type: ignore[arg-type]
    found.seek = 1000  # decoded to its end, while the first window is delivered
    found.add_window([SEGMENT], 250)
    assert not found.is_done and found.source is not None
    found.add_window([SEGMENT], 1200)
    assert found.is_done and found.source is None and found.features is None
    assert found.segments == [SEGMENT] * 2 and shares == [(0.25, False), (1.0, True)]


def test_a_recording_without_speech_is_done_at_once() -> None:
    found = Recording(AudioSource(np.zeros(1, np.float32)))
    found.begin_chunks([], 5.0)
    assert found.is_done and found.source is None and found.seconds == 5.0


def test_a_recording_without_sound_is_done_at_once() -> None:
    found = Recording(AudioSource(np.zeros(1, np.float32)))
    found.add_silence(2.0)
    assert (found.is_done, found.seconds, found.share, found.source) == (True, 2.0, 1.0, None)


def test_every_channel_is_a_recording() -> None:
    one, two = (AudioSource(np.full(1, value, np.float32)) for value in (0.1, 0.2))
    options = RecordingOptions(language="de")
    [single] = recordings_of(one, options, 3)
    assert (single.source, single.channel, single.index) == (one, None, 3)
    first, second = recordings_of(ChannelSources((one, two)), options, 4)
    assert [first.channel, second.channel] == [1, 2] and second.source is two
    assert {first.index, second.index} == {4} and first.language == second.language == "de"
    first.add_all([SEGMENT])
    assert share_of([first, second]) == 0.5 and not are_done([first, second])
    assert first.located(SEGMENT).channel == 1


def test_the_last_chunk_is_known_for_the_last() -> None:
    samples = np.zeros(1, np.float32)
    chunks = CountedChunks(Chunk(float(start), samples) for start in range(2))
    assert not chunks.are_done
    given = iter(chunks)
    next(given)
    chunks.count_done()
    assert not chunks.are_done
    next(given)
    assert not chunks.are_done
    chunks.count_done()
    assert chunks.are_done and list(given) == []
    assert CountedChunks([]).are_done


def test_segments_of_a_stream_wait_for_what_may_come_before() -> None:
    channels = [Recording(None, channel=number, seconds=60.0) for number in (1, 2)]
    given: list[str] = []

    def windows():
        for index, share, starts in [(0, 0.5, (1, 20)), (1, 0.25, (3, 12)), (1, 1.0, (18,))]:
            channels[index].share, channels[index].is_done = share, share == 1.0
            segments = tuple(Segment(start, start + 1.0, f"{index} {start}") for start in starts)
            yield channels[index], segments
            given.append("window")

    for segment in stream_segments(windows(), channels):
        given.append(segment.text)
    assert given == ["window", "0 1", "1 3", "1 12", "window", "1 18", "0 20", "window"]
