"""Real weights, converted, in stock Whisper: the ids that it is known to give on real speech."""

from __future__ import annotations

import json
import time
import wave
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from tests.weights.writers import read_audio
from whisper_flash_attention.weights import load_processor, packaged_source, read_checkpoint

Loaded = tuple[WhisperForConditionalGeneration, WhisperProcessor]


def load(source: str) -> Loaded:
    checkpoint = read_checkpoint(source)
    assert checkpoint is not None
    model, info = WhisperForConditionalGeneration.from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=checkpoint.state_dict,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    model.generation_config = checkpoint.generation_config
    return model.eval(), load_processor(source)


@pytest.fixture(scope="module")
def english(tiny_en: str) -> Loaded:
    return load(tiny_en)


@pytest.fixture(scope="module")
def multilingual(base: str) -> Loaded:
    return load(base)


def generate(loaded: Loaded, samples: np.ndarray, **options: object) -> list[int]:
    model, processor = loaded
    features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
    ids: list[int] = model.generate(features, **options)[0].tolist()
    return ids


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    index = json.loads((folder / "index.json").read_text())
    return {entry["id"]: entry for entry in index}


def says(loaded: Loaded, name: str, folder: Path, entry: dict[str, Any], **options: object) -> bool:
    """Whether the model says the known tokens, after the prompt that the Hub's gives itself."""
    model, _ = loaded
    samples = read_audio(folder / entry["file"])
    ids = generate(loaded, samples, force_unique_generate_call=True, **options)
    prompt = [50257, 50362]
    if name == "base":
        language = options.get("language", entry["base"]["detected"])
        prompt = [50258, model.generation_config.lang_to_id[f"<|{language}|>"], 50359, 50363]
    return ids == prompt + entry[name]["nots"]["tokens"]


@pytest.mark.parametrize("clip", ["jfk", "lso_1998_15444_0003"])
def test_tiny_en_says_what_it_is_known_to_say(
    clip: str, english: Loaded, shared_audio: Path
) -> None:
    entry = entries(shared_audio)[clip]
    assert says(english, "tiny.en", shared_audio, entry)
    tokens = entry["tiny.en"]["nots"]["tokens"]
    text = english[1].decode(tokens, skip_special_tokens=True)
    assert text == entry["tiny.en"]["nots"]["text"]


def test_base_says_what_it_is_known_to_say_in_the_language_that_it_hears(
    multilingual: Loaded, shared_audio: Path
) -> None:
    assert says(multilingual, "base", shared_audio, entries(shared_audio)["jfk"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny.en", "base"])
def test_all_short_recordings_are_said_as_known(
    name: str, request: pytest.FixtureRequest, shared_audio: Path
) -> None:
    loaded = request.getfixturevalue({"tiny.en": "english", "base": "multilingual"}[name])
    short = [entry for entry in entries(shared_audio).values() if "nots" in entry.get(name, {})]
    assert len(short) > 20
    for entry in short:
        language = "en" if entry["language"] == "none" else entry["language"]
        options = {"language": language} if name == "base" else {}
        assert says(loaded, name, shared_audio, entry, **options), entry["id"]


def test_tiny_en_says_the_transcripts(english: Loaded, bundled_recordings: tuple[Any, ...]) -> None:
    normalize = BasicTextNormalizer()
    spoken, recognized = [], []
    for recording in bundled_recordings[:2]:
        with wave.open(str(recording.path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32768
        ids = generate(english, samples.astype(np.float32))
        recognized.append(normalize(english[1].decode(ids, skip_special_tokens=True)))
        spoken.append(normalize(recording.transcript))
    assert jiwer.wer(spoken, recognized) < 0.25


def test_word_timestamps_work_with_the_alignment_heads(english: Loaded, shared_audio: Path) -> None:
    model, processor = english
    samples = read_audio(shared_audio / entries(shared_audio)["jfk"]["file"])
    inputs = processor(
        samples, sampling_rate=16000, return_tensors="pt", return_attention_mask=True
    )
    found = model.generate(
        **inputs, return_timestamps=True, return_token_timestamps=True, return_dict_in_generate=True
    )
    times = found["token_timestamps"][0]
    assert bool((times.diff() >= 0).all())
    assert 8 < times.max() <= 11.5


def test_what_stock_saves_is_whole(english: Loaded, tmp_path: Path) -> None:
    model, _ = english
    model.save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path) is None
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (
        again.generation_config.to_dict().items()
        >= {
            "suppress_tokens": model.generation_config.suppress_tokens,
            "alignment_heads": model.generation_config.alignment_heads,
        }.items()
    )


def test_tiny_en_is_read_in_under_a_second(tiny_en: str) -> None:
    packaged_source(tiny_en)  # Its checksum is taken once.
    start = time.perf_counter()
    read_checkpoint(tiny_en)
    assert time.perf_counter() - start < 1
