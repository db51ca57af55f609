"""Requests that no client would send, many connections, and memory that stays flat."""

from __future__ import annotations

import io
import os
import random
import socket
import wave
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.serve.live_server import Live


def fuzz(live: Live, examples: int) -> int:
    """Send requests drawn from the OpenAPI document; return how many."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    sent = 0

    def send(case: Any) -> None:
        nonlocal sent
        response = case.call(timeout=60)
        assert response.status_code < 500, (case, response.text)
        sent += 1

    for operation in schema.get_all_operations():
        run = given(case=operation.ok().as_strategy())(send)
        settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(run)()
    return sent


# Schemathesis calls functions that its own dependencies have deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_requests_of_the_document(live: Live) -> None:
    assert fuzz(live, 5) >= 10
    assert live.is_idle()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_thousand_requests_of_the_document(live: Live) -> None:
    assert fuzz(live, 800) >= 2000
    assert live.is_idle()


def send_bytes(live: Live, data: bytes) -> bytes:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


def test_bodies_of_random_bytes(live: Live) -> None:
    """As multipart forms, as files in them, and as no HTTP at all."""
    generator = random.Random(0)
    url = f"{live.url}/v1/audio/transcriptions"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for size in (0, 1, 100, 10_000):
        data = generator.randbytes(size)
        assert httpx.post(url, content=data, headers=headers).status_code == 400
        assert live.post(data).status_code == 400
        send_bytes(live, data)
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert live.is_idle()


def silence(seconds: float) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(2 * round(16000 * seconds)))
    return file.getvalue()


@pytest.mark.slow
def test_a_thousand_connections(live: Live, clip: bytes) -> None:
    """Idle ones, and ones that stop in mid-request, cost the others nothing."""
    host, port = live.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for number in range(1000):
            connection = socket.create_connection((host, int(port)), timeout=30)
            stack.enter_context(connection)
            if number % 2:
                connection.sendall(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n")
        assert live.post(clip).status_code == 200
    assert live.is_idle()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
def test_memory_stays_flat(live: Live, clip: bytes) -> None:
    """After 2,000 requests as after 200: refused, silent, and one in fifty with speech."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    quiet = silence(2)

    def request(number: int) -> int:
        if number % 50 == 0:
            return live.post(clip).status_code
        if number % 3 == 0:
            return live.post(b"noise").status_code
        return live.post(quiet).status_code

    with ThreadPoolExecutor(4) as clients:
        assert set(clients.map(request, range(200))) == {200, 400}
        before = resident()
        assert set(clients.map(request, range(1800))) == {200, 400}
    assert resident() < 1.02 * before
    assert live.is_idle()
