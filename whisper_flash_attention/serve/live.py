"""Jobs of a scheduler as asyncio sees them, and errors as clients see them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from whisper_flash_attention.errors import (
    AudioError,
    DeviceError,
    MissingPackage,
    OptionError,
    WeightsError,
)
from whisper_flash_attention.serve.fields import RequestError
from whisper_flash_attention.serve.jobs import Cancelled, Job, TooLong
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.results import Segment

LOG = logging.getLogger(__name__)


def to_request_error(error: BaseException) -> RequestError:
    """What a client sees of an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TooLong):
        return RequestError(413, str(error), param="file", code="audio_too_long")
    if isinstance(error, AudioError):
        return RequestError(400, str(error), param="file", code="invalid_audio")
    if isinstance(error, OptionError):
        return RequestError(400, str(error), code="invalid_value")
    if isinstance(error, MissingPackage):
        return RequestError(400, str(error), code="missing_package")
    if isinstance(error, WeightsError | DeviceError):
        return RequestError(503, str(error), code="model_unavailable")
    if isinstance(error, Cancelled):
        return RequestError(503, str(error), code="server_stopping")
    if isinstance(error, TimeoutError):
        return RequestError(504, "the request took longer than the server allows", code="timeout")
    LOG.error("a request failed", exc_info=error)
    return RequestError(
        500, "the server failed on this request; its log has the reason", code="server_error"
    )


class LiveJob:
    """A job of a scheduler, awaited by a request.

    Events are segments of a window, the transcription, or an error.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self.job: Job | None = None

    def submit(self, job: Job) -> None:
        self.job = job
        self.scheduler.submit(job)

    def put(self, event: Any) -> None:
        """Take an event, from any thread."""
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def put_segments(self, recording: Recording, segments: Sequence[Segment]) -> None:
        self.put((recording, segments))

    async def next(self) -> Any:
        """The next event. Raises the error that ended the job."""
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        """Drop the job if it has not ended."""
        if self.job is not None and not self.job.has_ended:
            self.scheduler.cancel(self.job)
