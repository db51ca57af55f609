"""A live server on the loopback, in a thread of the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import openai
import uvicorn

from whisper_flash_attention.options import ModelOptions, ServeOptions
from whisper_flash_attention.serve.app import Server, create_app
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.transcribe import Transcriber

MODEL = "tiny.en"


class Live:
    """A server that listens.

    Attributes:
        url: of its root.
        server: its state.
        scheduler: of its model.
    """

    def __init__(self, url: str, server: Server) -> None:
        self.url = url
        self.server = server
        self.scheduler = next(iter(server.schedulers.values()))
        self._clients: list[openai.OpenAI] = []

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, **options}
        client = openai.OpenAI(base_url=f"{self.url}/v1", **options)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()

    def post(self, clip: Any, route: str = "transcriptions", **fields: Any) -> httpx.Response:
        files = {"file": ("clip.wav", clip)}
        return httpx.post(f"{self.url}/v1/audio/{route}", files=files, data=fields, timeout=300)

    def is_idle(self) -> bool:
        """Wait until no recording is in a slot or waits for one."""
        for _ in range(500):
            counts = (
                self.scheduler.in_slots,
                self.scheduler.waiting,
                *self.scheduler.preparation.begun,
            )
            if not any(counts):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(transcriber: Transcriber, **options: Any) -> Iterator[Live]:
    """Serve a model that is loaded already."""
    given = ServeOptions(**options)
    scheduler = Scheduler(MODEL, ModelOptions(), slots=given.slots or 4, transcriber=transcriber)
    scheduler.ready.set()
    with listening(Server(given, {MODEL: scheduler})) as live:
        yield live


@contextmanager
def listening(server: Server) -> Iterator[Live]:
    """Run a server in a thread."""
    config = uvicorn.Config(create_app(server), port=0, log_config=None, ws="websockets-sansio")
    web = uvicorn.Server(config)
    listener = config.bind_socket()
    thread = Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    while not web.started:
        time.sleep(0.01)
    try:
        live = Live(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
        yield live
        live.close_clients()
    finally:
        web.should_exit = True
        thread.join()
        listener.close()
