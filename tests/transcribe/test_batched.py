"""Chunks of speech side by side."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch

from tests.transcribe.test_transcriber import word_error_rate
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.audio.vad import Chunk, Speech
from whisper_flash_attention.engine.engine import Engine
from whisper_flash_attention.engine.scheduler import DecodeJob, FinishedJob
from whisper_flash_attention.errors import AudioError, OptionError
from whisper_flash_attention.hf.eligibility import engine_for
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber, batched
from whisper_flash_attention.transcribe.arguments import RecordingOptions
from whisper_flash_attention.transcribe.batched import BatchedReader, PendingChunk
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.window_decoder import DecodingResult, WindowDecoder

BATCHED = DecodeOptions(mode="batched")


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> np.ndarray:
    return np.concatenate([load_audio(recording.path) for recording in bundled_recordings])


@pytest.fixture(scope="module")
def long(bundled_recordings) -> np.ndarray:
    """Two chunks of speech, 7 and 5 s, after pauses."""
    first, second = (load_audio(bundled_recordings[i].path) for i in (0, 2))
    pauses = [np.zeros(seconds * 16_000, np.float32) for seconds in (5, 20, 1)]
    return np.concatenate([pauses[0], first, pauses[1], second, pauses[2]])


@pytest.fixture(scope="module")
def long_transcript(bundled_recordings) -> str:
    return " ".join(bundled_recordings[i].transcript for i in (0, 2))


def test_a_long_recording_is_transcribed_in_order(transcriber, long, long_transcript) -> None:
    shares: list[float] = []
    found = transcriber.transcribe(long, options=BATCHED, batch_size=1, on_progress=shares.append)
    assert word_error_rate(long_transcript, found.text) < 0.1
    times = [time for segment in found.segments for time in (segment.start, segment.end)]
    assert times == sorted(times) and 4 < times[0] < 7 and times[-1] <= found.seconds
    assert shares == sorted(shares) and shares[0] == 0 and len(shares) == 4
    assert shares[-1] == 1
    assert jiwer.wer(found.text, " ".join(each.text for each in found.segments)) == 0


def test_recordings_keep_their_own_words(transcriber, bundled_recordings) -> None:
    some = bundled_recordings[1:4]
    samples = [load_audio(recording.path) for recording in some]
    silence = np.zeros(3 * 16_000, np.float32)
    found = transcriber.transcribe_many([*samples, silence], options=BATCHED, batch_size=3)
    for each, recording in zip(found, some, strict=False):
        assert word_error_rate(recording.transcript, each.text) < 0.25
        assert each.seconds == pytest.approx(load_audio(recording.path).size / 16_000)
    assert found[-1].segments == () and found[-1].text == ""


def test_threads_that_find_speech_change_nothing(
    transcriber, bundled_recordings, monkeypatch
) -> None:
    samples = [load_audio(recording.path) for recording in bundled_recordings]
    bad = np.full(16_000, np.nan, np.float32)
    wanted = transcriber.transcribe_many(samples, options=BATCHED, batch_size=2)
    names = set()
    prepare = BatchedReader.prepare

    def noted(self: BatchedReader, recording: Recording) -> Recording:
        names.add(threading.current_thread().name.rpartition("_")[0])
        return prepare(self, recording)

    monkeypatch.setattr(BatchedReader, "prepare", noted)
    monkeypatch.setattr(batched, "threads_beside", lambda device: 2)
    found = transcriber.transcribe_many(samples, options=BATCHED, batch_size=2)
    assert [each.segments for each in found] == [each.segments for each in wanted]
    assert names == {"whisper-flash-detect"}
    with pytest.raises(AudioError, match="not finite"):
        transcriber.transcribe_many([*samples, bad], options=BATCHED, batch_size=2)


def test_without_a_detector_all_of_a_recording_is_read(transcriber, speech, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    options = DecodeOptions(
        mode="batched", vad_filter=False, temperature=0.0, min_new_tokens=9, max_new_tokens=9
    )
    recording = np.concatenate([np.zeros(30 * 16_000, np.float32), speech, speech])
    found = transcriber.transcribe(recording, options=options, batch_size=2)
    starts = [segment.start for segment in found.segments]
    assert starts[0] >= 25 and starts[-1] >= 50
    # Digital silence is not read, and results that are cut off on purpose are not gone on with.
    assert sum(len(segment.tokens) for segment in found.segments) == 2 * 9


@pytest.mark.parametrize("vad", [True, False])
def test_samples_that_are_not_finite_are_refused(transcriber, vad) -> None:
    samples = np.ones(16_000, np.float32)
    samples[7] = np.nan
    with pytest.raises(AudioError, match="not finite"):
        transcriber.transcribe(samples, options=DecodeOptions(mode="batched", vad_filter=vad))


def test_what_follows_the_last_pair_of_timestamps_is_kept(transcriber) -> None:
    words, tokenizer = transcriber._vocabulary, transcriber.processor.tokenizer
    reader = BatchedReader(engine_for(transcriber.model), words, tokenizer, DecodeOptions())
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in (" one", " two"))
    stamp = [words.timestamp_begin + 50 * second for second in range(4)]
    tokens = (stamp[0], *one, stamp[1], stamp[2], *two)
    result = DecodingResult(tokens, "one two", -0.1, None, 1.0, 0.0)
    chunk = Chunk(10.0, np.zeros(56_000, np.float32))
    recording = Recording(None, RecordingOptions(language="en"))
    segments = reader._segments(PendingChunk(recording, chunk, is_first=True), result)
    assert [(s.start, s.end, s.text) for s in segments] == [
        (10.0, 11.0, "one"),
        (12.0, 13.5, "two"),
    ]


def test_it_needs_the_engine(without_engine: Transcriber, speech) -> None:
    with pytest.raises(OptionError, match="'batched' needs the decode engine"):
        without_engine.transcribe(speech, options=BATCHED)
    with pytest.raises(OptionError, match="mode is 'fast': give sequential or batched"):
        DecodeOptions(mode="fast")


@pytest.mark.parametrize("words", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_follows_later_is_the_same_in_the_same_order(
    transcriber, speech, monkeypatch, words
) -> None:
    options = DecodeOptions(
        mode="batched", vad_filter=False, temperature=0.0, max_new_tokens=12, word_timestamps=words
    )
    recordings = [np.concatenate([speech, speech])[: 34 * 16_000], speech[: 5 * 16_000]]
    made = BatchedReader.__init__
    found = []
    for later, slots in ((True, False), (False, True), (True, True)):
        monkeypatch.setattr(WindowDecoder, "fits_slots", slots)

        def make(self, *arguments, later=later) -> None:
            made(self, *arguments)
            self._follows_later = later

        monkeypatch.setattr(BatchedReader, "__init__", make)
        found.append(transcriber.transcribe_many(recordings, options=options, batch_size=1))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0].segments) > 1 and found[0][1].segments


def test_words_have_times_in_their_chunks(transcriber, long) -> None:
    options = DecodeOptions(mode="batched", temperature=0.0, word_timestamps=True)
    found = transcriber.transcribe(long, options=options, batch_size=2)
    words = [word for segment in found.segments for word in segment.words]
    assert "".join(word.text for word in words).strip() == found.text
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] > 4.5 and times[-1] <= found.seconds


class Scripted:
    """Stands in for the decoder.

    Args:
        results: tokens by the start and the length of a chunk, in seconds.
        no_speech: probability of silence in all of them.
    """

    def __init__(
        self, results: dict[tuple[float, float], list[int]], no_speech: float = 0.0
    ) -> None:
        self.results, self.no_speech = results, no_speech
        self.read: list[float] = []

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scripted = self

        def job(decoder, states, prompt, tag):  # the states do not matter
            chunk = tag.owner.chunk
            scripted.read.append(chunk.start)
            tokens = scripted.results[round(chunk.start, 1), round(chunk.seconds, 1)]
            request = decoder._requests.request(1, len(prompt), 0.0)
            return FinishedJob(DecodeJob(states, prompt, request, tag), (*tokens, 50256), -0.1, 0.0)

        def stream(engine, jobs, slots, max_length):
            while some := jobs(slots):
                yield from some

        def encode(reader, chunks, clips):
            return torch.zeros(len(clips), 1, 1)

        def result(decoder, finished):
            found = real(decoder, finished)
            return replace(found, no_speech_prob=scripted.no_speech)

        real = WindowDecoder.result
        monkeypatch.setattr(WindowDecoder, "job", job)
        monkeypatch.setattr(WindowDecoder, "result", result)
        monkeypatch.setattr(Engine, "decode_stream", stream)
        monkeypatch.setattr(BatchedReader, "_encode", encode)


def text(transcriber: Transcriber, *parts: str | float) -> list[int]:
    words, tokenizer = transcriber._vocabulary, transcriber.processor.tokenizer
    found: list[int] = []
    for part in parts:
        if isinstance(part, str):
            found += tokenizer.encode(f" {part}", add_special_tokens=False)
        else:
            found.append(words.timestamp_begin + round(part / 0.02))
    return found


ONE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def read_chunks(
    transcriber: Transcriber, chunks: list[Chunk], **options: object
) -> tuple[list[tuple[float, float, str]], list[float]]:
    parts = (transcriber._vocabulary, transcriber.tokenizer)
    # Nothing decodes scripted results again.
    decode = DecodeOptions(mode="batched", check_speech=False, **options)  # type: ignore[arg-type]
    reader = BatchedReader(engine_for(transcriber.model), *parts, decode)
    recording = Recording(None, RecordingOptions(language="en"))
    recording.begin_chunks(chunks, 60.0)
    found = [(segments, each.share) for each, segments in reader.read([recording], 4)]
    texts = [(s.start, s.end, s.text) for segments, _ in found for s in segments]
    return texts, [share for _, share in found]


def sound(start: float, seconds: float, *, is_doubtful: bool = False) -> Chunk:
    samples = np.zeros(round(seconds * 16_000), np.float32)
    speech = Speech(lambda: [(start, start + seconds)])
    return Chunk(start, samples, speech, is_doubtful)


def test_what_a_chunk_leaves_is_read_once_more_in_its_place(transcriber, monkeypatch) -> None:
    script = Scripted(
        {
            (10, 10): text(transcriber, 0.0, ONE, 8.0, 8.0),  # the model says: more follows
            (18, 2): text(transcriber, 0.0, "left over", 1.8),
            (20, 4): text(transcriber, 0.0, ONE, 4.0),
        }
    )
    script.patch(monkeypatch)
    found, shares = read_chunks(transcriber, [sound(10.0, 10.0), sound(20.0, 4.0)])
    assert [each[0] for each in found] == [10.0, 18.0, 20.0]
    assert found[1] == (18.0, 19.8, "left over")
    assert sorted(script.read) == [10.0, 18.0, 20.0]
    # One for each chunk of the recording, in their order.
    assert shares == [20 / 60, 24 / 60]


def test_too_little_text_gives_way_to_that_of_both_halves(transcriber, monkeypatch) -> None:
    half = text(transcriber, 0.0, ONE, 10.0)
    whole = text(transcriber, 0.0, "one", 20.0)
    Scripted({(0, 20): whole, (0, 10): half, (10, 10): half}).patch(monkeypatch)
    found, shares = read_chunks(transcriber, [sound(0.0, 20.0)])
    assert [each[:2] for each in found] == [(0.0, 10.0), (10.0, 20.0)] and len(shares) == 1


@pytest.mark.parametrize("no_speech", [0.1, 0.9])
def test_sound_between_speech_is_judged_by_each_threshold(
    transcriber, monkeypatch, no_speech
) -> None:
    """A result as likely as these is no silence otherwise."""
    Scripted({(10, 5): text(transcriber, 0.0, ONE, 5.0)}, no_speech).patch(monkeypatch)
    plain, _ = read_chunks(transcriber, [sound(10.0, 5.0)])
    assert len(plain) == 1
    for thresholds in ({}, {"no_speech_threshold": None, "logprob_threshold": None}):
        found, shares = read_chunks(transcriber, [sound(10.0, 5.0, is_doubtful=True)], **thresholds)
        assert len(found) == (no_speech < 0.6) and len(shares) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"word_timestamps": True}, {"without_timestamps": True}], ids=str
)
def test_without_a_detector_no_word_is_lost(transcriber, shared_audio: Path, options) -> None:
    """Joined speech has the words of sequential mode, less or more 1 %."""
    names = [f"lso_{book}_000{i}" for book in ("1688_142285", "1998_15444") for i in range(10)]
    names += ["columbia"]
    joined = np.concatenate([load_audio(shared_audio / f"{name}.flac") for name in names])
    plain = {"temperature": 0.0, "condition_on_previous_text": False}
    wanted = len(transcriber.transcribe(joined, **plain).text.split())
    found = transcriber.transcribe(joined, mode="batched", vad_filter=False, **plain, **options)
    assert len(found.text.split()) == pytest.approx(wanted, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["columbia", "sonnet3"])
def test_no_sentence_is_left_out(transcriber, shared_audio: Path, name) -> None:
    """Whisper ends its results to chunks of 30 s early here."""
    rows = json.loads((shared_audio / "index.json").read_text("utf-8"))
    (row,) = (each for each in rows if each["id"] == name)
    found = transcriber.transcribe(
        shared_audio / row["file"], options=DecodeOptions(mode="batched", temperature=0.0)
    )
    assert word_error_rate(row["transcript"], found.text) < 0.13
