"""How far the work on several files has come: a bar in a terminal, plain lines elsewhere.

Several files may be under way at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from whisper_flash_attention.terminal.printable import print_line, printable

LONGEST_BAR = 20  # characters


class FileProgress:
    """Progress over files, as a context; one bar for all of them, which moves within a file, too.

    Threads may `tell` something while another has the bar aside: they wait for it.

    Args:
        console: where it is shown. If that is not a terminal, several files give a line each and
            one file gives none.
        files: the files to come, in order.
        shown: whether there is a bar, or lines, at all; what is told is printed in any case.
        clock: the time in seconds.
    """

    def __init__(
        self,
        console: Console,
        files: Sequence[str],
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._files = files
        self._shown = shown
        self._clock = clock
        self._begun = 0
        self._opening = ""
        self._shares: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._since: float | None = None
        self._lock = RLock()
        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
            BarColumn(bar_width=min(LONGEST_BAR, console.width // 6)),
            TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            disable=not console.is_terminal or not shown,
            # Text for standard output must not end up on the console of this bar.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=1.0, state="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, file: str) -> None:
        """The next file is being opened."""
        self._begun += 1
        self._opening = file
        if self._shown and len(self._files) > 1 and not self._console.is_terminal:
            print_line(self._console, f"[{self._begun}/{len(self._files)}] {file}")
        self._update()

    def measured(self, file: str, seconds: float | None) -> None:
        """A file has these seconds of audio, if that is known."""
        if seconds:
            self._seconds[file] = seconds

    def advance(self, file: str, share: float) -> None:
        """`share` (0 to 1) of a file is done."""
        if self._since is None:
            self._since = self._clock()
        self._shares[file] = share
        self._update()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is printed."""
        with self._lock:
            self._bar.stop()
            try:
                yield
            finally:
                self._bar.start()

    def tell(self, line: str) -> None:
        """Print a line where the progress is shown."""
        with self.aside():
            print_line(self._console, line)

    def state(self) -> str:
        """How far it is, in one line: audio of all files, speed, time left, files under way."""
        total = self._total()
        done = sum(share * self._length(file) for file, share in self._shares.items())
        took = 0.0 if self._since is None else self._clock() - self._since
        parts = []
        if self._seconds:
            parts.append(f"{clock_time(done)} of {clock_time(total)}")
        if took > 0 and done > 0:
            if self._seconds:
                parts.append(f"{done / took:.1f} x real time")
            parts.append(f"{clock_time(took * (total - done) / done)} left")
        names = [file for file, share in self._shares.items() if share < 1] or [self._opening]
        several = len(self._files) > 1
        place = f"{self._finished()}/{len(self._files)} done: " if several else ""
        return printable(", ".join([*parts, place + ", ".join(names)]))

    def _update(self) -> None:
        total = self._total()
        done = sum(share * self._length(file) for file, share in self._shares.items())
        # What precedes it takes the percentage, the bar and the blanks between.
        room = self._console.width - min(LONGEST_BAR, self._console.width // 6) - 7
        state = Text(self.state())
        state.truncate(max(room, 0), overflow="ellipsis")
        self._bar.update(self._task, completed=done / total if total else 0.0, state=state.plain)

    def _finished(self) -> int:
        return sum(share >= 1 for share in self._shares.values())

    def _length(self, file: str) -> float:
        """Seconds of a file, or where they are not known, those of the others on average."""
        known = self._seconds.values()
        return self._seconds.get(file, sum(known) / len(known) if known else 1.0)

    def _total(self) -> float:
        return sum(map(self._length, self._files))


def clock_time(seconds: float) -> str:
    """Seconds as minutes and hours: `0:07`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_speed(audio_seconds: float, work_seconds: float) -> str:
    """Say how fast work on audio goes."""
    speed = audio_seconds / work_seconds if work_seconds else 0.0
    return f"{audio_seconds:.1f} s of audio in {work_seconds:.1f} s ({speed:.1f} x real time)"
