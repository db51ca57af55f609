"""The process of a server: its socket, its start with a warm-up, and its end by a signal."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn

from whisper_flash_attention.options import ServeOptions
from whisper_flash_attention.serve.app import Server, create_app
from whisper_flash_attention.serve.scheduler import Scheduler

# Connections that the system holds until they are accepted.
BACKLOG = 2048
# Seconds after which a thread gives way to others: the one that feeds a GPU works for moments, and
# must not wait for Python's 5 ms at each.
SWITCH_SECONDS = 0.0005


def run_server(
    options: ServeOptions, schedulers: Mapping[str, Scheduler], report: Callable[[str], None]
) -> None:
    """Serve until SIGTERM; requests under way then end first.

    Args:
        schedulers: by the names of their models that clients give; not started.
        report: prints a line about the start.

    Raises:
        WeightsError, DeviceError, OptionError: the first model cannot be loaded.
        OSError: the address cannot be listened on.
        KeyboardInterrupt: the process was interrupted.
    """
    config = uvicorn.Config(
        create_app(Server(options, schedulers)),
        host=options.host,
        port=options.port,
        log_config=None,  # warnings go to standard error, as those of every other package
        access_log=False,
        backlog=BACKLOG,
        ws="websockets-sansio",
        ws_per_message_deflate=False,  # sound hardly shrinks, and all requests wait for the thread
    )
    server = uvicorn.Server(config)
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = config.bind_socket()
    listener.listen(BACKLOG)  # clients may connect while the application is being started
    host = f"[{options.host}]" if ":" in options.host else options.host
    first = next(iter(schedulers.values()))
    report(f"http://{host}:{listener.getsockname()[1]}: loading {first.name}")
    failures: list[BaseException] = []

    def warm_up() -> None:
        began = time.monotonic()
        try:
            first.warm_up()
        except BaseException as error:  # raised by the thread that waits for the server
            failures.append(error)
            server.should_exit = True
            return
        # What is there now stays: collections that visit it would hold up all requests.
        gc.collect()
        gc.freeze()
        assert first.transcriber is not None
        seconds = time.monotonic() - began
        report(f"{first.name}: {first.transcriber.describe()}; {first.slots} slots")
        report(f"ready after {seconds:.1f} s")

    # uvicorn raises the signal that ended it once more, for this handler.
    previous = signal.signal(signal.SIGTERM, _ignore)
    try:
        threading.Thread(target=warm_up, name="whisper-flash-warm-up", daemon=True).start()
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
        listener.close()
    if failures:
        raise failures[0]


def _ignore(_: int, __: FrameType | None) -> Any:
    pass
