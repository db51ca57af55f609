"""The progress that is shown for an archive."""

from __future__ import annotations

import io

from rich.console import Console

from tests.batch.test_results import bad, good
from tests.batch.test_sink import Clock
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.progress import LINE_EVERY, ArchiveProgress


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
    assert line == "2 of 4, 1.0 h, 60 x real time, 1 failed, 1 min left"


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
    assert progress.state() == "0 of 1, 0.0 h"


def test_at_the_end_no_time_is_left() -> None:
    now = iter(float(second) for second in range(0, 1000, 10))
    items = [Item(name, f"{name}.wav", end=0.1) for name in "abc"]
    progress = ArchiveProgress(Console(file=io.StringIO()), items, clock=lambda: next(now))
    progress.add([{"id": name, "error": None, "seconds": 0.1} for name in "abc"])
    assert "left" not in progress.state()
