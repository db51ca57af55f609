"""Recordings handed over in any form, their channels, and what holds no sound."""

from __future__ import annotations

import io
import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.audio.encoding import read_wave, write_wave
from whisper_flash_attention.audio.audio_source import AudioSource, open_audio
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.transcribe import Segment, Transcriber, Transcription, render
from whisper_flash_attention.transcribe.transcriber import Transcriber as Class

RATE = 16_000


@pytest.fixture(scope="module")
def speech(bundled_recordings) -> npt.NDArray[np.int16]:
    return read_wave(bundled_recordings[4].path)[: 3 * RATE].copy()


@pytest.fixture(scope="module")
def call(bundled_recordings) -> npt.NDArray[np.int16]:
    """A telephone call: each channel has a speaker, who waits for the other. `[2, T]`."""
    first, second = (read_wave(bundled_recordings[each].path)[: 3 * RATE] for each in (4, 3))
    quiet = np.zeros(3 * RATE, np.int16)
    return np.stack([np.concatenate([first, quiet]), np.concatenate([quiet, second])])


@pytest.fixture(scope="module")
def slow(transcriber: Transcriber) -> Transcriber:
    """The same model, which the engine does not run: `generate` does."""

    class Slow(Class):
        runs_on_engine = False  # type: ignore[assignment]

    return Slow(transcriber.model, transcriber.processor)


