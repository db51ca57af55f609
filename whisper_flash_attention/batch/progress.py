"""How far an archive is (a bar in a terminal, a line now and then elsewhere), and what it came to.

`summary.json` is written last, at the end of a complete run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from whisper_flash_attention.terminal import print_line, printable

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

    def __exit__(self, *exception: object) -> None:
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
        table.add_row("done", f"{self.done} ({self.audio_hours:.2f} h of audio)")
        for kind, count in sorted(self.errors.items()):
            table.add_row("failed", Text(printable(f"{count} {kind}")))
        if self.rejected:
            table.add_row("rejected", f"{self.rejected} rows of the manifest")
        if self.remaining:
            table.add_row("left", f"{self.remaining}")
        ran = (
            f"{self.run_files} recordings, {self.run_audio_hours:.2f} h in {self.run_seconds:.1f} s"
        )
        table.add_row("this run", f"{ran}: {self.times_real:.1f} x real time")
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
