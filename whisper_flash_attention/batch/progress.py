"""How far an archive is (a bar in a terminal, a line now and then elsewhere), and what it came to.

`summary.json` is written last, at the end of a complete run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.manifest import Rejected
from whisper_flash_attention.batch.results import SUMMARY
from whisper_flash_attention.batch.rows import Tally
from whisper_flash_attention.batch.shards import write_whole
from whisper_flash_attention.terminal import UPDATE_SECONDS, clock_time, print_line, printable

# Seconds between two lines, where there is no terminal: at first, and in the log of a long run.
LINE_EVERY = 5.0
LINE_EVERY_LATER = 30.0


class ArchiveProgress:
    """Progress over recordings and hours of audio, as a context.

    Another thread may call `advance`. The time goes on being shown while nothing is done.

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
        self._under_way: dict[str, tuple[float, float]] = {}  # shares, and seconds of audio done
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
        self._task = self._bar.add_task("", total=self._weight, state=self.state())
        self._lock = RLock()
        self._ended = Event()
        self._ticks = Thread(target=self._keep_showing, daemon=True)

    def __enter__(self) -> Self:
        self._began = self._reported_at = self._clock()
        self._bar.start()
        if not self._console.quiet:
            self._ticks.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._ticks.is_alive():
            self._ticks.join()
        self._bar.stop()

    def advance(self, item: Item, share: float, seconds: float) -> None:
        """Take note that `share` (0 to 1) of a recording of `seconds` is done."""
        with self._lock:
            if item.id in self._weights:
                self._under_way[item.id] = share, share * seconds
            self._show()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """These rows are there now."""
        with self._lock:
            for row in rows:
                self._under_way.pop(row["id"], None)
                self._weight_left -= self._weights.pop(row["id"], 0.0)
                self._done += 1
                if row["error"] is not None:
                    self._failed += 1
                    self.tell(f"error: {row['id']}: {row['error']}")
                self._audio_seconds += row["seconds"] or 0.0
            self._show()

    def state(self) -> str:
        """Say in one line how far it is."""
        took = self._clock() - self._began
        audio = self._audio_seconds + sum(seconds for _, seconds in self._under_way.values())
        parts = [f"{self._done} of {self._files}", f"{audio_length(audio)} in {clock_time(took)}"]
        if took > 0 and audio > 0:
            parts.append(f"{audio / took:.1f} x real time")
        if self._failed:
            parts.append(f"{self._failed} failed")
        worked = self._worked
        if worked > 0 and self._done < self._files:
            left = took * (self._weight - worked) / worked
            parts.append(f"{_duration(max(0.0, left))} left")
        return ", ".join(parts)

    @property
    def _worked(self) -> float:
        """The weight of what is done, of recordings under way their share."""
        part = sum(share * self._weights[name] for name, (share, _) in self._under_way.items())
        return self._weight - self._weight_left + part

    def _show(self) -> None:
        """Renew the bar, or print a line, if it is time."""
        now = self._clock()
        # Lines become rarer, so that the log of a long run stays short.
        every = min(max(LINE_EVERY, (now - self._began) / 20), LINE_EVERY_LATER)
        if self._console.is_terminal:
            every = UPDATE_SECONDS
        if now - self._reported_at < every:
            return
        self._reported_at = now
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._worked, state=self.state())
        else:
            print_line(self._console, self.state())

    def _keep_showing(self) -> None:
        while not self._ended.wait(1.0):
            with self._lock:
                self._show()

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


def audio_length(seconds: float) -> str:
    """Say how long some audio is: `1.25 h`, `3.2 min`, `8.0 s`."""
    if seconds >= 360:
        return f"{seconds / 3_600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


SHOWN_REJECTED = 1_000


@dataclass(frozen=True, slots=True)
class Summary:
    """The state of an archive after a run. A folder has one only after a run that came to its end.

    Args:
        items: recordings in the archive.
        done: of the shards' rows, those without an error; of all runs together.
        failed: of the shards' rows, those with an error.
        remaining: recordings of the archive without a row: those that `limit` left out.
        rejected: rows of the manifest that name no recording.
        audio_hours: of what is done.
        errors: how many there are of each kind.
        run_files: rows that this run added.
        run_audio_hours: of these.
        run_seconds: how long this run took, start and end included.
        rejected_rows: the first of the rejected rows, with their reasons.
    """

    items: int
    done: int
    failed: int
    remaining: int
    rejected: int
    audio_hours: float
    errors: Mapping[str, int]
    run_files: int
    run_audio_hours: float
    run_seconds: float
    rejected_rows: tuple[Rejected, ...] = field(default=(), repr=False)

    @property
    def times_real(self) -> float:
        """How many times faster than real time this run was, all in all."""
        return self.run_audio_hours * 3_600 / self.run_seconds if self.run_seconds else 0.0

    @property
    def all_well(self) -> bool:
        """Whether no recording failed and no row was rejected."""
        return not self.failed and not self.rejected

    def write(self, folder: Path) -> None:
        """Write `summary.json`. Raises `BatchError` if it cannot be written."""
        fields = asdict(self) | {"times_real": self.times_real}
        write_whole(folder / SUMMARY, json.dumps(fields, indent=1).encode() + b"\n")

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(show_header=False, box=None)
        table.add_row("recordings", f"{self.items}")
        table.add_row("done", f"{self.done} ({audio_length(3_600 * self.audio_hours)} of audio)")
        for kind, count in sorted(self.errors.items()):
            table.add_row("failed", Text(printable(f"{count} {kind}")))
        if self.rejected:
            table.add_row("rejected", f"{self.rejected} rows of the manifest")
        if self.remaining:
            table.add_row("left", f"{self.remaining}")
        if self.run_files:
            files = "1 recording" if self.run_files == 1 else f"{self.run_files} recordings"
            audio = audio_length(3_600 * self.run_audio_hours)
            took = f"{self.run_seconds:.1f} s: {self.times_real:.1f} x real time"
            table.add_row("this run", f"{files}, {audio} in {took}")
        return table


def summarize(
    items: int, rejected: list[Rejected], remaining: int, whole: Tally, run: Tally, seconds: float
) -> Summary:
    """Put a summary together from what all shards (`whole`) and this run (`run`) add up to."""
    return Summary(
        items=items,
        done=whole.done,
        failed=whole.failed,
        remaining=remaining,
        rejected=len(rejected),
        audio_hours=whole.audio_seconds / 3_600,
        errors=dict(whole.kinds),
        run_files=run.done + run.failed,
        run_audio_hours=run.audio_seconds / 3_600,
        run_seconds=seconds,
        rejected_rows=tuple(rejected[:SHOWN_REJECTED]),
    )