def test_every_form_of_a_recording_has_the_same_text(transcriber, speech, tmp_path: Path) -> None:
    floats = speech / np.float32(32768)
    write_wave(tmp_path / "a.wav", speech[None], RATE)
    content = (tmp_path / "a.wav").read_bytes()
    wanted = transcriber.transcribe(floats, temperature=0.0)
    assert wanted.text
    with (tmp_path / "a.wav").open("rb") as file:
        found = transcriber.transcribe(
            [
                *(speech, speech[None], torch.from_numpy(speech), (speech, 16_000)),
                *((floats.tolist(), np.float32(16_000)), np.stack([floats, floats])),
                *(np.stack([floats, floats], axis=1), torch.from_numpy(floats)[None]),
                *(content, io.BytesIO(content), file, bytearray(content), tmp_path / "a.wav"),
            ],
            temperature=0.0,
            batch_size=16,
        )
    assert [each.text for each in found] == [wanted.text] * len(found)
    assert transcriber.transcribe((speech, RATE), temperature=0.0).text == wanted.text


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_samples_of_another_scale_are_transcribed_with_a_warning(
    transcriber, speech, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    wanted = transcriber.transcribe(speech, temperature=0.0, mode=mode)
    with caplog.at_level(logging.WARNING):
        found = transcriber.transcribe(speech.astype(np.float32), temperature=0.0, mode=mode)
    assert found == wanted and found.text
    [record] = [each for each in caplog.records if "16 bits" in each.getMessage()]
    assert record.levelname == "WARNING"


def silent_recordings() -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(0)
    steps = random.integers(-1, 2, 2 * RATE).astype(np.float32) / np.float32(32768)
    return {
        "1 ms": random.uniform(-0.5, 0.5, 16).astype(np.float32),
        "99 ms": random.uniform(-0.5, 0.5, 1584).astype(np.float32),
        "zeros": np.zeros(2 * RATE, np.float32),
        "constant": np.full(2 * RATE, 0.2, np.float32),
        "one step": steps,
        "constant and a step": np.float32(0.2) + steps,
        "long constant": np.full(65 * RATE, -0.1, np.float32),
    }


@pytest.mark.parametrize(
    "arguments", [{}, {"mode": "batched"}, {"mode": "batched", "vad_filter": 0}]
)
def test_what_holds_no_sound_has_no_text(transcriber, arguments: dict) -> None:
    arguments = {name: value or False for name, value in arguments.items()}
    given = silent_recordings()
    for found, samples in zip(
        transcriber.transcribe(list(given.values()), **arguments), given.values(), strict=True
    ):
        assert (found.text, found.segments, found.language) == ("", (), "en")
        assert found.seconds == samples.size / RATE


def test_nor_does_it_by_generate_or_one_by_one(slow, transcriber) -> None:
    given = list(silent_recordings().values())
    assert [each.text for each in slow.transcribe(given)] == [""] * len(given)
    for each in (slow, transcriber):
        found = dict(each.transcribe_each(iter(given)))
        assert sorted(found) == list(range(len(given)))
        assert all(text.text == "" for text in found.values())
        assert list(each.stream(given[0])) == []


def test_a_silent_recording_that_is_left_in_its_file_is_silent(transcriber, tmp_path: Path) -> None:
    path = tmp_path / "silence.wav"
    write_wave(path, np.zeros((1, 65 * RATE), np.int16), RATE)
    sound = open_audio(path, held_seconds=30)
    assert isinstance(sound, AudioSource) and sound.samples is None
    found = transcriber.transcribe(sound)
    assert (found.text, found.seconds) == ("", 65.0)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_rest_too_short_for_a_word_is_not_decoded(transcriber, speech, mode: str) -> None:
    samples = np.zeros(30 * RATE + 800, np.float32)
    samples[: speech.size] = speech / np.float32(32768)
    samples[30 * RATE :] = np.random.default_rng(0).uniform(-0.4, 0.4, 800)
    found = transcriber.transcribe(
        samples, mode=mode, vad_filter=None if mode != "batched" else False
    )
    assert all(segment.start < 29.9 for segment in found.segments)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
@pytest.mark.parametrize("kind", ["file", "samples"])
def test_each_channel_by_itself_is_merged_by_time(
    transcriber, call, tmp_path: Path, mode: str, kind: str
) -> None:
    write_wave(tmp_path / "call.wav", call, RATE)
    audio = tmp_path / "call.wav" if kind == "file" else call
    arguments = {"mode": mode, "temperature": 0.0}
    found = transcriber.transcribe(audio, channel="each", **arguments)
    alone = [transcriber.transcribe(audio, channel=number, **arguments) for number in (1, 2)]
    for number, single in enumerate(alone, 1):
        assert all(segment.channel is None for segment in single.segments)
        mine = [segment.text for segment in found.segments if segment.channel == number]
        assert mine == [segment.text for segment in single.segments] and mine
    starts = [segment.start for segment in found.segments]
    assert starts == sorted(starts)
    channels = [segment.channel for segment in found.segments]
    assert channels[0] == 1 and channels[-1] == 2
    turns = 1 + sum(before != after for before, after in pairwise(channels))
    assert len(found.text.splitlines()) == turns
    assert found.seconds == call.shape[1] / RATE
    streamed = list(transcriber.stream(audio, channel="each", **arguments))
    assert [(each.text, each.channel) for each in streamed] == [
        (each.text, each.channel) for each in found.segments
    ]
    assert Transcription.from_dict(found.to_dict()) == found


def test_each_channel_goes_with_recordings_beside_it(transcriber, slow, call, speech) -> None:
    arguments = {"temperature": 0.0}
    single, both, none = transcriber.transcribe(
        [speech, call, call[:, :0:-1][:, :1600]], channel=["mix", "each", 2], **arguments
    )
    assert single.text and {segment.channel for segment in both.segments} == {1, 2}
    assert none.segments == ()
    shares: list[tuple[int, float]] = []
    found = dict(
        transcriber.transcribe_each(
            iter([speech, call]),
            channel="each",
            on_progress=lambda *each: shares.append(each),
            **arguments,
        )
    )
    assert found[1].text == both.text
    assert [segment.channel for segment in found[0].segments] == [1] * len(found[0].segments)
    of_call = [share for number, share in shares if number == 1]
    assert of_call == sorted(of_call) and of_call[0] == 0 and of_call[-1] == 1
    by_generate = slow.transcribe(call, channel="each", temperature=0.0)
    assert by_generate.text.splitlines()[0] == both.text.splitlines()[0]


def test_a_channel_or_track_that_is_not_there_is_an_audio_error(
    transcriber, call, tmp_path: Path
) -> None:
    write_wave(tmp_path / "call.wav", call, RATE)
    for audio in (call, tmp_path / "call.wav"):
        with pytest.raises(AudioError, match="channel 3"):
            transcriber.transcribe(audio, channel=3)
        for track in (2, "deu"):
            with pytest.raises(AudioError, match="track"):
                transcriber.transcribe(audio, audio_track=track)
    assert transcriber.transcribe(call[:, :1600], audio_track=1).seconds == 0.1


SEGMENTS = (
    Segment(0.0, 1.0, "Hello.", channel=1),
    Segment(0.5, 2.0, "Hi, who is it?", channel=2),
    Segment(2.0, 3.0, "It is me."),
)


def test_labels_stand_in_front_of_lines_and_json_has_the_field() -> None:
    found = Transcription("", "en", SEGMENTS, 3.0)
    lines = ["[channel 1] Hello.", "[channel 2] Hi, who is it?", "It is me."]
    assert render(found, "txt").splitlines() == lines
    for name in ("srt", "vtt", "tsv", "lrc"):
        text = render(found, name)
        assert all(line in text for line in lines), text
    rows = found.to_dict()["segments"]
    assert [row.get("channel", "none") for row in rows] == [1, 2, "none"]
