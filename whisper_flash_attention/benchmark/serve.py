"""Load on a server: its clients and the server are processes of their own, on the loopback.

Clients either send as fast as they are answered, or at a fixed rate (open loop, times counted from
when a request was due), or stream sound as it is spoken. Every run is bounded in requests and in
time. Throughput counts from when as many requests were answered as there are clients to when the
last was sent: all of them are busy then. `serve_random` starts a server with random weights.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from whisper_flash_attention import validation as check
from whisper_flash_attention.audio.audio_source import load_audio
from whisper_flash_attention.audio.bundled_clips import bundled_recordings
from whisper_flash_attention.audio.samples import SAMPLING_RATE, Samples
from whisper_flash_attention.benchmark.serve_clients import BOUNDARY
from whisper_flash_attention.errors import BenchmarkError

if TYPE_CHECKING:
    from whisper_flash_attention.transcribe import Transcriber

CLIENTS = "whisper_flash_attention.benchmark.serve_clients"
RANDOM = "whisper_flash_attention.benchmark.serve_random"
CONTAINERS = ("wav", "flac")
# Different recordings of a run.
BODIES = 8
# Client processes, and the connections that justify one more.
MOST_PROCESSES, CLIENTS_PER_PROCESS = 8, 32
# Before a run begins, for the word to reach all processes.
LEAD_SECONDS = 0.2
START_SECONDS, RUN_SECONDS = 300.0, 600.0
# Requests of each client before a run, which fill caches.
WARM_UP = 2
# Of a run that is as fast as it is answered, whatever its seconds: fewer are not counted.
LEAST_PER_CLIENT = 4
# Windows of 30 s that are decoded in memory have this many tokens, as those over HTTP.
LONG_SECONDS, LONG_TOKENS = 30.0, 100
# Of a live stream: silence before and after speech, sampling rate, and what comes before speech.
STREAM_SILENCE, STREAM_RATE, STREAM_PADDING_MS = 1.0, 24_000, 300
# An utterance of less speech may end before its first text.
LEAST_SPEECH = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a run.

    Args:
        clients: connections, each with one request at a time.
        requests: of the run, at most.
        seconds: after which no request is sent any more, once each client has sent some.
        clip_seconds: length of the recordings.
        container: one of `CONTAINERS`.
        rate: requests per second; None sends as fast as they are answered.
        new_tokens: about which every window has; None leaves that to the model.
    """

    clients: int = 8
    requests: int = 64
    seconds: float = 120.0
    clip_seconds: float = 5.0
    container: str = "flac"
    rate: float | None = None
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("clients", "requests", "seconds", "clip_seconds", "rate"):
            value = getattr(self, name)
            check.optional(check.number, name, value, "more than 0", above=0)
        check.one_of("container", self.container, CONTAINERS)


@dataclass(frozen=True, slots=True)
class LoadRow:
    """What a run measured; times in seconds."""

    requests: int
    failures: int
    reason: str
    seconds: float
    requests_per_second: float
    audio_per_second: float
    p50: float
    p95: float
    p99: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BenchmarkedServer:
    """The server that is measured.

    Args:
        model: a checkpoint, or the size of one whose weights are random.
        device, dtype: where and how it runs.
        is_random: whether weights are random: every window then has `new_tokens` tokens.
        new_tokens: of a window with random weights.
        slots: None is what the server chooses.
        max_requests: of the server.
    """

    model: str
    device: str
    dtype: str
    is_random: bool = False
    new_tokens: int = 25
    slots: int | None = None
    max_requests: int = 512

    @property
    def command(self) -> list[str]:
        """The command line that starts it on a free port."""
        python = [sys.executable, "-m"]
        if self.is_random:
            options = {"port": 0, "slots": self.slots, "max_requests": self.max_requests}
            given = (self.model, str(self.new_tokens), self.device, self.dtype)
            return [*python, RANDOM, *given, json.dumps(options)]
        command = [*python, "whisper_flash_attention", "serve", "--port", "0"]
        command += ["--model", self.model, "--device", self.device, "--compute-type", self.dtype]
        command += ["--max-requests", str(self.max_requests)]
        return command + (["--slots", str(self.slots)] if self.slots is not None else [])

    def transcriber(self) -> Transcriber:
        """The same model in this process."""
        if self.is_random:
            from whisper_flash_attention.benchmark.serve_random import reciting_transcriber

            return reciting_transcriber(self.model, self.new_tokens, self.device, self.dtype)
        from whisper_flash_attention.transcribe import Transcriber

        return Transcriber.from_pretrained(
            self.model, device=self.device, compute_type=self.dtype, quiet=True
        )


