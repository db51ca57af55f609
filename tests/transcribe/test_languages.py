"""Languages as they are detected, once or in every window, and their probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.recording import mean_probabilities
from whisper_flash_attention.transcribe.window_decoder import WindowDecoder

ONCE = {"temperature": 0.0, "condition_on_previous_text": False}


@pytest.fixture(scope="module")
def clip(bundled_recordings) -> np.ndarray:
    return load_audio(bundled_recordings[4].path)[: 3 * 16_000]


@pytest.fixture
def german_second(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every second window is German, as it were; how many windows were looked at each time."""
    looked: list[int] = []

    def chances(decoder: WindowDecoder, states: object) -> list[dict[str, float]]:
        found = []
        for _ in range(len(states)):  # type: ignore[arg-type]
            is_german = sum(looked) % 2 == 1
            looked.append(1)
            found.append({"de": 0.6, "en": 0.4} if is_german else {"en": 0.9, "de": 0.1})
        return found

    monkeypatch.setattr(WindowDecoder, "language_probabilities", chances)
    return looked


def test_probabilities_are_those_of_transformers(multilingual: Transcriber, clip) -> None:
    found = multilingual.transcribe(clip, max_new_tokens=1, **ONCE)
    assert found.language == "en" and found.all_language_probs[0][0] == "en"
    assert found.language_probability == found.all_language_probs[0][1] > 0.5
    assert sum(chance for _, chance in found.all_language_probs) == pytest.approx(1)
    assert {code for code, _ in found.all_language_probs} == set(multilingual.languages)
    chances = [chance for _, chance in found.all_language_probs]
    assert chances == sorted(chances, reverse=True)
    # Transformers' own forward pass gives the same.
    from whisper_flash_attention.transcribe.hf_long_form import (
        features_and_mask,
        language_probabilities,
    )

    features, _ = features_and_mask(multilingual.model, clip)
    stock = language_probabilities(multilingual.model, multilingual._vocabulary, features)
    assert stock == pytest.approx(dict(found.all_language_probs), abs=1e-4)


def test_a_language_that_was_given_has_no_probability(transcriber: Transcriber, clip) -> None:
    given = transcriber.transcribe(clip, language="en", max_new_tokens=1, **ONCE)
    assert given.language_probability is None and given.all_language_probs == ()
    only = transcriber.transcribe(clip, max_new_tokens=1, **ONCE)
    assert (only.language_probability, only.all_language_probs) == (1.0, (("en", 1.0),))


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_every_window_has_its_language(
    multilingual: Transcriber, clip, german_second, mode: str
) -> None:
    silence = np.zeros(40 * 16_000, np.float32)
    recording = np.concatenate([clip, silence, clip, silence[: 32 * 16_000], clip])
    found = multilingual.transcribe(
        recording, mode=mode, vad_filter=False, multilingual=True, max_new_tokens=2, **ONCE
    )
    languages = [segment.language for segment in found.segments]
    assert languages[:3] == ["en", "de", "en"]
    assert found.language == "en"
    assert dict(found.all_language_probs)["en"] == pytest.approx((0.9 + 0.4 + 0.9) / 3)


def test_once_is_enough_otherwise(multilingual: Transcriber, clip, german_second) -> None:
    silence = np.zeros(40 * 16_000, np.float32)
    recording = np.concatenate([clip, silence, clip])
    found = multilingual.transcribe(recording, max_new_tokens=2, **ONCE)
    assert len(german_second) == 1 and found.language == "en"
    assert all(segment.language is None for segment in found.segments)


def test_what_makes_no_sense_is_refused(transcriber: Transcriber, multilingual, clip) -> None:
    with pytest.raises(OptionError, match="multilingual=True needs a multilingual model"):
        transcriber.transcribe(clip, multilingual=True)
    with pytest.raises(OptionError, match='but language="de" is given: give one of the two'):
        multilingual.transcribe(clip, multilingual=True, language="de")


def test_the_mean_of_windows_is_in_order() -> None:
    assert mean_probabilities([]) == ()
    found = mean_probabilities([{"en": 0.9, "de": 0.1}, {"de": 1.0, "en": 0.0}])
    assert found == (("de", 0.55), ("en", 0.45))
