"""What requests cost one another: long recordings, beams and fallback beside short requests."""

from __future__ import annotations

import io
import threading
import wave
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from whisper_flash_attention.audio.container import Shared
from whisper_flash_attention.errors import AudioError
from whisper_flash_attention.options import ModelOptions
from whisper_flash_attention.serve.jobs import LONG_BYTES, Entry, Job
from whisper_flash_attention.serve.scheduler import Scheduler
from whisper_flash_attention.transcribe import Transcriber
from whisper_flash_attention.transcribe.arguments import TranscribeArguments
from whisper_flash_attention.transcribe.recording import Recording
from whisper_flash_attention.transcribe.sequential import SequentialReader
from whisper_flash_attention.transcribe.window_decoder import WindowDecoder

# Longer than what is held, so that windows are read while others are decoded.
LONG_SECONDS = 620
SHORT = TranscribeArguments(language="en", temperature=0.0)


@contextmanager
def started(transcriber: Transcriber, slots: int) -> Iterator[Scheduler]:
    scheduler = Scheduler("tiny.en", ModelOptions(), slots=slots, transcriber=transcriber)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.close()


class Waiting:
    """A job that was submitted, its windows so far, and its end."""

    def __init__(self, scheduler: Scheduler, audio: Any, arguments: TranscribeArguments) -> None:
        self.windows = 0
        self.results: list[Any] = []
        self._changed = threading.Condition()
        size = LONG_BYTES + 1 if isinstance(audio, Path) else 0
        self.job = Job(audio, arguments, self._end, on_segments=self._window, size=size)
        scheduler.submit(self.job)

    def _window(self, *_: Any) -> None:
        with self._changed:
            self.windows += 1
            self._changed.notify_all()

    def _end(self, result: Any) -> None:
        with self._changed:
            self.results.append(result)
            self._changed.notify_all()

    def wait_for_windows(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.windows >= count, 240)

    def wait(self) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.results), 60)
        if isinstance(self.results[0], BaseException):
            raise self.results[0]
        return self.results[0]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of windows whenever some are decoded beside the slots."""
    found: list[int] = []
    decode_again = WindowDecoder.decode_again

    def counted(self: WindowDecoder, states: Any, prompts: Any, results: Any) -> None:
        found.append(len(prompts))
        decode_again(self, states, prompts, results)

    monkeypatch.setattr(WindowDecoder, "decode_again", counted)
    return found


def write_noise(path: Path, seconds: int) -> Path:
    noise = np.random.default_rng(0).normal(0, 3000, 16_000 * 10).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        for _ in range(seconds // 10):
            file.writeframes(noise)
    return path


def test_uploads_are_decoded_by_processes_where_threads_would_cost_a_gpu_its_time(
    transcriber: Transcriber, clip: bytes
) -> None:
    with started(transcriber, 2) as scheduler:
        scheduler.preparation.start_decoders()
        good = Waiting(scheduler, Shared(io.BytesIO(clip), "clip"), SHORT)
        bad = Waiting(scheduler, Shared(io.BytesIO(b"RIFF"), "bad"), SHORT)
        assert good.wait().text == transcriber.transcribe(clip, **SHORT).text
        with pytest.raises(AudioError, match="bad: "):
            bad.wait()


@pytest.mark.parametrize(
    ("slots", "seconds"),
    [
        (1, LONG_SECONDS),
        pytest.param(1, 3 * 3600, marks=pytest.mark.slow),
        pytest.param(4, 3 * 3600, marks=pytest.mark.slow),
    ],
)
def test_a_long_recording_delays_a_short_one_by_two_windows_at_most(
    transcriber: Transcriber, clip: bytes, tmp_path: Path, slots: int, seconds: int
) -> None:
    path = write_noise(tmp_path / "long.wav", seconds)
    with started(transcriber, slots) as scheduler:
        long = Waiting(
            scheduler, path, TranscribeArguments(language="en", temperature=0.0, max_new_tokens=8)
        )
        long.wait_for_windows(1)
        before = long.windows
        assert "young man" in Waiting(scheduler, clip, SHORT).wait().text
        assert long.windows - before <= 2
        assert not long.results
        scheduler.cancel(long.job)


def test_fallback_of_one_request_delays_another_by_a_window_at_most(
    transcriber: Transcriber, clip: bytes, turns: list[int]
) -> None:
    """Every result of the first is refused, so that it is decoded at all temperatures."""
    with started(transcriber, 2) as scheduler:
        refused = Waiting(
            scheduler, clip, TranscribeArguments(language="en", logprob_threshold=0.0)
        )
        while not turns:
            threading.Event().wait(0.001)
        before = len(turns)
        short = Waiting(scheduler, clip, SHORT)
        assert "young man" in short.wait().text
        assert len(turns) - before <= 2
        assert refused.wait().text
        # Its speech is checked once, and it is decoded at five further temperatures.
        assert sum(turns) == 6


def test_beams_take_turns_with_the_slots(
    transcriber: Transcriber, clip: bytes, turns: list[int]
) -> None:
    with started(transcriber, 2) as scheduler:
        beams = TranscribeArguments(language="en", temperature=0.0, beam_size=2)
        with_beams = [Waiting(scheduler, clip, beams) for _ in range(3)]
        while not turns:
            threading.Event().wait(0.001)
        before = len(turns)
        assert "young man" in Waiting(scheduler, clip, SHORT).wait().text
        assert len(turns) - before <= 2
        for each in with_beams:
            assert each.wait().text
        # Those that wait together are decoded together.
        assert sum(turns) == 3
    assert with_beams[0].results[0].text == transcriber.transcribe(clip, **beams).text


def test_jobs_under_way_end_with_the_scheduler(transcriber: Transcriber, clip: bytes) -> None:
    from whisper_flash_attention.serve.jobs import Cancelled

    with started(transcriber, 1) as scheduler:
        jobs = [Waiting(scheduler, clip, SHORT) for _ in range(12)]
        jobs[0].wait_for_windows(1)
    assert all(each.results for each in jobs)
    ends = [type(each.results[0]) for each in jobs]
    assert Cancelled in ends


def test_results_do_not_wait_for_what_goes_beside_a_stream() -> None:
    key = ("a stream",)
    decoder = SimpleNamespace(fits_slots=True, stream_key=key)
    reader = object.__new__(SequentialReader)
    reader.decoder = cast(WindowDecoder, decoder)
    fits, beside = (
        Entry(cast(Job, None), cast(Recording, None), reader, is_alone=is_alone)
        for is_alone in (False, True)
    )
    scheduler = Scheduler("tiny.en", ModelOptions(), slots=32)
    scheduler._widths, scheduler._width = (8, 32), 32
    found = {}
    for name, ready in {
        "none": [],
        "one": [fits],
        "first": [beside, fits],
        "later": [fits, beside],
    }.items():
        scheduler._ready = deque(ready)
        found[name] = scheduler._are_waiting(key, 1), scheduler._are_waiting(key, 2)
    assert found == {
        "none": (False, False),
        "one": (True, True),
        "first": (False, False),
        "later": (True, False),
    }
    assert not scheduler._are_waiting(("another",), 1)
