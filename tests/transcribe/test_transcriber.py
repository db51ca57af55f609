from __future__ import annotations

import copy
import json
from pathlib import Path

import jiwer
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from tests.audio.encoding import read_wave
from tests.random_whisper import small_whisper_config
from whisper_flash_attention import WhisperFlashAttentionForConditionalGeneration
from whisper_flash_attention.audio import BundledClip, load_audio
from whisper_flash_attention.errors import AudioError, OptionError, WeightsError
from whisper_flash_attention.options import DecodeOptions
from whisper_flash_attention.transcribe import Transcriber, Transcription
from whisper_flash_attention.transcribe.hf_long_form import features_and_mask

NORMALISE = jiwer.Compose(
    [
        jiwer.SubstituteRegexes({"-": ""}),
        jiwer.RemovePunctuation(),
        jiwer.ToLowerCase(),
        jiwer.ReduceToListOfListOfWords(),
    ]
)


def word_error_rate(reference: str, text: str) -> float:
    rate = jiwer.wer(reference, text, reference_transform=NORMALISE, hypothesis_transform=NORMALISE)
    return float(rate)


@pytest.fixture(scope="module")
def speech(bundled_recordings: tuple[BundledClip, ...]) -> npt.NDArray[np.float32]:
    """All clips in one, 24.7 s."""
    joined = np.concatenate([read_wave(recording.path) for recording in bundled_recordings])
    return joined / np.float32(32768)


@pytest.fixture(scope="module")
def transcript(bundled_recordings: tuple[BundledClip, ...]) -> str:
    return " ".join(recording.transcript for recording in bundled_recordings)


def assert_in_order(transcription: Transcription) -> None:
    times = [time for segment in transcription.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    assert all(0 <= time <= transcription.seconds for time in times)


def test_a_short_recording_becomes_its_transcript(
    transcriber: Transcriber, speech: npt.NDArray[np.float32], transcript: str
) -> None:
    transcription = transcriber.transcribe(speech)
    assert word_error_rate(transcript, transcription.text) < 0.08
    assert transcription.language == "en"
    assert transcription.seconds == speech.size / 16_000
    assert_in_order(transcription)
    assert transcription.segments[-1].end > 22
    assert " ".join(segment.text for segment in transcription.segments) == transcription.text


def test_a_long_recording_is_decoded_window_by_window_and_reports_its_progress(
    transcriber: Transcriber,
    bundled_recordings: tuple[BundledClip, ...],
    speech: npt.NDArray[np.float32],
    transcript: str,
) -> None:
    shares: list[float] = []
    # With all of this as context a small model adds nothing new.
    options = DecodeOptions(condition_on_previous_text=False, temperature=0.0)
    first = bundled_recordings[0]
    samples = np.concatenate([speech, load_audio(first.path)])
    transcription = transcriber.transcribe(samples, options=options, on_progress=shares.append)
    assert word_error_rate(f"{transcript} {first.transcript}", transcription.text) < 0.10
    assert_in_order(transcription)
    assert transcription.segments[-1].end > 30
    assert len(shares) >= 2
    assert shares[0] == 0
    assert shares == sorted(set(shares))
    assert shares[-1] == 1


def test_files_arrays_and_tensors_of_any_precision_give_the_same(
    transcriber: Transcriber, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    path = bundled_recordings[4].path
    samples = read_wave(path) / np.float32(32768)
    transcription = transcriber.transcribe(path)
    assert transcription.text == bundled_recordings[4].transcript
    assert transcriber.transcribe(str(path)) == transcription
    assert transcriber.transcribe(samples.astype(np.float64)) == transcription
    assert transcriber.transcribe(torch.from_numpy(samples)) == transcription


def test_the_samples_of_a_caller_are_not_changed(
    transcriber: Transcriber, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    samples = read_wave(bundled_recordings[1].path) / np.float32(32768)
    before = samples.copy()
    transcriber.transcribe(samples)
    np.testing.assert_array_equal(samples, before)


@pytest.mark.parametrize("length", [1, 400])
def test_segments_of_a_snippet_stay_within_it(transcriber: Transcriber, length: int) -> None:
    snippet = np.full(length, 0.01, np.float32)
    transcription = transcriber.transcribe(snippet)
    assert transcription.seconds == length / 16_000
    assert_in_order(transcription)


@pytest.mark.parametrize("length", [1, 161, 5000, 480_000, 480_001, 480_160, 500_039])
def test_features_and_their_mask_are_those_of_the_extractor(
    transcriber: Transcriber, speech: npt.NDArray[np.float32], length: int
) -> None:
    samples = np.tile(speech, 2)[:length]
    whole = {"truncation": False, "padding": "longest"} if length > 480_000 else {}
    expected = transcriber.processor.feature_extractor(
        samples, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt", **whole
    )
    features, mask = features_and_mask(transcriber.model, samples)
    torch.testing.assert_close(features, expected["input_features"], rtol=0, atol=1e-4)
    torch.testing.assert_close(mask, expected["attention_mask"], rtol=0, atol=0)


def test_a_checkpoint_with_other_features_is_refused(transcriber: Transcriber) -> None:
    processor = copy.deepcopy(transcriber.processor)
    processor.feature_extractor.chunk_length = 15
    with pytest.raises(WeightsError, match="has chunk_length 15, but Whisper's features have 30"):
        Transcriber(transcriber.model, processor)


def test_what_runs_the_decode_loop_is_a_property(transcriber: Transcriber) -> None:
    assert transcriber.engine == "decode engine (PyTorch)"
    config = small_whisper_config()
    ours = WhisperFlashAttentionForConditionalGeneration(config)
    ours.generation_config = transcriber.model.generation_config
    ours.set_attn_implementation("reference")
    stock = WhisperForConditionalGeneration(config)
    stock.generation_config = transcriber.model.generation_config
    for model in (ours, stock):
        assert Transcriber(model, transcriber.processor).engine == "Transformers generate"


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((9, 16_000), np.float32), "with at most 8 channels"),
        (np.zeros(16_000, np.uint16), "but are uint16"),
        (torch.zeros(16_000, dtype=torch.cfloat), "but are complex64"),
        (torch.zeros(16_000, device="meta"), "meta tensor"),
        (torch.zeros(16_000).to_sparse(), "sparse_coo tensor"),
        (np.zeros(()), r"shape \[\]"),
        (np.zeros(9, object), "but are object"),
        ((np.zeros(16_000), 1), "sampling rate 1: give the samples per second"),
        ((16_000, np.zeros(16_000)), r"are a tuple \(samples, sampling rate\), but got"),
        (("a.wav", 16_000), "a file has a sampling rate of its own; leave it out"),
        ({"array": np.zeros(9)}, r"or \(samples, sampling rate\) as a tuple, but got"),
        (np.zeros(0, np.float32), "no sound in 0 samples"),
        (np.array([0.0, np.nan], np.float32), "not finite"),
        ([0.0, 0.1], r"\(samples, sampling rate\) as a tuple, but got 0\.0"),
        (None, "a recording is a path, bytes, .* but got None"),
    ],
)
def test_samples_that_are_no_recording_are_refused(
    transcriber: Transcriber, samples: npt.NDArray[np.float32], reason: str
) -> None:
    with pytest.raises(AudioError, match=reason):
        transcriber.transcribe(samples)


