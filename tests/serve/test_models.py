"""Several models in one server: names, loading with the first request, unloading, translations."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.serve.live_server import MODEL, Live, listening
from whisper_flash_attention.options import ModelOptions, ServeOptions
from whisper_flash_attention.serve.app import Server
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.transcribe import Transcriber


@pytest.fixture(scope="module")
def several(transcriber: Transcriber, multilingual: Transcriber, tiny_en: str) -> Iterator[Live]:
    """English, multilingual, and one that is loaded with its first request and dropped soon."""
    schedulers = {
        MODEL: Scheduler(MODEL, ModelOptions(), slots=2, transcriber=transcriber),
        "base": Scheduler("base", ModelOptions(), slots=2, transcriber=multilingual),
        "later": Scheduler("later", ModelOptions(tiny_en, device="cpu"), slots=2, idle_unload=0.2),
    }
    for name in (MODEL, "base"):
        schedulers[name].ready.set()
    with listening(Server(ServeOptions(), schedulers)) as found:
        yield found


def loaded(live: Live) -> list[str]:
    names: list[str] = httpx.get(f"{live.url}/health").json()["loaded"]
    return names


def test_a_model_is_loaded_with_its_first_request_and_dropped_when_it_is_idle(
    several: Live, clip: bytes
) -> None:
    assert [each.id for each in several.client().models.list()] == [MODEL, "base", "later"]
    for _ in range(2):
        assert loaded(several) == [MODEL, "base"]
        assert "young man" in several.post(clip, model="later").json()["text"]
        for _ in range(200):
            if loaded(several) == [MODEL, "base"]:
                break
            time.sleep(0.05)


def test_requests_go_to_the_model_that_they_name(
    several: Live, clip: bytes, transcriber: Transcriber, multilingual: Transcriber
) -> None:
    create = several.client().audio.transcriptions.create
    found = [create(file=clip, model=name, language="en").text for name in (MODEL, "base")]
    assert found == [
        each.transcribe(clip, language="en").text for each in (transcriber, multilingual)
    ]
    text = httpx.get(f"{several.url}/metrics").text
    for name in (MODEL, "base"):
        assert 'route="/v1/audio/transcriptions",status="200"}' in text
        assert f'whisper_flash_model_loaded{{model="{name}"}} 1.0' in text


def test_translations_are_those_of_transcribe(
    several: Live, clip: bytes, multilingual: Transcriber
) -> None:
    """The recording is English; the task and, of the result, the language are the model's."""
    expected = multilingual.transcribe(clip, language="de", task="translate").text
    given = {"model": "base", "language": "de", "response_format": "verbose_json"}
    found = several.post(clip, "translations", **given).json()
    assert (found["text"], found["language"]) == (expected, "english")
    assert found["task"] == "translate"
    refused = several.post(clip, "translations", model=MODEL)
    assert refused.status_code == 400 and "translate" in refused.json()["error"]["message"]


def test_the_language_is_detected_among_those_given(several: Live, clip: bytes) -> None:
    found = several.post(
        clip, model="base", response_format="verbose_json", **{"languages[]": ["de", "en"]}
    ).json()
    assert found["language"] == "english"
