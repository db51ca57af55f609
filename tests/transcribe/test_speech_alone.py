"""Sequential mode on what a voice activity detector takes for speech."""

from __future__ import annotations

import numpy as np
import pytest

from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe import Transcriber

ONCE = {"temperature": 0.0, "condition_on_previous_text": False}


@pytest.fixture(scope="module")
def recording(bundled_recordings) -> np.ndarray:
    """Noise, 3.3 s of speech, noise, the same speech, noise: 30 s."""
    clip = load_audio(bundled_recordings[4].path)[:53_000]
    noise = 0.003 * np.random.default_rng(0).standard_normal(30 * 16_000).astype(np.float32)
    for start in (8, 18):
        noise[start * 16_000 :][: clip.size] += clip
    return noise


def test_times_are_those_of_the_recording(transcriber: Transcriber, recording) -> None:
    found = transcriber.transcribe(recording, vad_filter=True, word_timestamps=True, **ONCE)
    words = [word for segment in found.segments for word in segment.words]
    assert found.seconds == 30
    assert 7.5 < words[0].start < 9 and words[-1].end < 22
    assert not any(11.8 < word.start < 17.5 for word in words)
    both = [[w.text for w in words if w.start < 15], [w.text for w in words if w.start > 15]]
    assert len(both[0]) > 4 and both[0] == both[1]


def test_parts_and_speech_go_together(transcriber: Transcriber, recording) -> None:
    found = transcriber.transcribe(
        recording,
        vad_filter=True,
        vad_parameters={"speech_pad_ms": 100, "min_silence_duration_ms": 300},
        clip_timestamps=(0, 15),
        **ONCE,
    )
    assert found.segments and found.segments[-1].end < 12.5


def test_nothing_is_read_where_nobody_speaks(transcriber: Transcriber) -> None:
    noise = 0.05 * np.random.default_rng(0).standard_normal(4 * 16_000).astype(np.float32)
    assert transcriber.transcribe(noise, vad_filter=True).segments == ()
    found = transcriber.transcribe_many([noise, noise[:16_000]], vad_filter=True)
    assert [each.text for each in found] == ["", ""]


def test_another_decode_loop_reads_everything(without_engine: Transcriber, recording) -> None:
    with pytest.raises(OptionError, match="vad_filter True needs the decode engine"):
        without_engine.transcribe(recording, vad_filter=True)
