"""How far the work on several files has come: a bar in a terminal, plain lines elsewhere.

Several files may be under way at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from whisper_flash_attention.terminal import print_line, printable

NAME_WIDTH = 36  # characters; leaves room for the rest in 80 columns


class FileProgress:
    """Progress over files, as a context; one bar for all of them, which moves within a file, too.

    Threads may `tell` something while another has the bar aside: they wait for it.

    Args:
        console: where it is shown. If that is not a terminal, several files give a line each and
            one file gives none.
        files: the files to come, in order.
    """

    def __init__(self, console: Console, files: Sequence[str]) -> None:
        self._console = console
        self._files = files
        self._begun = 0
        self._shares: dict[str, float] = {}
        self._lock = RLock()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # Text for standard output must not end up on the console of this bar.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=len(files), speed="")

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
        """The next file's turn."""
        self._begun += 1
        place = printable(f"[{self._begun}/{len(self._files)}] {file}")
        shown = place
        if len(place) > NAME_WIDTH:  # a path's end tells more than its beginning
            shown = f"{place[: NAME_WIDTH // 4]}…{place[-NAME_WIDTH * 3 // 4 :]}"
        self._bar.update(self._task, description=shown)
        if len(self._files) > 1 and not self._console.is_terminal:
            print_line(self._console, place)

    def advance(self, file: str, share: float) -> None:
        """`share` (0 to 1) of a file is done."""
        self._shares[file] = share
        self._bar.update(self._task, completed=sum(self._shares.values()))

    def measure(self, audio_seconds: float, work_seconds: float) -> None:
        """Report the seconds of audio of all files so far, and the seconds that they took."""
        if audio_seconds > 0:
            speed = f"{audio_seconds:.0f} s, {audio_seconds / work_seconds:.1f} x real time"
            self._bar.update(self._task, speed=speed)

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


def describe_speed(audio_seconds: float, work_seconds: float) -> str:
    """Say how fast work on audio goes."""
    return (
        f"{audio_seconds:.1f} s of audio in {work_seconds:.1f} s: "
        f"{audio_seconds / work_seconds:.1f} x real time"
    )
