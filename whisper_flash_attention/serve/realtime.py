"""`/v1/realtime?intent=transcription`: sound in over a websocket, text out while it is spoken.

The events are those of OpenAI's realtime transcription sessions. An utterance (what is in the
buffer when speech stops or the client commits) is an item. While it grows it is transcribed
greedily, twice within its first second and then once per second of sound, and words on which two
passes agree are sent; the final text is that of a transcription of the whole utterance.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

from whisper_flash_attention.audio.samples import Samples
from whisper_flash_attention.errors import WhisperFlashError
from whisper_flash_attention.languages import language_or_auto
from whisper_flash_attention.options import VadOptions
from whisper_flash_attention.serve.fields import RequestError, invalid_value
from whisper_flash_attention.serve.jobs import Job
from whisper_flash_attention.serve.live import LiveJob, to_request_error
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.serve.turns import LiveFormat, SpeechDetector, StableText
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.arguments import TranscribeArguments
from whisper_flash_attention.transcribe.results import Transcription

if TYPE_CHECKING:
    from whisper_flash_attention.serve.app import Server

RATES = {"audio/pcm": (16_000, 24_000), "audio/pcmu": (8_000,), "audio/pcma": (8_000,)}
# Sound between two passes, and speech before the first ones: two must agree on the first words.
PASS_SECONDS = 1.0
FIRST_PASSES = (0.35, 0.7)
# Speech is committed after this long; sound without turn detection has no passes beyond it.
UTTERANCE_SECONDS = 30.0
# Of a buffer that nobody commits.
BUFFER_SECONDS = 600.0
# Names of a browser's protocols: it cannot send a header.
PROTOCOL, KEY_PROTOCOL = "realtime", "openai-insecure-api-key."
ITEM = "conversation.item.input_audio_transcription"


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a session transcribes, and how.

    Args:
        model: as it was named; None is the server's first.
        language: code of the language spoken; None detects it.
        prompt: context of every utterance.
        form: of the sound.
        turns: of the detector of speech; None leaves commits to the client.
        padding_ms: sound before speech that belongs to the utterance.
    """

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    form: LiveFormat = field(default_factory=LiveFormat)
    turns: VadOptions | None = field(
        default_factory=lambda: VadOptions(min_silence_duration_ms=500)
    )
    padding_ms: int = 300

    @property
    def arguments(self) -> TranscribeArguments:
        return TranscribeArguments(language=self.language, initial_prompt=self.prompt)

    def to_dict(self) -> dict[str, Any]:
        """The session as clients see it."""
        turns: dict[str, Any] | None = None
        if self.turns is not None:
            turns = {
                "type": "server_vad",
                "threshold": self.turns.threshold,
                "prefix_padding_ms": self.padding_ms,
                "silence_duration_ms": self.turns.min_silence_duration_ms,
            }
        return {
            "type": "transcription",
            "audio": {
                "input": {
                    "format": {"type": self.form.kind, "rate": self.form.rate},
                    "transcription": {
                        "model": self.model,
                        "language": self.language,
                        "prompt": self.prompt,
                    },
                    "turn_detection": turns,
                    "noise_reduction": None,
                }
            },
        }


def _known(given: Any, where: str, *names: str) -> Mapping[str, Any]:
    """An object whose fields are among `names`. Raises `RequestError`."""
    if not isinstance(given, Mapping):
        raise invalid_value(where, f"{where} must be an object")
    for name in given:
        if name not in names:
            raise invalid_value(
                where, f"{where} has no {printable(str(name)[:80])!r}: {', '.join(names)}"
            )
    return given