def test_an_english_only_model_refuses_other_languages_and_translation(
    transcriber: Transcriber, speech: npt.NDArray[np.float32]
) -> None:
    assert transcriber.languages == ("en",)
    with pytest.raises(OptionError, match='language="de" needs a multilingual model'):
        transcriber.transcribe(speech, language="german")
    with pytest.raises(OptionError, match='task="translate" needs a multilingual model'):
        transcriber.transcribe(speech, task="translate")


def test_a_model_with_an_old_generation_config_is_refused(transcriber: Transcriber) -> None:
    model = WhisperForConditionalGeneration(small_whisper_config())
    with pytest.raises(WeightsError, match="too old: it lacks is_multilingual"):
        Transcriber(model, transcriber.processor)
    model.generation_config.is_multilingual = True
    model.generation_config.no_timestamps_token_id = 50363
    with pytest.raises(WeightsError, match="lacks lang_to_id"):
        Transcriber(model, transcriber.processor)


def test_a_multilingual_model_detects_which_language_is_spoken(
    multilingual: Transcriber, bundled_recordings: tuple[BundledClip, ...]
) -> None:
    assert isinstance(multilingual.model, WhisperFlashAttentionForConditionalGeneration)
    assert {"en", "de", "ja"} < set(multilingual.languages)
    recording = bundled_recordings[4]
    detected = multilingual.transcribe(recording.path)
    assert detected.language == "en"
    assert detected.language_probability is not None and detected.language_probability > 0.9
    assert detected.text == recording.transcript
    given = multilingual.transcribe(recording.path, language="English")
    assert given.language_probability is None
    assert (given.text, given.segments) == (detected.text, detected.segments)


@pytest.mark.slow
def test_languages_of_many_recordings_are_detected(
    multilingual: Transcriber, shared_audio: Path
) -> None:
    rows = json.loads((shared_audio / "index.json").read_text(encoding="utf-8"))
    spoken = {row["file"]: row["language"] for row in rows if row["language"] not in ("en", "none")}
    assert {"de", "es", "ja", "sv", "zh"} <= set(spoken.values())
    for file, language in spoken.items():
        samples = load_audio(shared_audio / file)[: 30 * 16_000]
        assert multilingual.transcribe(samples).language == language, file


def test_one_window_has_the_tokens_of_stock_whisper(
    transcriber: Transcriber, shared_audio: Path
) -> None:
    rows = json.loads((shared_audio / "index.json").read_text(encoding="utf-8"))
    [expected] = [row["tiny.en"]["ts"]["tokens"] for row in rows if row["id"] == "jfk"]
    transcription = transcriber.transcribe(shared_audio / "jfk.flac")
    tokens = [token for segment in transcription.segments for token in segment.tokens]
    assert tokens == expected[: len(tokens)]
    assert len(expected) - len(tokens) <= 1  # the end of text is not part of a segment


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_gpu_gives_the_same_words(
    tiny_en: str, speech: npt.NDArray[np.float32], transcript: str, dtype: str
) -> None:
    on_gpu = Transcriber.from_pretrained(tiny_en, device="cuda", compute_type=dtype)
    assert on_gpu.model.device.type == "cuda"
    if dtype == "auto":
        assert on_gpu.model.dtype is torch.float16
    assert word_error_rate(transcript, on_gpu.transcribe(speech).text) < 0.08
