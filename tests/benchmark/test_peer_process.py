"""A system in a process of its own: what it answers, how it ends, and its memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from whisper_flash_attention.benchmark import peer_process
from whisper_flash_attention.benchmark.peer_process import (
    Call,
    PeerFailed,
    Worker,
    peak_of_tree,
    serve_calls,
)
from whisper_flash_attention.benchmark.peer_systems import (
    SYSTEMS,
    TRANSFORMERS,
    PeerCheckpoint,
    Request,
    Setup,
    Texts,
)
from whisper_flash_attention.benchmark.word_alignment import TimedWord

SETUP = Setup(PeerCheckpoint({}, 0, is_multilingual=True), "cpu", "float32", 1, 1)


def never_serve(*arguments: Any) -> None:
    time.sleep(60)


def test_a_system_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_process, "serve_calls", never_serve)
    worker = Worker(SYSTEMS["ours-batched"], SETUP, alone=True, peers=None, timeout=0.1)
    with pytest.raises(PeerFailed, match=r"took longer than 0\.1 s"):
        worker.load()
    worker.stop()


@pytest.mark.parametrize("has_processes", [True, False])
@pytest.mark.usefixtures("restored")
def test_calls_are_answered_one_by_one(
    monkeypatch: pytest.MonkeyPatch, has_processes: bool
) -> None:
    requested: list[Request] = []

    def transcribe(request: Request, texts: Texts) -> None:
        requested.append(request)
        texts.add(" one", 2)
        if request.word_times:
            texts.add_words([(" one", 0.25, 0.5)])

    settings = {"beam_size": 1}
    system = SYSTEMS["ours-batched"]
    system = replace(system, load=lambda setup: (transcribe, settings), has_processes=has_processes)
    monkeypatch.setitem(SYSTEMS, "ours-batched", system)
    monkeypatch.setattr(peer_process, "peak_of_process", lambda: 1.0)
    monkeypatch.setattr(peer_process, "peak_of_tree", lambda: 2.0)
    ours, theirs = multiprocessing.Pipe()
    requests = [Request("a.wav", "en", 4), Request("a.wav", "en", 4, word_times=True)]
    for each in (*requests, None):
        ours.send(each)
    serve_calls(theirs, "ours-batched", SETUP, None)
    assert ours.recv()[0] == settings
    plain, timed = (ours.recv() for _ in requests)
    assert requested == requests
    assert isinstance(plain, Call) and plain.first_seconds is not None
    assert (plain.text, plain.tokens, plain.words) == (" one", 2, ())
    assert plain.rss_gb == (2.0 if has_processes else 1.0)
    assert timed.words == (TimedWord(" one", 0.25, 0.5),)


@pytest.fixture
def restored() -> Iterator[None]:
    """Ctrl-C ends the tests again."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("restored")
def test_a_system_that_cannot_be_loaded_says_why(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = multiprocessing.Pipe()
    missing = PeerCheckpoint({TRANSFORMERS: "nowhere"}, 50257, is_multilingual=True)
    caplog.set_level(logging.DEBUG, "whisper_flash_attention")
    serve_calls(theirs, "ours-batched", Setup(missing, "cpu", "float32", 1, 1), None)
    assert "nowhere" in ours.recv()
    assert "Traceback" not in "".join(capfd.readouterr())
    assert "ours-batched failed" in caplog.text and "Traceback" in caplog.text
    # The process that started it handles Ctrl-C.
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_worker_outlives_ctrl_c_and_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_process, "serve_calls", never_serve)
    worker = Worker(SYSTEMS["ours-batched"], SETUP, alone=True, peers=None, timeout=60)
    for _ in range(5):
        os.kill(worker._process.pid or 0, signal.SIGINT)
        time.sleep(0.1)
    assert worker._process.is_alive()
    start = time.monotonic()
    worker.stop(at_once=True)
    assert time.monotonic() - start < 5
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
import multiprocessing, os, time
from whisper_flash_attention.benchmark import peer_process

def work():
    peer_process.Thread(target=peer_process._end_with_parent, daemon=True).start()
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    while not os.path.exists({str(tmp_path / "pid")!r}):
        time.sleep(0.05)
    time.sleep(0.2)
    os._exit(0)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}/status").exists():
            return
        time.sleep(0.05)
    pytest.fail("the worker is still there")


def test_the_memory_of_this_process_is_known() -> None:
    assert 0.05 < peak_of_tree() < 100