def parse_settings(given: Any, before: Settings) -> Settings:
    """The settings of a `session.update`; what it leaves out stays. Raises `RequestError`."""
    session = _known(given, "session", "type", "audio", "include", "id", "object")
    if session.get("type") != "transcription":
        raise invalid_value(
            "session.type", "session.type must be transcription: nothing else is here"
        )
    if session.get("include"):
        raise invalid_value("session.include", "include is not supported in realtime sessions")
    names = ("format", "transcription", "turn_detection", "noise_reduction")
    where = "session.audio.input"
    audio = _known(session.get("audio") or {}, "session.audio", "input")
    sound = _known(audio.get("input") or {}, where, *names)
    if sound.get("noise_reduction") is not None:
        raise invalid_value(
            f"{where}.noise_reduction", "noise reduction is not supported: leave it out"
        )
    spoken = _known(
        sound.get("transcription") or {}, f"{where}.transcription", "model", "language", "prompt"
    )
    turns, padding = before.turns, before.padding_ms
    if "turn_detection" in sound:
        turns, padding = _parse_turns(sound["turn_detection"], f"{where}.turn_detection")
    language = spoken.get("language", before.language)
    return Settings(
        model=spoken.get("model", before.model),
        language=language_or_auto(language) if language else None,
        prompt=spoken.get("prompt", before.prompt),
        form=_parse_format(sound.get("format"), before.form, f"{where}.format"),
        turns=turns,
        padding_ms=padding,
    )


def _parse_format(given: Any, before: LiveFormat, where: str) -> LiveFormat:
    if given is None:
        return before
    found = _known(given, where, "type", "rate")
    kind = found.get("type", "audio/pcm")
    if kind not in RATES:
        raise invalid_value(where, f"{where}.type must be one of {', '.join(RATES)}")
    rate = found.get("rate") or RATES[kind][-1]
    if rate not in RATES[kind]:
        rates = " or ".join(map(str, RATES[kind]))
        raise invalid_value(where, f"{where}.rate of {kind} must be {rates}")
    return LiveFormat(kind, rate)


def _parse_turns(given: Any, where: str) -> tuple[VadOptions | None, int]:
    if given is None:
        return None, 0
    names = ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")
    found = _known(given, where, *names)
    if found.get("type") != "server_vad":
        raise invalid_value(where, f"{where}.type must be server_vad, or {where} null")
    padding = found.get("prefix_padding_ms", 300)
    if not isinstance(padding, int) or not 0 <= padding <= 5000:
        raise invalid_value(where, f"{where}.prefix_padding_ms must be 0 to 5000")
    turns = VadOptions(
        threshold=found.get("threshold", 0.5),
        min_silence_duration_ms=found.get("silence_duration_ms", 500),
    )
    return turns, padding


class Utterance:
    """An item: the sound of one turn, and its text so far."""

    def __init__(self, previous: Utterance | None) -> None:
        self.item_id = new_id("item")
        self.previous_id = previous.item_id if previous else None
        self.stable = StableText()
        self.passes = 0
        self.passed_seconds = 0.0
        self.work: asyncio.Task[None] | None = None


