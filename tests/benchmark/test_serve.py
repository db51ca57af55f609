"""Load on a server: its cases, its forms, and a run against a live one."""

from __future__ import annotations

import io
import wave

import pytest

from whisper_flash_attention.benchmark.serve import (
    ServeCase,
    body_of,
    clip,
    measure_server,
    running_server,
)
from whisper_flash_attention.errors import BenchmarkError
from whisper_flash_attention.options import ModelOptions


def test_recordings_have_the_length_that_was_requested() -> None:
    for seconds in (0.5, 40.0):
        with wave.open(io.BytesIO(clip(seconds))) as sound:
            assert sound.getnframes() / sound.getframerate() == seconds


def test_a_form_asks_for_about_as_many_tokens() -> None:
    body = body_of(b"sound", 25)
    assert b'name="min_new_tokens"\r\n\r\n24\r\n' in body
    assert b'name="max_new_tokens"\r\n\r\n25\r\n' in body
    assert b"max_new_tokens" not in body_of(b"sound", None)


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"seconds": -1.0}, {"rate": 0.0}])
def test_impossible_cases(wrong: dict[str, float]) -> None:
    with pytest.raises(BenchmarkError, match="give more than 0"):
        ServeCase(ModelOptions(), **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_server_is_started_measured_and_stopped(tiny_en: str) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    case = ServeCase(ModelOptions(tiny_en, device="cpu"), clients=2, requests=4, clip_seconds=2.0)
    with running_server(case) as url:
        row = measure_server(url, case)
    assert (row.requests, row.failures) == (4, 0)
    assert row.p50 <= row.p95 <= row.p99 <= row.seconds
    with pytest.raises(BenchmarkError, match="no request succeeded"):
        measure_server(url, case)
