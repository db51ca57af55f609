"""Long recordings on the engine, against Transformers' long form with the same options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.conftest import REPOSITORY
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Segment, Transcriber, Transcription

Samples = npt.NDArray[np.float32]
# Without a draw of random numbers, so that both must say the same.
PLAIN = {
    "temperature": 0.0,
    "compression_ratio_threshold": None,
    "logprob_threshold": None,
    "no_speech_threshold": None,
}


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> Samples:
    """34 s, more than one window: speech for 10 s, and from 31 s on."""
    clips = [load_audio(bundled_recordings[index].path) for index in (0, 1, 4)]
    pause = np.zeros(34 * 16_000 - sum(clip.size for clip in clips), np.float32)
    return np.concatenate([*clips[:2], pause, clips[2]])


@pytest.fixture(scope="module")
def with_context(transcriber, speech) -> Transcription:
    """All of it, once, every window with its context."""
    return plain(transcriber, speech, conditioned=True)


def stock(transcriber: Transcriber, samples: Samples, *, conditioned: bool) -> str:
    inputs = transcriber.processor(
        samples,
        sampling_rate=16_000,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    multilingual = transcriber.languages != ("en",)
    found = transcriber.model.generate(
        inputs.input_features,
        attention_mask=inputs.attention_mask,
        return_timestamps=True,
        return_segments=True,
        condition_on_prev_tokens=conditioned,
        language="en" if multilingual else None,
        task="transcribe" if multilingual else None,
    )
    decode = transcriber.processor.tokenizer.decode
    texts = (decode(row["tokens"], skip_special_tokens=True) for row in found["segments"][0])
    return "".join(texts).strip()


def plain(transcriber: Transcriber, samples: Samples, *, conditioned: bool) -> Transcription:
    options = DecodeOptions(condition_on_previous_text=conditioned, **PLAIN)  # type: ignore[arg-type]
    return transcriber.transcribe(samples, language="en", options=options)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_text_is_that_of_transformers(transcriber, speech, with_context, conditioned) -> None:
    found = with_context if conditioned else plain(transcriber, speech, conditioned=False)
    assert found.text == stock(transcriber, speech, conditioned=conditioned)
    assert found.segments[-1].end > 31


@pytest.mark.slow
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("checkpoint", ["tiny_en", "base"])
def test_the_text_of_many_recordings_is_that_of_transformers(
    request, shared_audio: Path, checkpoint, conditioned
) -> None:
    source = request.getfixturevalue(checkpoint)
    some = Transcriber.from_pretrained(source, device="cpu")
    for name in ("sonnet1", "sonnet2", "sonnet3", "linto_apollo11"):
        samples = load_audio(shared_audio / f"{name}.mp3")
        found = plain(some, samples, conditioned=conditioned)
        assert found.text == stock(some, samples, conditioned=conditioned), name


@pytest.mark.slow
def test_a_repetition_is_that_of_openai_whisper_with_its_number_of_tokens(
    base: str, shared_audio: Path
) -> None:
    """The one text with sound in which the two differ: openai-whisper stops at 224 tokens."""
    results = REPOSITORY / "benchmarks" / "results" / "texts-base-cpu.json"
    place = ("sonnet1.mp3", "openai-whisper, told")
    [theirs] = (
        row["text"]
        for row in json.loads(results.read_text("utf-8"))["rows"]
        if (row["recording"], row["system"]) == place
    )
    options = DecodeOptions(max_new_tokens=224, **PLAIN)  # type: ignore[arg-type]
    some = Transcriber.from_pretrained(base, device="cpu")
    found = some.transcribe(shared_audio / place[0], language="en", options=options)
    assert found.text == theirs


def test_recordings_side_by_side_are_as_each_alone(transcriber, speech, with_context) -> None:
    recordings = [speech[: 3 * 16_000], speech, speech[3 * 16_000 : 7 * 16_000]]
    options = DecodeOptions(**PLAIN)  # type: ignore[arg-type]
    first, last = (transcriber.transcribe(recordings[i], options=options) for i in (0, 2))
    alone = [first, with_context, last]
    found = transcriber.transcribe_many(recordings, options=options, batch_size=2)
    assert [each.text for each in found] == [each.text for each in alone]
    assert [each.seconds for each in found] == [each.seconds for each in alone]
    for one, other in zip(found, alone, strict=True):
        assert [s.tokens for s in one.segments] == [s.tokens for s in other.segments]


def test_silence_in_one_recording_does_not_hold_up_others(transcriber, speech) -> None:
    options = DecodeOptions(**PLAIN)  # type: ignore[arg-type]
    silence = np.zeros(35 * 16_000, np.float32)
    short = speech[: 3 * 16_000]
    recordings = [silence, np.concatenate([silence[: 30 * 16_000], short]), short]
    alone = [transcriber.transcribe(each, options=options) for each in recordings]
    found = transcriber.transcribe_many(recordings, options=options, batch_size=2)
    assert [each.text for each in found] == [each.text for each in alone]
    assert found[0].segments == () and found[1].segments[0].start >= 30


def timed(segment: Segment) -> tuple[object, ...]:
    """What it says, and when."""
    words = [(word.start, word.end, word.text) for word in segment.words]
    return segment.start, segment.end, segment.tokens, words


def test_parts_words_and_notes_are_the_same_side_by_side(transcriber, speech) -> None:
    """In slots and in batches; the second clip of a recording has the first as context."""
    options = DecodeOptions(
        word_timestamps=True,
        clip_timestamps=(1.0, 6.0, 7.0, 9.0),
        hallucination_silence_threshold=1.0,
        **PLAIN,  # type: ignore[arg-type]
    )
    silence = np.zeros(8 * 16_000, np.float32)
    recordings = [np.concatenate([silence, speech[: 3 * 16_000]]), speech[: 10 * 16_000]]
    alone = [transcriber.transcribe(each, options=options) for each in recordings]
    found = transcriber.transcribe_many(recordings, options=options, batch_size=2)
    assert [list(map(timed, each.segments)) for each in found] == [
        list(map(timed, each.segments)) for each in alone
    ]
    starts = [word.start for segment in found[1].segments for word in segment.words]
    assert min(starts) < 6 and max(starts) >= 6.9


def test_segments_come_as_windows_are_read(transcriber, speech, with_context) -> None:
    options = DecodeOptions(**PLAIN)  # type: ignore[arg-type]
    stream = transcriber.stream(speech, options=options)
    first = next(stream)
    assert first.start < 2 and first.no_speech_prob is None and first.temperature == 0
    for found, wanted in zip((first, *stream), with_context.segments, strict=True):
        # The score alone may differ in its last bits, by how its operands are aligned.
        assert found == replace(wanted, avg_logprob=found.avg_logprob)
        assert found.avg_logprob == pytest.approx(wanted.avg_logprob, abs=1e-5)


def test_windows_without_sound_have_no_text(transcriber, speech) -> None:
    silence = np.zeros(40 * 16_000, np.float32)
    assert transcriber.transcribe(silence).segments == ()
    before = transcriber.transcribe(speech[: 4 * 16_000])
    padded = transcriber.transcribe(np.concatenate([speech[: 4 * 16_000], silence]))
    assert padded.segments[-1].end < 5.5
    assert padded.text.split()[:6] == before.text.split()[:6]


def test_the_context_guides_the_spelling(transcriber, bundled_recordings) -> None:
    samples = load_audio(bundled_recordings[0].path)
    plain = transcriber.transcribe(samples)
    assert "Dashwood" in plain.text
    options = DecodeOptions(initial_prompt="Mr. Jon Dashwould and Mr. Jon Dashwould's wife.")
    guided = transcriber.transcribe(samples, options=options)
    assert "Dashwould" in guided.text


def test_a_model_that_the_engine_does_not_run_takes_the_same_options(
    transcriber, speech, without_engine
) -> None:
    assert not without_engine.runs_on_engine
    torch.manual_seed(0)
    short = speech[: 16_000 * 3]
    options = DecodeOptions(temperature=0.0, max_new_tokens=12)
    found = without_engine.transcribe(short, options=options)
    assert found.text == transcriber.transcribe(short, options=options).text
    assert next(without_engine.stream(short, options=options)).start < 1


def test_words_have_times_and_spell_the_segments(transcriber, speech) -> None:
    options = DecodeOptions(**PLAIN, word_timestamps=True)  # type: ignore[arg-type]
    found = transcriber.transcribe(speech, options=options)
    assert found.segments[-1].end > 31
    for segment in found.segments:
        assert "".join(word.text for word in segment.words).strip() == segment.text
        assert segment.start <= segment.words[0].start and segment.words[-1].end <= segment.end
        assert all(0 < word.probability <= 1 for word in segment.words)
    words = [word for segment in found.segments for word in segment.words]
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert transcriber.transcribe(speech[: 2 * 16_000]).segments[0].words == ()


def test_many_recordings_take_turns(transcriber, speech) -> None:
    options = DecodeOptions(**PLAIN)  # type: ignore[arg-type]
    short = speech[: 2 * 16_000]
    alone = transcriber.transcribe(short, options=options)
    found = transcriber.transcribe_many([short] * 5, options=options, batch_size=2)
    assert [each.text for each in found] == [alone.text] * 5
