"""Real weights on real speech: the same token ids as stock Whisper, eager, float32."""

from __future__ import annotations

import json
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

pytestmark = pytest.mark.usefixtures("windows_are_encoded_once")


@pytest.mark.parametrize(
    "some", [(1, 4), pytest.param((0, 2, 3), marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_short_form_ids_and_text(english, clips, same_ids, bundled_recordings, some) -> None:
    ids = same_ids(english, english.features(*(clips[each] for each in some)))
    texts = english.processor.batch_decode(ids, skip_special_tokens=True)
    normalize = BasicTextNormalizer()
    spoken = [normalize(bundled_recordings[each].transcript) for each in some]
    assert jiwer.wer(spoken, [normalize(text) for text in texts]) < 0.15


def test_timestamps(english, clips, same_ids) -> None:
    ids = same_ids(english, english.features(clips[1], clips[4]), return_timestamps=True)
    first_timestamp = english.stock.generation_config.no_timestamps_token_id + 1
    assert (ids >= first_timestamp).any()


def test_long_form(english, long_clip, same_ids) -> None:
    inputs = english.features(
        long_clip, truncation=False, padding="longest", return_attention_mask=True
    )
    assert inputs["input_features"].shape[-1] > 3000
    same_ids(english, inputs, return_timestamps=True)


@pytest.mark.slow
def test_long_form_with_fallback_and_previous_text(english, long_clip, same_ids) -> None:
    inputs = english.features(
        long_clip, truncation=False, padding="longest", return_attention_mask=True
    )
    torch.manual_seed(0)
    options = {
        "return_timestamps": True,
        "condition_on_prev_tokens": True,
        "temperature": 0.0,
        "compression_ratio_threshold": 1.35,
        "logprob_threshold": -1.0,
        "no_speech_threshold": 0.6,
    }
    same_ids(english, inputs, **options)


def test_beams(english, clips, same_ids) -> None:
    same_ids(english, english.features(clips[1], clips[4]), num_beams=5)


def test_language_detection_and_tasks(multilingual, clips, same_ids) -> None:
    inputs = multilingual.features(clips[4])
    found = multilingual.ours.detect_language(inputs["input_features"])
    assert torch.equal(found, multilingual.stock.detect_language(inputs["input_features"]))
    assert multilingual.processor.batch_decode(found[:, None]) == ["<|en|>"]
    same_ids(multilingual, inputs)
    # English that is taken for German may be repeated without an end.
    same_ids(multilingual, inputs, language="de", task="translate", max_new_tokens=12)


def test_multilingual_timestamps_and_beams(multilingual, clips, same_ids) -> None:
    inputs = multilingual.features(clips[4])
    same_ids(multilingual, inputs, return_timestamps=True, language="en", num_beams=2)


def test_prompts(english, clips, same_ids) -> None:
    prompt = english.processor.get_prompt_ids("Mr. Dashwood", return_tensors="pt")
    same_ids(english, english.features(clips[1], clips[4]), prompt_ids=prompt)


def test_word_timestamps_leave_the_back_end_in_place(english, clips) -> None:
    inputs = english.features(clips[4])
    options = {"return_token_timestamps": True, "return_timestamps": True}
    before = english.ours.attention_backend
    found = english.ours.generate(**inputs, **options)
    expected = english.stock.generate(**inputs, **options)
    assert torch.equal(found["sequences"], expected["sequences"])
    assert torch.equal(found["token_timestamps"], expected["token_timestamps"])
    assert english.ours.attention_backend == before == "auto"


def test_sampling_with_a_seed(english, clips) -> None:
    inputs = english.features(clips[1], clips[4])
    results = []
    for model in (english.stock, english.ours):
        torch.manual_seed(7)
        results.append(model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=30))
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["reference", "sdpa_flash"])
def test_every_back_end_that_runs_here_gives_the_same_ids(
    english, clips, same_ids, backend
) -> None:
    english.ours.set_attn_implementation(backend)
    try:
        same_ids(english, english.features(clips[4]))
        assert english.ours.attention_backend == backend
    finally:
        english.ours.set_attn_implementation("auto")


def read_recording(path: Path) -> np.ndarray:
    from whisper_flash_attention.audio.audio_source import load_audio

    return load_audio(path)


@pytest.mark.slow
@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("size", ["tiny.en", "base"])
def test_all_shared_recordings(request, shared_audio, same_ids, size, timestamps) -> None:
    """Short and long recordings in several languages, silence and noise: stock's ids."""
    pair = request.getfixturevalue("english" if size == "tiny.en" else "multilingual")
    for entry in json.loads((shared_audio / "index.json").read_text()):
        clip = read_recording(shared_audio / entry["file"])
        if clip.size <= 30 * 16000:
            options = {"return_timestamps": timestamps}
            inputs = pair.features(clip)
        else:
            options = {"return_timestamps": True}
            inputs = pair.features(
                clip, truncation=False, padding="longest", return_attention_mask=True
            )
        same_ids(pair, inputs, **options)
