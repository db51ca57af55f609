"""Options that change what real speech becomes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.transcribe.test_transcriber import word_error_rate
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.arguments import TranscribeArguments


@pytest.fixture(scope="module")
def clip(bundled_recordings) -> Path:
    return bundled_recordings[4].path  # 3.3 s


def test_every_decode_option_is_a_keyword_argument() -> None:
    assert {field.name for field in fields(DecodeOptions)} <= set(
        TranscribeArguments.__annotations__
    )


def test_beams_find_what_transformers_beams_find(transcriber, clip) -> None:
    found = transcriber.transcribe(clip, beam_size=5, temperature=0.0)
    inputs = transcriber.processor(load_audio(clip), sampling_rate=16_000, return_tensors="pt")
    tokens = transcriber.model.generate(
        inputs.input_features,
        return_timestamps=True,
        num_beams=5,
        early_stopping=True,
        renormalize_logits=True,
    )[0].tolist()
    found_tokens = [each for each in found.segments[0].tokens if each < 50256]
    assert found_tokens == [each for each in tokens if each < 50256]
    greedy = transcriber.transcribe(clip, temperature=0.0)
    assert found.segments[0].tokens == greedy.segments[0].tokens
    assert found.segments[0].no_speech_prob == pytest.approx(
        greedy.segments[0].no_speech_prob, abs=1e-4
    )
    # The same tokens have the same log-probability, whichever way they were found.
    assert found.segments[0].avg_logprob == pytest.approx(greedy.segments[0].avg_logprob, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_gpu_searches_and_draws_as_well(tiny_en: str, bundled_recordings, dtype: str) -> None:
    on_gpu = Transcriber.from_pretrained(tiny_en, device="cuda", compute_type=dtype)
    paths = [each.path for each in bundled_recordings]
    spoken = [each.transcript for each in bundled_recordings]
    for options in ({"beam_size": 5, "temperature": 0.0}, {"best_of": 5, "temperature": 0.2}):
        torch.manual_seed(0)
        found = on_gpu.transcribe(paths, **options)
        for each, transcript in zip(found, spoken, strict=True):
            assert word_error_rate(transcript, each.text) < 0.35
            assert -1 < each.segments[0].avg_logprob < 0
    greedy = on_gpu.transcribe(paths[4], temperature=0.0, repetition_penalty=1.1)
    assert word_error_rate(spoken[4], greedy.text) < 0.35
    begun = on_gpu.transcribe(paths[0], temperature=0.0, prefix="Sir John Dashwould")
    assert begun.text.startswith("Sir John Dashwould")


def test_of_several_draws_the_likeliest_is_kept(transcriber, clip) -> None:
    def drawn(seed: int, best_of: int) -> float:
        torch.manual_seed(seed)
        found = transcriber.transcribe(
            clip, temperature=0.9, best_of=best_of, logprob_threshold=None
        )
        return found.segments[0].avg_logprob

    assert np.mean([drawn(seed, 4) for seed in range(3)]) > np.mean(
        [drawn(seed, 1) for seed in range(3)]
    )


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_hotwords_and_prefix_guide_one_recording_and_not_the_other(
    transcriber, bundled_recordings, mode
) -> None:
    path = bundled_recordings[0].path
    both = transcriber.transcribe_many(
        [path, path, path],
        hotwords=[None, "Mr. Jon Dashwould and Mr. Jon Dashwould's wife.", None],
        prefix=[None, None, "Sir John Dashwould"],
        mode=mode,
        temperature=0.0,
    )
    plain, hot, begun = (each.text for each in both)
    assert "Dashwood" in plain and "Dashwould" not in plain
    assert "Dashwould" in hot
    assert begun.startswith("Sir John Dashwould")
    assert plain == transcriber.transcribe(path, mode=mode, temperature=0.0).text


def test_words_of_a_prefix_have_times_too(transcriber, clip) -> None:
    first = transcriber.transcribe(clip).text.split()[0]
    found = transcriber.transcribe(clip, prefix=first, word_timestamps=True, temperature=0.0)
    assert str(found.segments[0].words[0]) == first
    assert found.text.split()[0] == first


def test_text_without_timestamps_is_one_segment(transcriber, clip, bundled_recordings) -> None:
    found = transcriber.transcribe(clip, without_timestamps=True)
    assert word_error_rate(bundled_recordings[4].transcript, found.text) < 0.2
    [segment] = found.segments
    assert (segment.start, segment.end) == (0.0, found.seconds)
    assert all(token < 50256 for token in segment.tokens)


def test_suppressed_tokens_do_not_occur_and_results_can_be_short(transcriber, clip) -> None:
    plain = transcriber.transcribe(clip, temperature=0.0)
    banned = next(each for each in plain.segments[0].tokens[2:] if each < 50256)
    found = transcriber.transcribe(clip, temperature=0.0, suppress_tokens=[-1, banned])
    assert banned not in found.segments[0].tokens
    short = transcriber.transcribe(clip, temperature=0.0, max_new_tokens=4)
    assert len(short.segments[0].tokens) == 4


def test_no_ngram_occurs_twice_where_that_is_forbidden(transcriber, bundled_recordings) -> None:
    samples = np.tile(load_audio(bundled_recordings[4].path), 3)
    again = transcriber.transcribe(samples, temperature=0.0).segments
    tokens = [token for segment in again for token in segment.tokens if token < 50256]
    assert len({*zip(tokens, tokens[1:], tokens[2:], strict=False)}) < len(tokens) - 2
    once = transcriber.transcribe(samples, temperature=0.0, no_repeat_ngram_size=3).segments
    tokens = [token for segment in once[:1] for token in segment.tokens if token < 50256]
    assert len({*zip(tokens, tokens[1:], tokens[2:], strict=False)}) == len(tokens) - 2


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_only_the_clips_are_transcribed(transcriber, bundled_recordings, mode) -> None:
    clips = [load_audio(each.path) for each in bundled_recordings]
    samples = np.concatenate([clips[0], clips[4], clips[0], clips[4]])
    begin = clips[0].size / 16_000
    end = begin + clips[4].size / 16_000
    options = {"mode": mode, "temperature": 0.0, "condition_on_previous_text": False}
    found = transcriber.transcribe(samples, clip_timestamps=(begin, end), **options)
    assert word_error_rate(bundled_recordings[4].transcript, found.text) < 0.2
    assert found.segments[0].start > begin - 0.1 and found.segments[-1].end < end + 0.1
    assert found.seconds == samples.size / 16_000
    last = begin + end
    twice = transcriber.transcribe(samples, clip_timestamps=(begin, end, last), **options)
    spoken = f"{bundled_recordings[4].transcript} {bundled_recordings[4].transcript}"
    assert word_error_rate(spoken, twice.text) < 0.2
    assert transcriber.transcribe(samples, clip_timestamps=(1000,), **options).text == ""


def test_a_list_becomes_a_list_and_an_option_may_be_given_beside_others(transcriber, clip) -> None:
    shares: list[float] = []
    options = DecodeOptions(without_timestamps=True)
    found = transcriber.transcribe(
        [clip, load_audio(clip)], options=options, temperature=0.0, on_progress=shares.append
    )
    alone = transcriber.transcribe(clip, options=options, temperature=0.0)
    assert [each.text for each in found] == [alone.text] * 2
    assert all(each.segments[0].tokens == alone.segments[0].tokens for each in found)
    assert transcriber.transcribe([]) == []
    assert shares == sorted(set(shares)) and shares[0] == 0 and shares[-1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_sise": 5}, "there is no option 'beam_sise'; did you mean beam_size"),
        ({"language": ["en"]}, "language has 1 values for 2 recordings: give one each"),
        ({"batch_size": 0}, "batch_size is 0: give a whole number, 1 to 10000"),
        ({"best_of": 0}, "best_of is 0: give a whole number, 1 to 100"),
        ({"length_penalty": float("nan")}, "length_penalty is nan: give a number from -10 to 10"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: give a number above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1: give a whole number, 0"),
        ({"suppress_tokens": "1x"}, "suppress_tokens is '1x': give ids of tokens"),
        (
            {"hallucination_silence_threshold": 2.0},
            "needs word_timestamps=True and mode=.sequential",
        ),
        (
            {"hallucination_silence_threshold": -1.0, "word_timestamps": True},
            "is -1.0: give seconds, 0 or more",
        ),
        ({"clip_timestamps": [3.0, 2.0]}, "clip_timestamps is .*each above the one before"),
        ({"clip_timestamps": [-1.0]}, "clip_timestamps is .*give seconds from 0 on"),
        ({"task": ["transcribe", "translate"]}, 'task="translate" needs a multilingual model'),
    ],
)
def test_what_makes_no_sense_is_one_clear_error(transcriber, clip, arguments, message) -> None:
    with pytest.raises(OptionError, match=message):
        transcriber.transcribe_many([clip, clip], **arguments)


def test_what_only_the_engine_can_do_is_refused_without_it(without_engine, clip) -> None:
    with pytest.raises(OptionError, match="hotwords 'Istio' needs the decode engine"):
        without_engine.transcribe(clip, hotwords="Istio")
    with pytest.raises(OptionError, match="word_timestamps True needs the decode engine"):
        without_engine.transcribe(clip, word_timestamps=True)
    found = without_engine.transcribe(clip, beam_size=3, temperature=0.0)
    assert found.text == without_engine.transcribe(clip).text


def test_languages_and_tasks_are_mixed_in_one_batch(
    multilingual: Transcriber, bundled_recordings
) -> None:
    path = bundled_recordings[4].path
    found = multilingual.transcribe(
        [path, path, path], language=["en", "german", None], task="transcribe", temperature=0.0
    )
    assert [each.language for each in found] == ["en", "de", "en"]
    assert found[0].text == found[2].text == bundled_recordings[4].transcript
    assert found[1].text != found[0].text
    alone = multilingual.transcribe(path, language="de", temperature=0.0)
    assert alone.text == found[1].text
