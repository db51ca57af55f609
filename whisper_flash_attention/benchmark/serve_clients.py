"""A client process of the server's benchmark: requests over kept connections, or live streams.

    python -m whisper_flash_attention.benchmark.serve_clients < order

It reads a line of JSON from standard input, opens its connections, prints "ready", reads a line
with the time at which to begin (of `time.monotonic`, which processes share), and prints what it
measured as JSON. It imports the standard library alone, and websockets for streams.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

BOUNDARY = "whisper-flash-boundary"
ROUTE = "/v1/audio/transcriptions"
REQUEST_SECONDS = 300.0
# Of sound, in a message of a stream.
CHUNK_SECONDS = 0.1
# After the last sound of a stream, for the text of the last utterance.
PATIENCE_SECONDS = 10.0


class Requests:
    """Requests of some connections, each with one at a time.

    Args:
        host, port: of the server.
        bodies: files with the bodies of requests, which take turns.
        clients: connections.
        first, step: numbers of the requests of this process: first, first + step ...
        requests: of all processes.
        rate: requests per second of all processes; None sends as fast as they are answered.
        seconds: after which no request is sent any more, but for the first `least`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        bodies: list[str],
        clients: int,
        first: int,
        step: int,
        requests: int,
        rate: float | None,
        seconds: float,
        least: int,
    ) -> None:
        self._bodies = [Path(each).read_bytes() for each in bodies]
        self._numbers = count(first, step)
        self._requests, self._rate = requests, rate
        self._seconds, self._least = seconds, least
        self._lock = threading.Lock()
        self._times: list[tuple[float, float]] = []
        self._failures: list[str] = []
        self._connections = [
            http.client.HTTPConnection(host, port, timeout=REQUEST_SECONDS) for _ in range(clients)
        ]
        for connection in self._connections:
            connection.connect()

    def run(self, begin: float) -> dict[str, Any]:
        """Send them all; seconds from `begin` at which each was due and was answered."""
        threads = [
            threading.Thread(target=self._client, args=(each, begin)) for each in self._connections
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"times": self._times, "failures": self._failures}

    def _client(self, connection: http.client.HTTPConnection, begin: float) -> None:
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        while True:
            with self._lock:
                number = next(self._numbers)
            due = number / self._rate if self._rate else max(0.0, time.monotonic() - begin)
            is_late = due > self._seconds and number >= self._least
            if number >= self._requests or is_late:
                break
            time.sleep(max(0.0, begin + due - time.monotonic()))
            reason = ""
            try:
                body = self._bodies[number % len(self._bodies)]
                connection.request("POST", ROUTE, body, kind)
                response = connection.getresponse()
                text = response.read()
                if response.status != 200 or "text" not in json.loads(text):
                    reason = f"{response.status}: {text[:300]!r}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                connection.close()
                reason = repr(error)
            ended = time.monotonic() - begin
            with self._lock:
                if reason:
                    self._failures.append(reason)
                else:
                    self._times.append((due, ended))
        connection.close()


class Streams:
    """Live streams: the same sound, sent as fast as it would be spoken.

    Args:
        url: of the websocket.
        sound: file of 16-bit samples.
        rate: of the samples.
        padding_ms: of the sound that the server puts before speech.
        delays: seconds after which each stream begins.
    """

    def __init__(
        self, url: str, sound: str, rate: int, padding_ms: int, delays: list[float]
    ) -> None:
        self._url, self._rate, self._padding = url, rate, padding_ms / 1000
        self._sound = Path(sound).read_bytes()
        self._delays = delays
        self._utterances: list[dict[str, float]] = []
        self._failures: list[str] = []

    def run(self, begin: float) -> dict[str, Any]:
        """Stream them all; of each utterance, seconds to its first text and to its last."""
        asyncio.run(self._run(begin))
        return {"utterances": self._utterances, "failures": self._failures}

    async def _run(self, begin: float) -> None:
        await asyncio.gather(*(self._stream(begin + delay) for delay in self._delays))

    async def _stream(self, begin: float) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        size = 2 * round(CHUNK_SECONDS * self._rate)
        chunks = [self._sound[at : at + size] for at in range(0, len(self._sound), size)]
        sent: list[float] = []
        items: dict[str, dict[str, float]] = {}
        try:
            async with connect(self._url, max_size=None) as socket:
                form = {"type": "audio/pcm", "rate": self._rate}
                sound = {"format": form, "transcription": {"language": "en"}}
                update = {"type": "transcription", "audio": {"input": sound}}
                await socket.send(json.dumps({"type": "session.update", "session": update}))
                reader = asyncio.create_task(self._read(socket, sent, items))
                for index, chunk in enumerate(chunks):
                    due = begin + (index + 1) * CHUNK_SECONDS
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    audio = base64.b64encode(chunk).decode()
                    sent.append(time.monotonic())
                    await socket.send(
                        json.dumps({"type": "input_audio_buffer.append", "audio": audio})
                    )
                # The sound ends in silence, so that the last utterance is committed.
                deadline = time.monotonic() + PATIENCE_SECONDS
                while not all("last" in each for each in items.values()):
                    if reader.done() or time.monotonic() > deadline:
                        self._failures.append("an utterance has no text")
                        break
                    await asyncio.sleep(CHUNK_SECONDS)
                reader.cancel()
        except (OSError, WebSocketException) as error:
            self._failures.append(repr(error))
        self._utterances += [each for each in items.values() if "last" in each]

    async def _read(self, socket: Any, sent: list[float], items: dict[str, Any]) -> None:
        """Take events: of each item when it began, stopped, and had its first and last text."""
        async for text in socket:
            now, event = time.monotonic(), json.loads(text)
            kind = str(event["type"])
            if kind == "error" or kind.endswith("transcription.failed"):
                self._failures.append(str(event["error"]["message"]))
                continue
            if kind.endswith("speech_started"):
                began = event["audio_start_ms"] / 1000 + self._padding
                items[event["item_id"]] = {"began": began}
            if (item := items.get(event.get("item_id", ""))) is None:
                continue
            if kind.endswith("speech_stopped"):
                item["stopped"] = event["audio_end_ms"] / 1000
                item["seconds"] = item["stopped"] - item["began"]
            elif kind.endswith("transcription.delta") and "first" not in item:
                item["first"] = now - _spoken_at(item["began"], sent)
            elif kind.endswith("transcription.completed"):
                item["last"] = now - _spoken_at(item["stopped"], sent)


def _spoken_at(seconds: float, sent: list[float]) -> float:
    """When this second of the sound was spoken; its chunk is sent when that is complete."""
    index = int(seconds / CHUNK_SECONDS)
    late = (index + 1) * CHUNK_SECONDS - seconds
    return sent[min(index, len(sent) - 1)] - late


KINDS = {"requests": Requests, "streams": Streams}


def main() -> None:
    """Run the order on standard input."""
    order = json.loads(sys.stdin.readline())
    work = KINDS[order.pop("kind")](**order)
    print("ready", flush=True)
    begin = float(sys.stdin.readline())
    print(json.dumps(work.run(begin)), flush=True)


if __name__ == "__main__":
    main()