class Session:
    """One websocket.

    Args:
        socket: not accepted yet.
        server: whose models transcribe.
    """

    def __init__(self, socket: WebSocket, server: Server) -> None:
        self._socket = socket
        self._server = server
        self._settings = Settings()
        self._buffer = np.zeros(0, np.float32)
        # Samples of the session before the buffer.
        self._dropped = 0
        self._rest = b""
        self._detector: SpeechDetector | None = None
        self._utterance = Utterance(None)
        self._finals: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve the socket to its end."""
        offered = self._socket.scope.get("subprotocols", [])
        try:
            self._check(offered)
        except RequestError as error:
            await self._socket.send_denial_response(JSONResponse(error.body(), error.status))
            return
        await self._socket.accept(PROTOCOL if PROTOCOL in offered else None)
        self._server.metrics.sessions.inc()
        try:
            await self._send("session.created", session=self._settings.to_dict())
            while True:
                await self._receive(await self._socket.receive_text())
        except (WebSocketDisconnect, KeyError):  # KeyError: a message of bytes
            pass
        finally:
            self._server.metrics.sessions.dec()
            tasks = [each for each in (self._utterance.work, *self._finals) if each is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self, offered: list[str]) -> None:
        """Check key, address and model before the socket is accepted."""
        headers = dict(self._socket.headers)
        for name in offered:
            if name.startswith(KEY_PROTOCOL):
                headers["authorization"] = f"Bearer {name.removeprefix(KEY_PROTOCOL)}"
        self._server.check_key(headers)
        query = dict(self._socket.query_params)
        for name in query:
            if name not in ("intent", "model"):
                raise RequestError(400, f"there is no parameter {printable(name[:80])!r}")
        if query.get("intent", "transcription") != "transcription":
            raise invalid_value("intent", "intent must be transcription: nothing else is here")
        self._settings = Settings(model=query.get("model"))
        self._scheduler()

    def _scheduler(self) -> Scheduler:
        return self._server.scheduler(self._settings.model)

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": new_id("event"), **fields}
        with suppress(WebSocketDisconnect, RuntimeError):  # the client is gone
            await self._socket.send_text(json.dumps(event, ensure_ascii=False))

    async def _receive(self, text: str) -> None:
        """Take one event of the client; an error is sent back, and the session goes on."""
        event: Any = None
        try:
            try:
                event = json.loads(text)
            except ValueError as error:
                raise RequestError(400, "an event must be a JSON object") from error
            if not isinstance(event, dict):
                raise RequestError(400, "an event must be a JSON object")
            await self._take(event)
        except WhisperFlashError as error:
            shown = to_request_error(error).body()["error"]
            if isinstance(event, dict):
                shown["event_id"] = event.get("event_id")
            await self._send("error", error=shown)

    async def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "session.update":
            await self._update(event.get("session"))
        elif kind == "input_audio_buffer.append":
            await self._append(event.get("audio"))
        elif kind == "input_audio_buffer.commit":
            if not self._buffer.size:
                raise RequestError(400, "the buffer is empty", code="input_audio_buffer_empty")
            await self._commit(self._buffer.size)
        elif kind == "input_audio_buffer.clear":
            self._drop(self._buffer.size)
            self._reset_turn()
            await self._send("input_audio_buffer.cleared")
        else:
            raise invalid_value("type", f"there is no event {printable(str(kind)[:80])!r}")

    async def _update(self, given: Any) -> None:
        before, self._settings = self._settings, parse_settings(given, self._settings)
        try:
            self._scheduler()
            if before.form != self._settings.form and (self._buffer.size or self._rest):
                raise invalid_value(
                    "session.audio.input.format", "the buffer holds sound: clear it first"
                )
            if self._settings.turns is not None:
                self._detector = await asyncio.to_thread(
                    SpeechDetector, self._settings.form.rate, self._settings.turns
                )
            else:
                self._detector = None
        except WhisperFlashError:
            self._settings = before
            raise
        await self._send("session.updated", session=self._settings.to_dict())

    async def _append(self, audio: Any) -> None:
        form = self._settings.form
        try:
            data = self._rest + base64.b64decode(audio, validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise invalid_value("audio", "audio must be base64") from error
        whole = len(data) // form.sample_bytes * form.sample_bytes
        self._rest = data[whole:]
        samples = form.samples(data[:whole])
        if (self._buffer.size + samples.size) / form.rate > BUFFER_SECONDS:
            raise invalid_value(
                "audio", f"the buffer holds {BUFFER_SECONDS:g} s: commit or clear it"
            )
        turns = self._settings.turns
        if turns is not None and self._detector is None:
            self._detector = await asyncio.to_thread(SpeechDetector, form.rate, turns)
        self._buffer = np.concatenate([self._buffer, samples])
        if self._detector is not None:
            for is_start, seconds in await self._changes(self._detector, samples):
                await (self._begin_turn if is_start else self._end_turn)(seconds)
            if not self._detector.in_speech:
                keep = round(self._settings.padding_ms / 1000 * form.rate)
                self._drop(max(0, self._buffer.size - keep))
                return
            if self._buffer.size / form.rate >= UTTERANCE_SECONDS:
                await self._commit(self._buffer.size)
                return
        self._begin_pass()

    async def _changes(
        self, detector: SpeechDetector, samples: Samples
    ) -> list[tuple[bool, float]]:
        """Where speech starts and stops in the next samples."""
        block = detector.take(samples)
        if not block.size:
            return []
        return detector.changes(await self._server.voices.probabilities(detector.voice, block))

    def _drop(self, count: int) -> None:
        self._buffer = self._buffer[count:]
        self._dropped += count

    async def _begin_turn(self, seconds: float) -> None:
        """Speech started at this second of the session's sound."""
        rate = self._settings.form.rate
        begin = max(0, round((seconds - self._settings.padding_ms / 1000) * rate) - self._dropped)
        self._drop(min(begin, self._buffer.size))
        await self._send(
            "input_audio_buffer.speech_started",
            audio_start_ms=round(1000 * self._dropped / rate),
            item_id=self._utterance.item_id,
        )

    async def _end_turn(self, seconds: float) -> None:
        rate = self._settings.form.rate
        await self._send(
            "input_audio_buffer.speech_stopped",
            audio_end_ms=round(1000 * seconds),
            item_id=self._utterance.item_id,
        )
        await self._commit(min(self._buffer.size, round(seconds * rate) - self._dropped))

    async def _commit(self, count: int) -> None:
        """Make the first samples of the buffer an item, and have it transcribed."""
        utterance, samples = self._utterance, self._buffer[:count]
        self._drop(count)
        self._utterance = Utterance(utterance)
        if utterance.work is not None:
            utterance.work.cancel()
        await self._send(
            "input_audio_buffer.committed",
            item_id=utterance.item_id,
            previous_item_id=utterance.previous_id,
        )
        task = asyncio.create_task(self._finish(utterance, samples))
        self._finals.add(task)
        task.add_done_callback(self._finals.discard)

    def _reset_turn(self) -> None:
        if self._utterance.work is not None:
            self._utterance.work.cancel()
        self._utterance = Utterance(None)
        self._detector = None

    def _begin_pass(self) -> None:
        """Transcribe the utterance so far if enough of it is new, and no pass is running."""
        utterance, seconds = self._utterance, self._buffer.size / self._settings.form.rate
        is_running = utterance.work is not None and not utterance.work.done()
        if is_running or seconds > UTTERANCE_SECONDS:
            return
        due = utterance.passed_seconds + PASS_SECONDS
        if utterance.passes < len(FIRST_PASSES):
            due = FIRST_PASSES[utterance.passes]
            if self._detector is not None:  # which keeps some sound before speech
                due += self._settings.padding_ms / 1000
        if seconds >= due:
            utterance.passes += 1
            utterance.passed_seconds = seconds
            utterance.work = asyncio.create_task(self._pass(utterance, self._buffer))

    async def _pass(self, utterance: Utterance, samples: Samples) -> None:
        with suppress(WhisperFlashError):  # the final pass reports what is wrong
            found = await self._transcribe(samples, is_final=False)
            await self._send_delta(utterance, utterance.stable.add(found.text))

    async def _finish(self, utterance: Utterance, samples: Samples) -> None:
        try:
            found = await self._transcribe(samples, is_final=True)
        except Exception as error:  # of this item; the session goes on
            shown = to_request_error(error).body()["error"]
            await self._send(
                f"{ITEM}.failed", item_id=utterance.item_id, content_index=0, error=shown
            )
            return
        await self._send_delta(utterance, utterance.stable.finish(found.text))
        self._server.metrics.audio_seconds.labels(self._scheduler().name).inc(found.seconds)
        await self._send(
            f"{ITEM}.completed",
            item_id=utterance.item_id,
            content_index=0,
            transcript=found.text,
            usage={"type": "duration", "seconds": found.seconds},
        )

    async def _send_delta(self, utterance: Utterance, text: str) -> None:
        if text:
            await self._send(
                f"{ITEM}.delta", item_id=utterance.item_id, content_index=0, delta=text
            )

    async def _transcribe(self, samples: Samples, *, is_final: bool) -> Transcription:
        arguments = self._settings.arguments
        if not is_final:
            arguments["temperature"] = 0.0
        live = LiveJob(self._scheduler())
        live.submit(Job((samples, self._settings.form.rate), arguments, on_end=live.put))
        try:
            async with asyncio.timeout(self._server.options.timeout):
                found = await live.next()
            assert isinstance(found, Transcription)
            return found
        finally:
            live.cancel()
