"""The time left, from the shares of the rows."""

from __future__ import annotations

import pytest

from whisper_flash_attention.benchmark.roofline import Ceilings
from whisper_flash_attention.benchmark.runner import Estimate, expected_seconds
from whisper_flash_attention.benchmark.settings import SETTINGS, Job, Row

H100 = Ceilings(3.02e12, 766e12)


def make_job(setting: str, checkpoint: str, layers: int) -> Job:
    return Job(SETTINGS[setting], 1, Row(checkpoint, layers), "orig", "cuda", "float16")


def test_deeper_and_larger_work_is_expected_to_take_longer() -> None:
    expected = [
        expected_seconds(make_job(*job), H100)
        for job in (
            ("small", "tiny", 2),
            ("default", "tiny", 2),
            ("default", "medium", 24),
            ("large", "medium", 24),
        )
    ]
    assert expected == sorted(expected)


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    jobs = [make_job("default", "tiny", 4)] * 4
    estimate = Estimate(jobs, H100)
    assert estimate.left == "? left"
    now = 110.0
    estimate.finish(jobs[0])
    assert estimate.left == "30 s left"
    now = 200.0
    estimate.advance(jobs[1], SETTINGS["default"].batches)
    assert estimate.left == "2 min left"
    now = 400.0
    for job in jobs[1:]:
        estimate.finish(job)
    assert estimate.left == "0 s left"
    assert estimate.done == pytest.approx(estimate.total)
