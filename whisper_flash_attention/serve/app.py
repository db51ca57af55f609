"""The application: routes of OpenAI's audio API, limits, and what a client sees of errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from whisper_flash_attention._version import __version__
from whisper_flash_attention.audio.container import Shared
from whisper_flash_attention.options import ServeOptions
from whisper_flash_attention.serve.fields import (
    RequestError,
    SpeechRequest,
    form_schema,
    parse_fields,
    unknown_field,
)
from whisper_flash_attention.serve.jobs import Job
from whisper_flash_attention.serve.live import LiveJob, to_request_error
from whisper_flash_attention.serve.metrics import Metrics
from whisper_flash_attention.serve.realtime import Session
from whisper_flash_attention.serve.responses import (
    MEDIA_TYPES,
    ResponseBuilder,
    dumps,
    server_sent,
)
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.serve.turns import Voices
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe.results import Transcription

LOG = logging.getLogger(__name__)
MEGABYTE = 10**6
# Fields of a form, of which lists have one for each value; and bytes of a field.
MOST_FIELDS, MOST_FIELD_BYTES = 500, 2**20
# Longest delay in a `Retry-After` header.
MOST_RETRY_SECONDS = 60


class Server:
    """State of the application.

    Args:
        options: of the server.
        schedulers: by the names of their models; the first is the one that is meant if none is
            named.
    """

    def __init__(self, options: ServeOptions, schedulers: Mapping[str, Scheduler]) -> None:
        self.options = options
        self.schedulers = schedulers
        self.metrics = Metrics(schedulers)
        self.voices = Voices()
        self._created = int(time.time())
        self._in_progress = 0
        self._mean_seconds = 1.0

    def scheduler(self, name: str | None) -> Scheduler:
        """The scheduler of a model; without a name the first. Raises `RequestError` (404)."""
        if name is None:
            return next(iter(self.schedulers.values()))
        if name not in self.schedulers:
            raise RequestError(
                404,
                f"there is no model {printable(name[:80])!r} here; "
                f"there are: {', '.join(self.schedulers)}",
                param="model",
                code="model_not_found",
            )
        return self.schedulers[name]

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Raise `RequestError` (401) unless a request has the key that is needed."""
        key = self.options.api_key
        if key is None:
            return
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestError(
                401,
                "give the server's key in the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    @property
    def is_ready(self) -> bool:
        return next(iter(self.schedulers.values())).ready.is_set()

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/health`."""
        first = next(iter(self.schedulers.values()))
        status = "failed" if first.failure else "ok" if self.is_ready else "loading"
        loaded = [name for name, each in self.schedulers.items() if each.is_loaded]
        return (200 if self.is_ready else 503), {"status": status, "loaded": loaded}

    def models(self) -> list[dict[str, Any]]:
        """Rows of `/v1/models`."""
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "whisper-flash-attention",
            }
            for name in self.schedulers
        ]

    async def speech(self, request: Request, task: str) -> Response:
        """Transcribe or translate the recording of a request."""
        route = request.url.path
        began = time.monotonic()
        model, status = "", 500
        self.metrics.in_progress.inc()
        self._in_progress += 1
        streams = False
        try:
            async with asyncio.timeout(self.options.timeout):
                self.check_key(request.headers)
                self._check_room()
                items, upload = await self._read_form(request)
                try:
                    spoken = parse_fields(items, task)
                    scheduler = self.scheduler(spoken.model)
                except BaseException:
                    upload.file.close()
                    raise
                model = scheduler.name
                response = await self._respond(request, spoken, scheduler, upload, began)
            status = response.status_code
            streams = isinstance(response, StreamingResponse)
            return response
        except ClientDisconnect:
            status = 499
            raise
        except Exception as error:
            refusal = to_request_error(error)
            status = refusal.status
            return self.error_response(refusal)
        finally:
            if not streams:
                self._end(route, model, status, began)

    def _end(self, route: str, model: str, status: int, began: float) -> None:
        seconds = time.monotonic() - began
        self._in_progress -= 1
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        self.metrics.in_progress.dec()
        self.metrics.requests.labels(route, model, str(status)).inc()
        self.metrics.latency.labels(route).observe(seconds)

    def error_response(self, error: RequestError) -> Response:
        """The response that tells an error."""
        self.metrics.errors.labels(error.code or str(error.status)).inc()
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)

    def _check_room(self) -> None:
        if self._in_progress > self.options.max_requests:
            seconds = min(MOST_RETRY_SECONDS, max(1, math.ceil(self._mean_seconds)))
            raise RequestError(
                429,
                f"{self.options.max_requests} requests are in progress, the most that this server "
                f"takes; try again in {seconds} s",
                code="too_many_requests",
                retry_after=seconds,
            )

    async def _read_form(self, request: Request) -> tuple[list[tuple[str, str]], UploadFile]:
        """The fields of a form, and its file. Raises `RequestError`."""
        if request.query_params:
            raise unknown_field(next(iter(request.query_params)))
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise RequestError(
                400,
                f"the body is {printable(kind[:80]) or 'of no type'}; send multipart/form-data "
                "with the recording as the field file",
                code="invalid_content_type",
            )
        most = round(self.options.max_upload_mb * MEGABYTE)
        too_large = RequestError(
            413,
            f"the request is larger than {self.options.max_upload_mb:g} MB, the most that this "
            "server takes",
            param="file",
            code="request_too_large",
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large

        async def body() -> AsyncIterator[bytes]:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise too_large
                yield chunk

        parser = MultiPartParser(
            request.headers,
            body(),  # type: ignore[arg-type]  # an asynchronous iterator is enough
            max_files=1,
            max_fields=MOST_FIELDS,
            max_part_size=MOST_FIELD_BYTES,
        )
        parser.spool_max_size = max(1, round(self.options.memory_upload_mb * MEGABYTE))
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise RequestError(
                400, f"the form cannot be read: {error.message}", code="invalid_form"
            ) from error
        items: list[tuple[str, str]] = []
        upload: UploadFile | None = None
        wrong: RequestError | None = None
        for name, value in form.multi_items():
            if isinstance(value, str):
                items.append((name, value))
                continue
            upload = value
            if name != "file":
                wrong = unknown_field(name)
        if upload is None:
            wrong = RequestError(
                400, "the field file is missing: send the recording", param="file", code="no_file"
            )
        if wrong is not None:
            if upload is not None:
                upload.file.close()
            raise wrong
        assert upload is not None
        return items, upload

    async def _respond(
        self,
        request: Request,
        spoken: SpeechRequest,
        scheduler: Scheduler,
        upload: UploadFile,
        began: float,
    ) -> Response:
        live = LiveJob(scheduler)
        name = printable(upload.filename or "file")
        job = Job(
            Shared(upload.file, name),
            spoken.arguments,
            on_segments=live.put_segments,
            on_end=live.put,
            languages=spoken.languages,
            size=upload.size or 0,
            most_seconds=self.options.max_seconds,
            on_close=upload.file.close,
        )
        live.submit(job)
        builder = ResponseBuilder(spoken)
        watcher = asyncio.ensure_future(_disconnected(request))
        events = self._events(live, job, builder, spoken, began)
        try:
            if not spoken.stream:
                body = await _unless(watcher, _last(events))
                return Response(body, media_type=MEDIA_TYPES[spoken.response_format])
            # An error before the first window has a status of its own.
            first = await _unless(watcher, anext(events))
        except BaseException:
            live.cancel()
            raise
        finally:
            watcher.cancel()
        route = request.url.path
        return StreamingResponse(
            self._streamed(first, events, live, route, began),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _events(
        self,
        live: LiveJob,
        job: Job,
        builder: ResponseBuilder,
        spoken: SpeechRequest,
        began: float,
    ) -> AsyncIterator[str]:
        """Events of a stream as they come; of a request without one, the body."""
        is_first = True
        while True:
            event = await live.next()
            tokenizer = live.scheduler.tokenizer
            if isinstance(event, Transcription):
                self.metrics.audio_seconds.labels(live.scheduler.name).inc(event.seconds)
                if spoken.stream:
                    yield dumps(builder.done_event(event, job.recordings, tokenizer))
                    yield "[DONE]"
                else:
                    task = str(spoken.arguments["task"])
                    yield builder.body(event, job.recordings, tokenizer, task)
                return
            if is_first:
                self.metrics.first_segment.observe(time.monotonic() - began)
                is_first = False
            recording, segments = event
            if spoken.stream:
                for row in builder.events(recording, segments, tokenizer):
                    yield dumps(row)

    async def _streamed(
        self, first: str, events: AsyncIterator[str], live: LiveJob, route: str, began: float
    ) -> AsyncIterator[bytes]:
        status = 499
        try:
            yield server_sent(first)
            try:
                left = self.options.timeout - (time.monotonic() - began)
                async with asyncio.timeout(left):
                    async for event in events:
                        yield server_sent(event)
                status = 200
            except Exception as error:  # the status was sent: the error is an event
                refusal = to_request_error(error)
                status = refusal.status
                self.metrics.errors.labels(refusal.code or str(status)).inc()
                yield server_sent(refusal.body())
        finally:
            live.cancel()
            self._end(route, live.scheduler.name, status, began)


async def _last(events: AsyncIterator[str]) -> str:
    return [event async for event in events][-1]


async def _disconnected(request: Request) -> None:
    """Return once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(watcher: asyncio.Future[None], work: Any) -> Any:
    """Await work. Raises `ClientDisconnect` if the client goes before."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watcher, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()


def create_app(server: Server) -> FastAPI:
    """Return the application of a server, whose schedulers are started and closed with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for scheduler in server.schedulers.values():
            scheduler.start()
        yield
        for scheduler in server.schedulers.values():
            await asyncio.to_thread(scheduler.close)

    app = FastAPI(
        title="Whisper Flash Attention",
        version=__version__,
        description="OpenAI's audio API on Whisper.",
        lifespan=lifespan,
        redoc_url=None,
    )
    if server.options.cors_origin is not None:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=[server.options.cors_origin],
            allow_methods=["*"],
            allow_headers=["*"],
        )

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return server.error_response(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {printable(request.url.path)}: {error.detail}"
        response = server.error_response(RequestError(error.status_code, text))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)

    _add_routes(app, server)
    return app


ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    400: "A field or the recording is wrong.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    413: "The body or the recording is too large.",
    429: "Too many requests are in progress.",
    500: "The server failed.",
    503: "The model cannot be loaded, or the server is stopping.",
    504: "The request took too long.",
}


def _described(content: Mapping[str, Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route, for the OpenAPI document."""
    error = {"application/json": {"schema": ERROR_SCHEMA}}
    found: dict[int | str, dict[str, Any]] = {
        each: {"description": _REFUSALS[each], "content": error} for each in statuses
    }
    found[200] = {"description": "Success.", "content": dict(content)}
    return found


_JSON = {"application/json": {"schema": {"type": "object"}}}
_TEXT = {"schema": {"type": "string"}}
_SPEECH = {
    **_JSON,
    **{kind.partition(";")[0]: _TEXT for kind in MEDIA_TYPES.values() if "json" not in kind},
    "text/event-stream": _TEXT,
}


def _add_routes(app: FastAPI, server: Server) -> None:
    form = {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form_schema()}},
        }
    }
    spoken = _described(_SPEECH, *_REFUSALS)

    @app.post("/v1/audio/transcriptions", responses=spoken, openapi_extra=form)
    async def transcriptions(request: Request) -> Response:
        """Transcribe a recording."""
        return await server.speech(request, "transcribe")

    @app.post("/v1/audio/translations", responses=spoken, openapi_extra=form)
    async def translations(request: Request) -> Response:
        """Translate a recording into English."""
        return await server.speech(request, "translate")

    @app.get("/v1/models", responses=_described(_JSON, 401))
    async def models(request: Request) -> dict[str, Any]:
        """List the models of this server."""
        server.check_key(request.headers)
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}", responses=_described(_JSON, 401, 404))
    async def model(request: Request, name: str) -> dict[str, Any]:
        """Describe a model of this server."""
        server.check_key(request.headers)
        served = server.scheduler(name).name
        return next(row for row in server.models() if row["id"] == served)

    @app.get("/health", responses={**_described(_JSON), 503: {"description": "Not ready yet."}})
    async def health() -> Response:
        """Tell whether the first model is loaded and warm."""
        status, body = server.health()
        return JSONResponse(body, status)

    @app.get("/metrics", responses=_described({"text/plain": _TEXT}))
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return PlainTextResponse(server.metrics.render())

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await Session(socket, server).run()


PAGE = resources.files("whisper_flash_attention.serve") / "page.html"