@contextmanager
def running(server: BenchmarkedServer) -> Iterator[str]:
    """Start a server in a process of its own; yield its URL when it is ready.

    Raises:
        BenchmarkError: it cannot be started.
    """
    with subprocess.Popen(server.command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # Taken to the end: a full pipe would stop the server.
        lines: SimpleQueue[str | None] = SimpleQueue()
        last: deque[str] = deque(maxlen=20)

        def read(file: Any = process.stderr) -> None:
            for line in file:
                last.append(line.rstrip())
                lines.put(last[-1])
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            url = ""
            while (line := lines.get(timeout=START_SECONDS)) is not None:
                url = line.partition(": loading")[0] if ": loading" in line else url
                if line.startswith("ready after"):
                    break
            else:
                raise BenchmarkError(f"the server did not start: {' '.join(last)}")
            yield url
        finally:
            process.terminate()
            process.wait(60)


def speech() -> Samples:
    """The bundled recordings, joined: mono at 16 kHz."""
    return np.concatenate([load_audio(each.path) for each in bundled_recordings()])


def clips(seconds: float) -> list[Samples]:
    """A few recordings of this length, each from another place of the bundled ones."""
    whole = speech()
    size = round(seconds * SAMPLING_RATE)
    starts = range(0, whole.size, whole.size // BODIES)
    return [np.resize(np.roll(whole, -start), size) for start in starts[:BODIES]]


def encoded(samples: Samples, container: str) -> bytes:
    """A wav or flac file of mono samples at 16 kHz."""
    import av

    codec = {"wav": "pcm_s16le", "flac": "flac"}[container]
    file = io.BytesIO()
    integers = (samples * 32767).astype(np.int16)
    with av.open(file, "w", format=container) as written:
        stream = written.add_stream(codec, rate=SAMPLING_RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        size = stream.codec_context.frame_size or 4096
        for start in range(0, integers.size, size):
            part = integers[None, start : start + size]
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.pts = SAMPLING_RATE, start
            written.mux(stream.encode(frame))
        written.mux(stream.encode(None))
    return file.getvalue()


def limits(new_tokens: int | None) -> dict[str, Any]:
    """Options that give windows about as many tokens: one apart, so that windows share slots."""
    if new_tokens is None:
        return {}
    return {"min_new_tokens": new_tokens - 1, "max_new_tokens": new_tokens, "temperature": [0.0]}


def body_of(recording: bytes, new_tokens: int | None) -> bytes:
    """The form of a request."""
    fields = {"language": "en"}
    for name, value in limits(new_tokens).items():
        fields |= {f"{name}[]": str(value[0])} if isinstance(value, list) else {name: str(value)}
    head = "".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    head += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="clip"'
    return f"{head}\r\n\r\n".encode() + recording + f"\r\n--{BOUNDARY}--\r\n".encode()


class ServerBenchmark:
    """Measures a running server.

    Args:
        server: which one it is.
        url: of its root.
        folder: for files of client processes.
    """

    def __init__(self, server: BenchmarkedServer, url: str, folder: Path) -> None:
        self._server, self._url, self._folder = server, url, folder
        self._files: dict[tuple[float, str, int | None], list[Path]] = {}

    @cached_property
    def transcriber(self) -> Transcriber:
        """The server's model in this process."""
        return self._server.transcriber()

    def measure_load(self, load: Load) -> dict[str, Any]:
        """A row of requests.

        Raises:
            BenchmarkError: no request succeeded.
        """
        self._requests(replace(load, requests=WARM_UP * load.clients, rate=None))
        row = load_row(load, *self._requests(load))
        return {"measure": "load" if load.rate is None else "rate", **asdict(load), **row.to_dict()}

    def measure_batch(self, load: Load) -> dict[str, Any]:
        """A row of clips of 30 s beside what the same windows take in memory, as a batch.

        Raises:
            BenchmarkError: no request succeeded.
        """
        is_limited = self._server.is_random or load.new_tokens is not None
        tokens = LONG_TOKENS if is_limited else None
        load = replace(load, clip_seconds=LONG_SECONDS, new_tokens=tokens)
        windows = (clips(LONG_SECONDS) * load.clients)[: load.clients]
        memory = {mode: self._in_memory(windows, mode, load) for mode in ("batched", "sequential")}
        row = self.measure_load(load) | {"measure": "batch"}
        best = max(memory.values())
        row |= {f"memory_{mode}_per_second": value for mode, value in memory.items()}
        return row | {"share_of_memory": row["requests_per_second"] / best}

    def _in_memory(self, windows: list[Samples], mode: str, load: Load) -> float:
        """Windows per second of a batch as large as there are clients."""
        arguments: dict[str, Any] = {"mode": mode, "language": "en", "batch_size": load.clients}
        arguments |= limits(load.new_tokens)
        if mode == "batched":
            # The batch that ends together is the fastest.
            arguments |= {"vad_filter": False, "min_new_tokens": load.new_tokens}
        work = windows * max(1, load.requests // len(windows) // 2)
        self.transcriber.transcribe_many(windows, **arguments)
        began = time.perf_counter()
        self.transcriber.transcribe_many(work, **arguments)
        return len(work) / (time.perf_counter() - began)

    def measure_alone(self, load: Load) -> dict[str, Any]:
        """A row of one request at a time beside the same call in Python, on the same files."""
        load = replace(load, clients=1, rate=None)
        files = [encoded(each, load.container) for each in clips(load.clip_seconds)]
        arguments: dict[str, Any] = {"language": "en", **limits(load.new_tokens)}

        def call(index: int) -> float:
            began = time.perf_counter()
            self.transcriber.transcribe(files[index % BODIES], **arguments)
            return time.perf_counter() - began

        for index in range(WARM_UP):
            call(index)
        times: list[float] = []
        bound = time.perf_counter() + load.seconds
        while len(times) < load.requests and time.perf_counter() < bound:
            times.append(call(len(times)))
        row = self.measure_load(load) | {"measure": "alone"}
        python = percentiles(times)
        return row | {
            "python_p50": python[49],
            "python_p95": python[94],
            "over_python": row["p50"] - python[49],
        }

    def measure_streams(self, streams: int, utterances: int) -> dict[str, Any]:
        """A row of live streams that speak at the same time, each `utterances` times.

        Raises:
            BenchmarkError: no utterance has a text.
        """
        sound = self._folder / "stream.pcm"
        sound.write_bytes(stream_sound(utterances))
        # They begin spread over a second, as speakers who do not wait for one another.
        delays = [index / streams for index in range(streams)]
        address = urlsplit(self._url)
        url = f"ws://{address.netloc}/v1/realtime?intent=transcription"
        order = {"kind": "streams", "url": url, "sound": str(sound), "rate": STREAM_RATE}
        order["padding_ms"] = STREAM_PADDING_MS
        found = run_clients(
            [{**order, "delays": part} for part in dealt(delays, processes_for(streams))]
        )
        spoken = [each for part in found for each in part["utterances"]]
        failures = [each for part in found for each in part["failures"]]
        if not spoken:
            raise BenchmarkError(f"no utterance has a text: {failures[:1]}")
        first = [each["first"] for each in spoken if each["seconds"] >= LEAST_SPEECH]
        early, late = percentiles(first), percentiles([each["last"] for each in spoken])
        return {
            "measure": "streams",
            "streams": streams,
            "utterances": len(spoken),
            "failures": len(failures),
            "reason": failures[0] if failures else "",
            "first_text_p50": early[49],
            "first_text_p95": early[94],
            "final_text_p50": late[49],
            "final_text_p95": late[94],
        }

    def _requests(self, load: Load) -> tuple[list[tuple[float, float]], list[str]]:
        """When requests were due and answered, and why others failed."""
        address = urlsplit(self._url)
        count = processes_for(load.clients)
        order = {
            "kind": "requests",
            "host": str(address.hostname),
            "port": address.port,
            "bodies": [str(path) for path in self._bodies(load)],
            "step": count,
            "requests": load.requests,
            "rate": load.rate,
            "seconds": load.seconds,
            "least": 0 if load.rate else LEAST_PER_CLIENT * load.clients,
        }
        shares = dealt(range(load.clients), count)
        found = run_clients(
            [{**order, "clients": len(part), "first": at} for at, part in enumerate(shares)]
        )
        times = [(due, end) for part in found for due, end in part["times"]]
        return times, [each for part in found for each in part["failures"]]

    def _bodies(self, load: Load) -> list[Path]:
        key = (load.clip_seconds, load.container, load.new_tokens)
        if key not in self._files:
            paths: list[Path] = []
            for clip in clips(load.clip_seconds):
                paths.append(self._folder / f"{len(self._files)}-{len(paths)}")
                paths[-1].write_bytes(body_of(encoded(clip, load.container), load.new_tokens))
            self._files[key] = paths
        return self._files[key]


def load_row(load: Load, times: Sequence[tuple[float, float]], failures: Sequence[str]) -> LoadRow:
    """What was measured while all clients were busy.

    Args:
        times: when each request was due and was answered, in seconds of the run.
        failures: reasons of the requests that failed.

    Raises:
        BenchmarkError: no request succeeded.
    """
    if not times:
        reason = failures[0] if failures else "none was sent"
        raise BenchmarkError(f"no request succeeded: {reason}")
    ends = sorted(end for _, end in times)
    begin, until = ends[min(load.clients, len(ends)) - 1], max(due for due, _ in times)
    if load.rate is not None or until <= begin:  # too few to leave any out
        begin, until = 0.0, ends[-1]
    counted = [(due, end) for due, end in times if begin < end <= until]
    seconds = until - begin
    points = percentiles([end - due for due, end in counted])
    return LoadRow(
        requests=len(counted),
        failures=len(failures),
        reason=failures[0] if failures else "",
        seconds=seconds,
        requests_per_second=len(counted) / seconds,
        audio_per_second=load.clip_seconds * len(counted) / seconds,
        p50=points[49],
        p95=points[94],
        p99=points[98],
    )


def percentiles(times: Sequence[float]) -> list[float]:
    """The 99 percentiles of some numbers; of none, they are not numbers."""
    if len(times) < 2:
        return [*times, float("nan")][:1] * 99
    return statistics.quantiles(times, n=100, method="inclusive")


def stream_sound(utterances: int) -> bytes:
    """16-bit samples of a few utterances with silence around each."""
    clip = speech()[: round(5.0 * SAMPLING_RATE)]
    places = np.arange(0, clip.size, SAMPLING_RATE / STREAM_RATE)
    spoken = np.interp(places, np.arange(clip.size), clip)
    silence = np.zeros(round(STREAM_SILENCE * STREAM_RATE))
    sound = np.concatenate([*[silence, spoken] * utterances, silence])
    return (sound * 32767).astype("<i2").tobytes()


def processes_for(clients: int) -> int:
    """Client processes: some connections each, and cores that the server leaves."""
    spare = max(1, (os.cpu_count() or 1) // 2)
    return min(spare, MOST_PROCESSES, -(-clients // CLIENTS_PER_PROCESS))


def dealt(items: Sequence[Any], count: int) -> list[list[Any]]:
    """Items by turns on `count` lists."""
    return [list(items[at::count]) for at in range(count)]


def run_clients(orders: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run a client process for each order, all from the same time on.

    Raises:
        BenchmarkError: one failed.
    """
    with ExitStack() as stack:
        processes = []
        for order in orders:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", CLIENTS],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            processes.append(process)
            _say(process, json.dumps(order))
        for process in processes:
            if _line(process) != "ready\n":
                raise BenchmarkError("a client of the benchmark did not start")
        begin = time.monotonic() + LEAD_SECONDS
        for process in processes:
            _say(process, str(begin))
        return [json.loads(_line(process) or "{}") for process in processes]


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose numbers have five digits."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in row.items()
    }
