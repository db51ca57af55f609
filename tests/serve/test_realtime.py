"""Realtime transcription: turns, stable text, and OpenAI's own client on a live socket."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.live_server import MODEL, Live
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.serve.turns import CODES, LiveFormat, StableText
from whisper_flash_attention.transcribe import Transcriber

pytest.importorskip("silero_vad", reason="the extra vad is not installed")

DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"


def test_g711_is_that_of_the_standard() -> None:
    """Values of its tables: silence, the smallest steps and the largest codes."""
    mu, a = CODES["audio/pcmu"] * 32768, CODES["audio/pcma"] * 32768
    assert [mu[code] for code in (0xFF, 0x7F, 0xFE, 0x80, 0x00)] == [0, 0, 8, 32124, -32124]
    assert [a[code] for code in (0xD5, 0x55, 0xAA, 0x2A)] == [8, -8, 32256, -32256]


def test_samples_of_pcm() -> None:
    data = np.array([0, 16384, -32768], "<i2").tobytes()
    assert LiveFormat().samples(data).tolist() == [0, 0.5, -1]


def test_words_on_which_two_passes_agree_are_stable() -> None:
    stable = StableText()
    assert stable.add("He was") == ""
    assert stable.add("He was not an") == "He "
    assert stable.add("He was not a young") == "was not "
    assert stable.add("She was not a young man") == ""
    assert stable.finish("He was not a young man.") == "a young man."
    assert StableText().finish("all of it") == "all of it"


@given(st.lists(st.text("ab 日", max_size=8), max_size=6))
def test_stable_text_is_never_taken_back(passes: list[str]) -> None:
    stable, sent = StableText(), ""
    for text in passes:
        sent += stable.add(text)
        assert stable.text == sent
        assert not sent or text.startswith(sent) or stable.text == sent


def sound(clip: bytes, rate: int) -> bytes:
    """16-bit PCM of a recording, with a second of silence after it."""
    samples = np.concatenate([load_audio(clip, rate), np.zeros(rate, np.float32)])
    return (samples * 32767).astype("<i2").tobytes()


async def converse(
    live: Live, session: dict[str, Any], data: bytes, *, commit: bool = False, piece: int = 9600
) -> list[Any]:
    """Send sound in pieces; return the events up to the first completed item."""
    events: list[Any] = []
    async with (
        openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client,
        client.realtime.connect(extra_query={"intent": "transcription"}) as connection,
    ):
        await connection.session.update(
            session={"type": "transcription", "audio": {"input": session}}
        )
        for start in range(0, len(data), piece):
            part = base64.b64encode(data[start : start + piece]).decode()
            await connection.input_audio_buffer.append(audio=part)
            await asyncio.sleep(0.01)
        if commit:
            await connection.input_audio_buffer.commit()
        async with asyncio.timeout(60):
            async for event in connection:
                events.append(event)
                if event.type in (COMPLETED, "error", COMPLETED.replace("completed", "failed")):
                    return events
    return events


def test_speech_is_found_and_transcribed_while_it_is_spoken(live: Live, clip: bytes) -> None:
    session = {
        "format": {"type": "audio/pcm", "rate": 16000},
        "transcription": {"model": MODEL, "language": "en"},
        "turn_detection": {"type": "server_vad", "silence_duration_ms": 300},
    }
    events = asyncio.run(converse(live, session, sound(clip, 16000)))
    kinds = [each.type for each in events]
    assert kinds[:2] == ["session.created", "session.updated"]
    turns = [kind for kind in kinds if kind.startswith("input_audio_buffer")]
    assert turns == [
        f"input_audio_buffer.{each}" for each in ("speech_started", "speech_stopped", "committed")
    ]
    started = next(each for each in events if each.type.endswith("speech_started"))
    stopped = next(each for each in events if each.type.endswith("speech_stopped"))
    assert started.audio_start_ms < 500 < 2500 < stopped.audio_end_ms < 3600
    last = events[-1]
    assert last.type == COMPLETED and "young man" in last.transcript
    deltas = [each.delta for each in events if each.type == DELTA]
    assert "".join(deltas) == last.transcript
    assert {each.item_id for each in events if hasattr(each, "item_id")} == {last.item_id}
    assert live.is_idle()


def test_a_commit_gives_the_text_of_transcribe(
    live: Live, clip: bytes, transcriber: Transcriber
) -> None:
    data = sound(clip, 24000)
    session = {"transcription": {"model": MODEL, "language": "en"}, "turn_detection": None}
    events = asyncio.run(converse(live, session, data, commit=True))
    samples = LiveFormat().samples(data)
    expected = transcriber.transcribe((samples, 24000), language="en")
    assert events[-1].transcript == expected.text
    assert events[-1].usage.seconds == pytest.approx(expected.seconds)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"type": "session.update", "session": {"type": "realtime"}}, "must be transcription"),
        ({"type": "session.update", "session": 3}, "must be an object"),
        ({"type": "response.create"}, "there is no event 'response.create'"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "must be base64"),
        ({"type": "input_audio_buffer.append"}, "must be base64"),
        ({"type": "input_audio_buffer.commit"}, "the buffer is empty"),
        ([1], "must be a JSON object"),
        (
            {
                "type": "session.update",
                "session": {
                    "type": "transcription",
                    "audio": {"input": {"noise_reduction": {"type": "near_field"}}},
                },
            },
            "noise reduction is not supported",
        ),
        (
            {
                "type": "session.update",
                "session": {
                    "type": "transcription",
                    "audio": {"input": {"transcription": {"language": "germn"}}},
                },
            },
            "did you mean german",
        ),
        (
            {
                "type": "session.update",
                "session": {
                    "type": "transcription",
                    "audio": {"input": {"turn_detection": {"type": "semantic_vad"}}},
                },
            },
            "must be server_vad",
        ),
    ],
)
def test_events_that_are_refused_leave_the_session_open(
    live: Live, event: Any, message: str
) -> None:
    from websockets.sync.client import connect

    url = live.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
    with connect(url) as socket:
        assert json.loads(socket.recv())["type"] == "session.created"
        socket.send(json.dumps(event))
        found = json.loads(socket.recv())
        assert found["type"] == "error" and message in found["error"]["message"]
        socket.send(json.dumps({"type": "input_audio_buffer.clear"}))
        assert json.loads(socket.recv())["type"] == "input_audio_buffer.cleared"


def test_other_intents_and_models_are_no_session(live: Live) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    url = live.url.replace("http", "ws") + "/v1/realtime"
    for query, status in (("?intent=conversation", 400), ("?model=large", 404), ("?modle=x", 400)):
        with pytest.raises(InvalidStatus) as raised, connect(url + query):
            pass
        assert raised.value.response.status_code == status
