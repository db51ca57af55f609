"""Chunks of speech side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest

from tests.transcribe.test_transcriber import word_error_rate
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.config import DecodeOptions
from whisper_flash_attention.errors import AudioError, OptionError
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.batched import BatchedReader
from whisper_flash_attention.transcribe.windows import WindowDecoder

BATCHED = DecodeOptions(mode="batched")


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> np.ndarray:
    return np.concatenate([load_audio(recording.path) for recording in bundled_recordings])


@pytest.fixture(scope="module")
def long(bundled_recordings) -> np.ndarray:
    """Two chunks of speech, 7 and 5 s, behind pauses."""
    first, second = (load_audio(bundled_recordings[i].path) for i in (0, 2))
    pauses = [np.zeros(seconds * 16_000, np.float32) for seconds in (5, 20, 1)]
    return np.concatenate([pauses[0], first, pauses[1], second, pauses[2]])


@pytest.fixture(scope="module")
def long_transcript(bundled_recordings) -> str:
    return " ".join(bundled_recordings[i].transcript for i in (0, 2))


def test_a_long_recording_is_heard_in_order(transcriber, long, long_transcript) -> None:
    shares: list[float] = []
    found = transcriber.transcribe(long, options=BATCHED, batch_size=1, on_progress=shares.append)
    assert word_error_rate(long_transcript, found.text) < 0.1
    times = [time for segment in found.segments for time in (segment.start, segment.end)]
    assert times == sorted(times) and 4 < times[0] < 7 and times[-1] <= found.seconds
    assert shares == sorted(shares) and shares[0] == 0 and len(shares) == 3
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


def test_without_a_detector_windows_follow_one_another(transcriber, speech, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    options = DecodeOptions(
        mode="batched", vad_filter=False, temperature=0.0, min_new_tokens=9, max_new_tokens=9
    )
    recording = np.concatenate([np.zeros(30 * 16_000, np.float32), speech, speech])
    found = transcriber.transcribe(recording, options=options, batch_size=2)
    starts = [segment.start for segment in found.segments]
    assert starts[0] >= 30 and starts[-1] >= 60
    said = {30: 0, 60: 0}
    for segment in found.segments:
        said[30 if segment.start < 60 else 60] += len(segment.tokens)
    assert said == {30: 9, 60: 9}


@pytest.mark.parametrize("vad", [True, False])
def test_samples_that_are_not_finite_are_refused(transcriber, vad) -> None:
    samples = np.ones(16_000, np.float32)
    samples[7] = np.nan
    with pytest.raises(AudioError, match="not finite"):
        transcriber.transcribe(samples, options=DecodeOptions(mode="batched", vad_filter=vad))


def test_what_follows_the_last_pair_of_timestamps_is_kept(transcriber) -> None:
    from whisper_flash_attention.audio.vad import Chunk
    from whisper_flash_attention.generation.fitness import engine_for
    from whisper_flash_attention.transcribe.windows import Answer

    words, tokenizer = transcriber._vocabulary, transcriber.processor.tokenizer
    reader = BatchedReader(engine_for(transcriber.model), words, tokenizer, DecodeOptions())
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in (" one", " two"))
    stamp = [words.timestamp_begin + 50 * second for second in range(4)]
    tokens = (stamp[0], *one, stamp[1], stamp[2], *two)
    answer = Answer(tokens, "one two", -0.1, None, 1.0, 0.0)
    segments = reader._segments(Chunk(10.0, np.zeros(56_000, np.float32)), answer)
    assert [(s.start, s.end, s.text) for s in segments] == [
        (10.0, 11.0, "one"),
        (12.0, 13.5, "two"),
    ]


def test_it_needs_the_engine(tiny_en: str, speech) -> None:
    slow = Transcriber.from_pretrained(tiny_en, device="cpu", attention="sdpa_flash")
    with pytest.raises(OptionError, match="'batched' needs the decode engine"):
        slow.transcribe(speech, options=BATCHED)
    with pytest.raises(OptionError, match="unknown mode 'fast'"):
        DecodeOptions(mode="fast")
    with pytest.raises(OptionError, match="vad_filter is of mode 'batched'"):
        DecodeOptions(vad_filter=True)


@pytest.mark.parametrize("words", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_follows_later_is_the_same_in_the_same_order(
    transcriber, speech, monkeypatch, words
) -> None:
    options = DecodeOptions(
        mode="batched", vad_filter=False, temperature=0.0, max_new_tokens=20, word_timestamps=words
    )
    recordings = [np.concatenate([speech, speech[::-1], speech]), speech[: 5 * 16_000]]
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
    assert len(found[0][0].segments) > 2 and found[0][1].segments


def test_words_have_times_in_their_chunks(transcriber, long) -> None:
    options = DecodeOptions(mode="batched", temperature=0.0, word_timestamps=True)
    found = transcriber.transcribe(long, options=options, batch_size=2)
    words = [word for segment in found.segments for word in segment.words]
    assert "".join(word.text for word in words) == "".join(found.text.split())
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] > 4.5 and times[-1] <= found.seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", ["columbia", "sonnet3"])
def test_no_sentence_is_left_out(transcriber, shared_audio: Path, name) -> None:
    """Whisper ends its answers to chunks of 30 s early here."""
    rows = json.loads((shared_audio / "index.json").read_text("utf-8"))
    (row,) = (each for each in rows if each["id"] == name)
    found = transcriber.transcribe(
        shared_audio / row["file"], options=DecodeOptions(mode="batched", temperature=0.0)
    )
    assert word_error_rate(row["transcript"], found.text) < 0.13
