"""How far an archive is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.terminal import print_line

LINE_EVERY = 30.0  # seconds, where there is no terminal


class ArchiveProgress:
    """Progress over recordings and hours of audio, as a context.

    Args:
        console: where it is shown.
        items: what is to be done in this run.
        clock: the time in seconds.
    """

    def __init__(
        self,
        console: Console,
        items: Sequence[Item],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._clock = clock
        self._files = len(items)
        self._weights = _weights(items)
        self._weight_left = sum(self._weights.values())
        self._weight = self._weight_left
        self._done = self._failed = 0
        self._audio_seconds = 0.0
        self._began = self._reported_at = clock()
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._weight, state="starting")

    def __enter__(self) -> Self:
        self._began = self._reported_at = self._clock()
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """These rows are there now."""
        for row in rows:
            self._weight_left -= self._weights.get(row["id"], 0.0)
            self._done += 1
            if row["error"] is not None:
                self._failed += 1
                self.tell(f"error: {row['id']}: {row['error']}")
            self._audio_seconds += row["seconds"] or 0.0
        state = self.state()
        self._bar.update(self._task, completed=self._weight - self._weight_left, state=state)
        if not self._console.is_terminal and self._clock() - self._reported_at >= LINE_EVERY:
            self._reported_at = self._clock()
            print_line(self._console, state)

    def state(self) -> str:
        """Say in one line how far it is."""
        took = self._clock() - self._began
        parts = [f"{self._done} of {self._files}", f"{self._audio_seconds / 3_600:.1f} h"]
        if took > 0:
            parts.append(f"{self._audio_seconds / took:.0f} x real time")
        if self._failed:
            parts.append(f"{self._failed} failed")
        worked = self._weight - self._weight_left
        if worked > 0 and self._done < self._files:
            parts.append(f"{_duration(max(0.0, took * self._weight_left / worked))} left")
        return ", ".join(parts)

    def tell(self, line: str) -> None:
        """Print a line where the progress is shown."""
        print_line(self._console, line)


def _weights(items: Sequence[Item]) -> dict[str, float]:
    """Each recording's share of the work; the same for all where one's length is not known."""
    lengths = {item.id: item.expected_seconds for item in items}
    known = [length for length in lengths.values() if length]
    if len(known) < len(lengths):
        return dict.fromkeys(lengths, 1.0)
    return {name: length or 0.0 for name, length in lengths.items()}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
