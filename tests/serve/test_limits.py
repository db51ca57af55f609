"""What the server refuses, and what failures and clients that go away cost the others."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.serve.live_server import MODEL, Live, serving
from whisper_flash_attention.errors import NotFinite
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.transcribe import Transcriber


@pytest.fixture(scope="module")
def small(transcriber: Transcriber) -> Iterator[Live]:
    """A server with narrow limits."""
    options: dict[str, Any] = {
        "max_upload_mb": 0.2,
        "memory_upload_mb": 0.05,
        "max_seconds": 4,
        "max_requests": 2,
        "timeout": 0.5,
        "api_key": "secret",
    }
    with serving(transcriber, **options) as found:
        yield found


@contextmanager
def held_back(live: Live) -> Iterator[threading.Event]:
    """Have no recording get a turn before the event is set."""
    may_go = threading.Event()
    take_turn = live.scheduler._take_turn

    def wait(*given: Any, **options: Any) -> None:
        may_go.wait(20)
        take_turn(*given, **options)

    live.scheduler._take_turn = wait  # type: ignore[method-assign]
    try:
        yield may_go
    finally:
        may_go.set()
        del live.scheduler._take_turn  # the method of the class


def test_a_key_is_needed(small: Live, clip: bytes) -> None:
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        small.client(api_key="other").models.list()
    with pytest.raises(openai.AuthenticationError):
        small.client().audio.transcriptions.create(file=clip, model=MODEL)
    assert small.client(api_key="secret").models.list().data
    assert httpx.get(f"{small.url}/health").status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(small: Live) -> None:
    client = small.client(api_key="secret")
    with pytest.raises(openai.APIStatusError, match=r"larger than 0\.2 MB") as raised:
        client.audio.transcriptions.create(file=bytes(300_000), model=MODEL)
    assert raised.value.status_code == 413

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        for _ in range(30):
            yield bytes(10_000)

    headers = {"Authorization": "Bearer secret", "Content-Type": "multipart/form-data; boundary=x"}
    url = f"{small.url}/v1/audio/transcriptions"
    response = httpx.post(url, content=endless(), headers=headers)
    assert response.status_code == 413


def test_a_recording_that_is_too_long_is_refused(small: Live, bundled_recordings: Any) -> None:
    recording = bundled_recordings[2].path.read_bytes()
    with pytest.raises(openai.APIStatusError, match="longer than 4 s") as raised:
        small.client(api_key="secret").audio.transcriptions.create(file=recording, model=MODEL)
    assert raised.value.status_code == 413
    assert small.is_idle()


def test_too_many_requests_and_too_slow_ones(small: Live, clip: bytes) -> None:
    """Two wait until they have taken too long; a third is refused at once."""
    client = small.client(api_key="secret")
    codes: list[int] = []

    def request() -> None:
        with pytest.raises(openai.APIStatusError) as raised:
            client.audio.transcriptions.create(file=clip, model=MODEL)
        codes.append(raised.value.status_code)

    with held_back(small) as may_go:
        threads = [threading.Thread(target=request) for _ in range(2)]
        for thread in threads:
            thread.start()
        while small.scheduler.preparation.begun != (2, 0):
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="2 requests are in progress") as raised:
            client.audio.transcriptions.create(file=clip, model=MODEL)
        assert 1 <= int(raised.value.response.headers["Retry-After"]) <= 60
        for thread in threads:
            thread.join()
        assert codes == [504, 504]
        may_go.set()
    assert small.is_idle()
    text = httpx.get(f"{small.url}/metrics").text
    assert 'whisper_flash_errors_total{kind="too_many_requests"} 1.0' in text
    assert 'whisper_flash_errors_total{kind="timeout"} 2.0' in text
    assert "whisper_flash_requests_in_progress 0.0" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(live: Live, clip: bytes, stream: bool) -> None:
    with held_back(live) as may_go:
        with pytest.raises(openai.APITimeoutError):
            live.client(timeout=0.3).audio.transcriptions.create(
                file=clip, model=MODEL, stream=stream
            )
        assert live.scheduler.preparation.begun == (1, 0)
        may_go.set()
        assert live.is_idle()
    assert live.client().audio.transcriptions.create(file=clip, model=MODEL).text


def test_a_client_that_stops_in_mid_upload(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
        kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disp"
        connection.sendall((head + kind).encode())
        time.sleep(0.1)
    for _ in range(100):
        if "requests_in_progress 0.0" in httpx.get(f"{live.url}/metrics").text:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the request is still in progress")


@pytest.mark.parametrize("error", [NotFinite("NaN"), RuntimeError("device lost")])
def test_a_request_that_fails_costs_no_other(
    live: Live, clip: bytes, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A window of one of three clients that share slots makes the decoder raise."""
    assert live.scheduler.transcriber is not None
    from whisper_flash_attention.engine import torch_decoder

    forward = torch_decoder.forward
    poison = live.scheduler.transcriber.tokenizer.encode(" poison", add_special_tokens=False)[0]

    def raising(weights: Any, state: Any, tokens: Any, *rest: Any) -> Any:
        if (tokens == poison).any():
            raise error
        return forward(weights, state, tokens, *rest)

    monkeypatch.setattr(torch_decoder, "forward", raising)

    async def all_of_them() -> list[Any]:
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", **options) as client:
            create = client.audio.transcriptions.create
            jobs = [
                create(file=clip, model=MODEL, prompt=prompt) for prompt in ("a", "poison", "b")
            ]
            return await asyncio.gather(*jobs, return_exceptions=True)

    first, failed, last = asyncio.run(all_of_them())
    assert "young man" in first.text and "young man" in last.text
    assert isinstance(failed, openai.InternalServerError)
    assert live.is_idle()


def test_a_model_that_cannot_be_loaded_is_unavailable(clip: bytes, tmp_path: Any) -> None:
    from whisper_flash_attention.errors import WeightsError
    from whisper_flash_attention.options import ModelOptions
    from whisper_flash_attention.serve.app import to_request_error

    scheduler = Scheduler("none", ModelOptions(str(tmp_path / "missing.pt")))
    scheduler.start()
    try:
        with pytest.raises(WeightsError) as raised:
            scheduler.warm_up()
    finally:
        scheduler.close()
    assert to_request_error(raised.value).status == 503
