"""Load on a server: clients in this process, the server in its own, on the loopback.

Clients either send as fast as they are answered, or at a fixed rate (open loop, times counted from
when a request was due). Every run is bounded in requests and in time.
"""

from __future__ import annotations

import http.client
import io
import json
import statistics
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE
from whisper_flash_attention.errors import BenchmarkError
from whisper_flash_attention.options import ModelOptions

BOUNDARY = "whisper-flash-boundary"
REQUEST_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ServeCase:
    """What is measured.

    Args:
        model: of the server.
        clients: connections, each with one request at a time.
        requests: of the run, after one per client to warm up.
        seconds: bound of the run.
        clip_seconds: length of the recordings.
        rate: requests per second; None sends as fast as they are answered.
        new_tokens: about which every window has; None leaves that to the model.
        slots: of the server; None is what it chooses.
    """

    model: ModelOptions
    clients: int = 8
    requests: int = 64
    seconds: float = 120.0
    clip_seconds: float = 5.0
    rate: float | None = None
    new_tokens: int | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        for name in ("clients", "requests", "seconds", "clip_seconds"):
            if getattr(self, name) <= 0:
                raise BenchmarkError(f"{name} is {getattr(self, name)}: give more than 0")
        if self.rate is not None and self.rate <= 0:
            raise BenchmarkError(f"rate is {self.rate}: give more than 0 requests per second")


@dataclass(frozen=True, slots=True)
class ServeRow:
    """What was measured; times in seconds."""

    clients: int
    requests: int
    failures: int
    seconds: float
    requests_per_second: float
    audio_per_second: float
    p50: float
    p95: float
    p99: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def clip(seconds: float) -> bytes:
    """A wav file of this length, of the bundled recordings, which repeat if it is longer."""
    import numpy as np

    speech = np.concatenate([load_audio(each.path) for each in bundled_recordings()])
    samples = np.resize(speech, round(seconds * SAMPLING_RATE))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def body_of(recording: bytes, new_tokens: int | None) -> bytes:
    """The form of a request."""
    fields = {"language": "en"}
    if new_tokens is not None:
        # A token apart, so that windows share slots.
        fields |= {"min_new_tokens": str(new_tokens - 1), "max_new_tokens": str(new_tokens)}
        fields |= {"temperature[]": "0"}
    head = "".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    head += (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="clip.wav"\r\n\r\n'
    )
    return head.encode() + recording + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextmanager
def running_server(case: ServeCase) -> Iterator[str]:
    """Start a server in a process of its own; yield its URL when it is ready.

    Raises:
        BenchmarkError: it cannot be started.
    """
    model = case.model
    command = [sys.executable, "-m", "whisper_flash_attention", "serve", "--port", "0"]
    command += ["--model", model.source, "--device", model.device, "--dtype", model.compute_type]
    command += ["--max-requests", str(2 * case.clients)]
    if case.slots is not None:
        command += ["--slots", str(case.slots)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        printed: list[str] = []
        try:
            for line in process.stderr:
                printed.append(line.rstrip())
                if line.startswith("ready after"):
                    break
            else:
                raise BenchmarkError(f"the server did not start: {' '.join(printed)}")
            yield printed[0].partition(": loading")[0]
        finally:
            process.terminate()
            process.wait(60)


def measure_server(url: str, case: ServeCase) -> ServeRow:
    """Send a case's requests to a server.

    Raises:
        BenchmarkError: no request succeeded.
    """
    body = body_of(clip(case.clip_seconds), case.new_tokens)
    _run(url, body, case, case.clients, rate=None)
    seconds, times, failures = _run(url, body, case, case.requests, case.rate)
    if not times:
        raise BenchmarkError(f"no request succeeded at {url}: its log has the reason")
    points = _percentiles(times)
    return ServeRow(
        clients=case.clients,
        requests=len(times),
        failures=failures,
        seconds=seconds,
        requests_per_second=len(times) / seconds,
        audio_per_second=case.clip_seconds * len(times) / seconds,
        p50=points[49],
        p95=points[94],
        p99=points[98],
    )


def _percentiles(times: Sequence[float]) -> list[float]:
    if len(times) == 1:
        return [times[0]] * 99
    return statistics.quantiles(times, n=100, method="inclusive")


def _run(
    url: str, body: bytes, case: ServeCase, requests: int, rate: float | None
) -> tuple[float, list[float], int]:
    """Seconds of the run, of every request that succeeded, and how many failed."""
    address = urlsplit(url)
    numbers, lock = count(), threading.Lock()
    times: list[float] = []
    failures = 0
    began = time.perf_counter()

    def client() -> None:
        nonlocal failures
        connection = http.client.HTTPConnection(
            str(address.hostname), address.port, timeout=REQUEST_SECONDS
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        while time.perf_counter() - began < case.seconds:
            with lock:
                number = next(numbers)
            if number >= requests:
                break
            due = began + number / rate if rate else time.perf_counter()
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                connection.request("POST", "/v1/audio/transcriptions", body, kind)
                response = connection.getresponse()
                text = response.read()
                is_good = response.status == 200 and "text" in json.loads(text)
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                is_good = False
            with lock:
                if is_good:
                    times.append(time.perf_counter() - due)
                else:
                    failures += 1
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(min(case.clients, requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, times, failures
