"""A process per call: results come back, failures have reasons, nothing lingers."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.benchmark import children
from whisper_flash_attention.benchmark import processes
from whisper_flash_attention.benchmark.processes import (
    LONGEST_REASON,
    ProcessFailed,
    Workers,
    ended_by_sigterm,
    interruptions_ignored,
    reason_of,
    start_workers,
)


@pytest.fixture(scope="module")
def workers() -> Workers:
    return start_workers("cpu")


def test_a_result_comes_back_from_another_process(workers: Workers) -> None:
    assert workers.call(os.getpid, timeout=60) != os.getpid()
    assert workers.call(operator.add, [1], [2], timeout=60) == [1, 2]


def test_progress_comes_back_in_order_before_the_result(workers: Workers) -> None:
    received: list[int] = []
    result = workers.call(children.count_to_three, timeout=60, on_progress=received.append)
    assert (received, result) == ([1, 2, 3], "done")


def test_the_server_has_imported_what_rows_need(workers: Workers) -> None:
    loaded = workers.call(children.imported_modules, timeout=60)
    assert "torch" in loaded
    assert "transformers.models.whisper.modeling_whisper" in loaded
    assert "whisper_flash_attention.modeling_whisper_flash_attention" in loaded


def test_an_exception_is_the_reason_and_its_traceback_the_log(workers: Workers) -> None:
    with pytest.raises(ProcessFailed) as caught:
        workers.call(operator.truediv, 1, 0, timeout=60)
    assert caught.value.reason == "ZeroDivisionError: division by zero"
    assert "Traceback (most recent call last)" in caught.value.log


def test_a_message_of_several_lines_gives_its_first_as_the_reason(workers: Workers) -> None:
    with pytest.raises(ProcessFailed) as caught:
        workers.call(children.raise_with_several_lines, timeout=60)
    assert caught.value.reason == "RuntimeError: first line"
    assert "some output before" in caught.value.log
    assert "second line" in caught.value.log


def test_a_process_that_leaves_gives_its_exit_code_and_last_words(workers: Workers) -> None:
    with pytest.raises(ProcessFailed, match=r"died with exit code 7: the driver is gone"):
        workers.call(children.say_and_leave, "the driver is gone", 7, timeout=60)


def test_a_killed_process_names_the_signal_and_hints_at_memory(workers: Workers) -> None:
    with pytest.raises(ProcessFailed, match=r"killed by SIGKILL \(perhaps out of memory\)"):
        workers.call(children.kill_myself, timeout=60)


def test_a_crash_gives_the_words_before_the_stacks(workers: Workers) -> None:
    with pytest.raises(ProcessFailed) as caught:
        workers.call(children.crash, timeout=60)
    assert caught.value.reason == "the process was killed by SIGABRT: terminate called"
    assert "Fatal Python error" in caught.value.log


def test_a_process_that_takes_too_long_is_ended(workers: Workers) -> None:
    start = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"took longer than 0\.2 s"):
        workers.call(time.sleep, 60, timeout=0.2)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_a_process_that_will_not_end_is_killed(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    with pytest.raises(ProcessFailed, match="took longer"):
        workers.call(children.ignore_sigterm_and_sleep, timeout=1)
    assert not multiprocessing.active_children()


def test_ctrl_c_ends_the_process_and_goes_on_to_the_caller(workers: Workers) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.call(time.sleep, 60, timeout=60)
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_the_last_of_several_tracebacks_is_the_reason() -> None:
    log = (
        "Traceback (most recent call last):\n  File ...\nKeyError: 'a'\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n  File ...\n    run()\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n\n"
    )
    assert reason_of(log, 1).startswith("torch.OutOfMemoryError: CUDA out of memory.")


def test_a_reason_fits_a_table() -> None:
    reason = reason_of(f"Traceback (most recent call last):\nValueError: {'x' * 1000}", 1)
    assert len(reason) == LONGEST_REASON


def test_silence_still_gives_a_reason() -> None:
    assert reason_of("", 3) == "the process died with exit code 3"


def test_sigterm_clears_away_once_and_is_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    steps = []

    @ended_by_sigterm()
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            steps.append("cleared away")

    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            work()
        assert caught.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
    assert len(steps) == 2


def test_what_is_started_meanwhile_ignores_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    script = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    with interruptions_ignored():
        os.kill(os.getpid(), signal.SIGINT)
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "True\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    done = []

    def work() -> None:
        with interruptions_ignored(), ended_by_sigterm():
            done.append([signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]
