"""Probabilities of speech, many frames at a time, against the detector's own calls."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from whisper_flash_attention.audio import load_audio, voice
from whisper_flash_attention.audio.voice import Voice, detector


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> np.ndarray:
    """Speech, a pause and speech: 7.1 s, not a whole number of frames."""
    samples = load_audio(bundled_recordings[0].path)
    pause = np.zeros(16_000, np.float32)
    return np.concatenate([samples[:50_000], pause, samples[50_000:97_777]])


def one_by_one(samples: np.ndarray) -> torch.Tensor:
    """Probabilities by the call of the package for each frame."""
    silero = detector()
    silero.reset_states()
    room = np.zeros(-(-samples.size // 512) * 512, np.float32)
    room[: samples.size] = samples
    frames = torch.from_numpy(room).split(512)
    with torch.inference_mode():
        return torch.stack([silero(frame, 16_000).reshape(()) for frame in frames])


def test_the_numbers_are_those_of_the_package(speech, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_by_one(speech)
    assert 0.2 < (expected > 0.5).float().mean() < 0.95
    torch.testing.assert_close(Voice(detector()).probabilities(speech), expected)
    monkeypatch.setattr(voice, "FRAMES_AT_ONCE", 17)
    torch.testing.assert_close(Voice(detector()).probabilities(speech), expected)
    short = speech[:100]
    torch.testing.assert_close(Voice(detector()).probabilities(short), one_by_one(short))


def test_blocks_have_the_probabilities_of_one_recording(speech) -> None:
    listening = Voice(detector())
    bounds = [0, 512, 512 * 40, 512 * 90, speech.size]
    found = [listening.probabilities(speech[a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(found), one_by_one(speech))


def test_recordings_side_by_side_have_their_own_probabilities(speech) -> None:
    """Three that begin elsewhere, in pieces of different lengths."""
    sounds = [speech[start:] for start in (0, 20_480, 40_960)]
    voices = [Voice(detector()) for _ in sounds]
    found: list[list[torch.Tensor]] = [[] for _ in sounds]
    places = [0, 0, 0]
    for lengths in ((3, 1, 4), (2, 5, 1), (1, 1, 9)):
        pieces = []
        for index, length in enumerate(lengths):
            begin, places[index] = places[index], places[index] + 512 * length
            pieces.append((voices[index], sounds[index][begin : places[index]]))
        for each, probabilities in zip(found, Voice.together(pieces), strict=True):
            each.append(probabilities)
    for sound, place, each in zip(sounds, places, found, strict=True):
        torch.testing.assert_close(torch.cat(each), one_by_one(sound[:place]))


def test_a_detector_of_another_structure_is_called_frame_by_frame(speech) -> None:
    silero = detector()

    class Other:
        reset_states = staticmethod(silero.reset_states)

        def __call__(self, frame: torch.Tensor, rate: int) -> torch.Tensor:
            return silero(frame, rate)

    found = Voice(Other()).probabilities(speech[:40_000])
    torch.testing.assert_close(found, one_by_one(speech[:40_000]))
    pieces = [(Voice(detector()), speech[:5_120]), (Voice(Other()), speech[:5_120])]
    first, second = Voice.together(pieces)
    torch.testing.assert_close(first, second)
    with pytest.raises(ZeroDivisionError):  # its own errors are not hidden
        Voice(SimpleNamespace(reset_states=lambda: 1 / 0))
