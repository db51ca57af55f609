"""The progress that is shown for an archive."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from tests.batch.test_results import bad, good
from tests.batch.test_sink import Clock
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.progress import LINE_EVERY, ArchiveProgress, audio_length


def shown(items: list[Item]) -> tuple[ArchiveProgress, Clock, io.StringIO]:
    clock, text = Clock(), io.StringIO()
    return ArchiveProgress(Console(file=text, width=200), items, clock), clock, text


def test_lines_come_now_and_then_without_a_terminal() -> None:
    progress, clock, text = shown([Item(name, name, seconds=3_600.0) for name in "abcd"])
    with progress:
        clock.now = LINE_EVERY - 1
        progress.add([good("a") | {"seconds": 3_600.0}])
        assert text.getvalue() == ""
        clock.now = 60.0
        progress.add([bad("b")])
    error, line = text.getvalue().splitlines()
    assert error == "error: b: cannot be read"
    assert line == "2 of 4, 1.00 h in 1:00, 60.0 x real time, 1 failed, 1 min left"


def test_lines_come_while_recordings_are_in_work() -> None:
    items = [Item(name, name, seconds=100.0) for name in "ab"]
    progress, clock, text = shown(items)
    with progress:
        for clock.now, share in ((1.0, 0.1), (LINE_EVERY, 0.25), (LINE_EVERY + 1, 0.3)):
            progress.advance(items[0], share, 100.0)
        clock.now = 2 * LINE_EVERY
        progress.add([good("a") | {"seconds": 100.0}])
        progress.advance(items[0], 0.5, 100.0)  # late
    assert text.getvalue().splitlines() == [
        "0 of 2, 25.0 s in 0:05, 5.0 x real time, 35 s left",
        "1 of 2, 1.7 min in 0:10, 10.0 x real time, 10 s left",
    ]


def test_lines_of_a_long_run_become_rarer() -> None:
    items = [Item(str(number), str(number), seconds=1.0) for number in range(7_200)]
    progress, clock, text = shown(items)
    with progress:
        for second, item in enumerate(items):
            clock.now = float(second)
            progress.add([good(item.id)])
    assert 200 < len(text.getvalue().splitlines()) < 400


def test_the_time_goes_on_while_nothing_is_done() -> None:
    progress, clock, text = shown([Item("a", "a")])
    with progress:
        clock.now = 7.0
        for _ in range(300):
            if text.getvalue():
                break
            time.sleep(0.02)
    assert text.getvalue() == "0 of 1, 0.0 s in 0:07\n"


def test_time_left_goes_by_length_where_lengths_are_known() -> None:
    items = [Item("a", "a", seconds=900.0), Item("b", "b", seconds=100.0)]
    progress, clock, _ = shown(items)
    clock.now = 900.0
    progress.add([good("a")])
    assert progress.state().endswith("2 min left")
    progress, clock, _ = shown([*items, Item("c", "c")])
    clock.now = 3_600.0
    progress.add([good("a")])
    assert progress.state().endswith("2 h 00 min left")


def test_nothing_is_told_of_time_before_anything_is_done() -> None:
    progress, _, _ = shown([Item("a", "a")])
    assert progress.state() == "0 of 1, 0.0 s in 0:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.04, "8.0 s"), (90.0, "1.5 min"), (359.0, "6.0 min"), (4_500.0, "1.25 h")],
)
def test_short_audio_is_told_in_minutes_or_seconds(seconds: float, text: str) -> None:
    assert audio_length(seconds) == text


def test_at_the_end_no_time_is_left() -> None:
    now = iter(float(second) for second in range(0, 1000, 10))
    items = [Item(name, f"{name}.wav", end=0.1) for name in "abc"]
    progress = ArchiveProgress(Console(file=io.StringIO()), items, clock=lambda: next(now))
    progress.add([{"id": name, "error": None, "seconds": 0.1} for name in "abc"])
    assert "left" not in progress.state()
