"""What people see in a terminal: printable text, other packages' messages, progress.

It knows no recordings, models or options, and every other part of the package may import it.

Text that others wrote (names of files, ids, columns, titles, transcripts) may hold escape sequences
that retitle or rewrite a terminal, line breaks that imitate a message of ours, overrides that
reorder what is read, and bytes that are not UTF-8. Whatever reaches a terminal, a log or a line of
a text file goes through `printable`. Data files keep the text as it is: `json_line` escapes the
same characters as JSON does, which readers undo.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import RLock
from typing import TYPE_CHECKING, Any, Self, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# C0, DEL and C1 controls; line and paragraph separators; surrogates, which stand for bytes that are
# not UTF-8; noncharacters, by which a terminal may resynchronise.
_CONTROLS = "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff\\ufffe\\uffff"
# Marks, embeddings, overrides and isolates of writing direction; deprecated format characters.
_DIRECTIONS = "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u206f"
# Invisible: zero-width space, word joiner and invisible operators, byte order mark, annotations,
# tags. Zero-width joiners are not among them: Persian, Hindi and emoji are spelled with them.
_INVISIBLE = "\\u200b\\u2060-\\u2064\\ufeff\\ufff9-\\ufffb\\U000e0000-\\U000e007f"

# What `printable` escapes.
UNPRINTABLE = re.compile(f"[{_CONTROLS}{_DIRECTIONS}{_INVISIBLE}]")
_CONTROL = re.compile(f"[{_CONTROLS}]")
_NOT_IN_JSON = re.compile(f"[{_CONTROLS}{_DIRECTIONS}]")


def printable(text: object, *, is_speech: bool = False) -> str:
    """Return `str(text)` on one line, with control characters shown as Python's escapes.

    ESC becomes `\\x1b`, a line break `\\n`, a right-to-left override `\\u202e`, a byte that is not
    UTF-8 `\\udce9`. All other characters, also backslashes, stay: the result is for reading, and
    printable text is returned unchanged.

    Args:
        text: anything; its `str` is taken.
        is_speech: keep marks of writing direction and invisible characters, with which subtitles in
            Arabic and Hebrew are written. Controls are escaped all the same.
    """
    return (_CONTROL if is_speech else UNPRINTABLE).sub(_escape, str(text))


def json_line(value: Any) -> str:
    """Return JSON on one line, readable where it can be: only unprintable characters are escaped.

    Unlike that of `json.dumps(value, ensure_ascii=False)`, the result can always be encoded and is
    safe in a terminal; readers get the same value.
    """
    return _NOT_IN_JSON.sub(
        lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False)
    )


class PlainConsole:
    """Standard error where it is no terminal: lines are printed as they are."""

    is_terminal = False


AnyConsole: TypeAlias = "Console | PlainConsole"


def error_console() -> AnyConsole:
    """Standard error. Rich, whose import takes a while, is for terminals alone."""
    # Variables that make Rich assume a terminal.
    if not (sys.stderr.isatty() or os.environ.keys() & {"FORCE_COLOR", "TTY_COMPATIBLE"}):
        return PlainConsole()
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def table_console() -> Console:
    """Standard output; where it has no width of its own, as a file or a pipe, wide enough."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=220)


def print_line(console: AnyConsole, text: object) -> None:
    """Print the printable form of `text` as one line, without wrapping and markup."""
    if isinstance(console, PlainConsole):
        print(printable(text), file=sys.stderr, flush=True)
        return
    from rich.text import Text

    console.print(Text(printable(text)), soft_wrap=True)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings, and the messages and progress bars of Transformers and the Hub's client.

    Of the two, those that are imported by now are silenced; importing them takes seconds. Errors
    are raised. All settings are restored afterwards.
    """
    with ExitStack() as stack:
        if "huggingface_hub" in sys.modules:
            stack.enter_context(_quiet_hub())
        if "transformers" in sys.modules:
            stack.enter_context(_quiet_messages())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet_hub() -> Iterator[None]:
    from huggingface_hub.utils import logging as messages
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    verbosity, had_bars = messages.get_verbosity(), not are_progress_bars_disabled()
    messages.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        (enable_progress_bars if had_bars else disable_progress_bars)()


@contextmanager
def _quiet_messages() -> Iterator[None]:
    from transformers.utils import logging as messages

    # The two switches turn the Hub's bars along with their own; those are put right outside.
    disable_both: Callable[[], None] = messages.disable_progress_bar
    enable_both: Callable[[], None] = messages.enable_progress_bar
    verbosity, had_bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.ERROR)
    disable_both()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if had_bars:
            enable_both()


@contextmanager
def report_warnings(tell: Callable[[str], None], *, level: int = logging.WARNING) -> Iterator[None]:
    """Pass each warning in this package's log to `tell`, as a line that begins with its level.

    Announcements are passed, too, as they are.

    Args:
        level: `logging.INFO` also passes what is information.
    """
    level = min(level, ANNOUNCEMENT)
    handler = _Teller(tell, level)
    logger = logging.getLogger("whisper_flash_attention")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


# Level of what everybody should read, and which is no warning.
ANNOUNCEMENT = 25


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[str], None], level: int) -> None:
        super().__init__(level)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        is_announcement = record.levelno == ANNOUNCEMENT
        level = "" if is_announcement else f"{record.levelname.lower()}: "
        self._tell(f"{level}{record.getMessage()}")


# Characters.
LONGEST_BAR = 20
ENOUGH_OF_NAMES = 16
UPDATE_SECONDS = 0.1


class FileProgress:
    """Progress over files, as a context; one bar for all of them, which moves within a file, too.

    Threads may call `tell` while another is in `aside`: they wait for it.

    Args:
        console: where it is shown. If that is not a terminal, several files give a line each and
            one file gives none.
        files: the files to come, in order.
        ahead: files are opened before their turn, so that a line says which one is done, and not
            which one begins.
        shown: whether there is a bar, or lines, at all; messages are printed in any case.
        clock: the time in seconds.
    """

    def __init__(
        self,
        console: AnyConsole,
        files: Sequence[str],
        *,
        ahead: bool = False,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._files = files
        self._ahead = ahead
        self._lined = shown and len(files) > 1 and not console.is_terminal
        self._clock = clock
        self._begun = self._ended = self._asides = 0
        self._opening = ""
        self._shares: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._updated = -math.inf
        self._since: float | None = None
        self._lock = RLock()
        self._bar: Progress | None = None
        if shown and not isinstance(console, PlainConsole) and console.is_terminal:
            self._bar = _new_bar(console)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._updated = -math.inf
        self._update()
        if self._bar is not None:
            self._bar.stop()

    def begin(self, file: str) -> None:
        """The next file is being opened."""
        self._begun += 1
        self._opening = file
        if self._lined and not self._ahead:
            self._number(self._begun, file)
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

    def end(self, file: str) -> None:
        """Nothing is left to do for a file, or it failed."""
        with self._lock:
            self._ended += 1
            self.advance(file, 1.0)
            if self._lined and self._ahead:
                self._number(self._ended, file)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is printed."""
        with self._lock:
            self._asides += 1
            if self._bar is not None:
                self._bar.stop()
            try:
                yield
            finally:
                self._asides -= 1
                if self._bar is not None and not self._asides:
                    self._bar.start()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Say that a model is loaded, without the bar: a download has one of its own."""
        with self.aside():
            if self._bar is not None:
                self._bar.console.print("loading the model", end="\r")
            elif self._lined:
                print_line(self._console, f"loading the model for {len(self._files)} files")
            yield

    def tell(self, line: str) -> None:
        """Print a line where the progress is shown."""
        with self.aside():
            print_line(self._console, line)

    def state(self, room: float = math.inf) -> str:
        """How far it is, in one line: audio of all files, speed, time left, files under way.

        Where there is room for fewer characters, the speed, the audio and the time left give way in
        this order to the end of a name.
        """
        done, total = self._done_and_total()
        took = 0.0 if self._since is None else self._clock() - self._since
        audio = speed = left = ""
        if self._seconds:
            audio = f"{clock_time(done)} of {clock_time(total)}, "
        if took > 0 and done > 0:
            speed = f"{done / took:.1f} x real time, " if self._seconds else ""
            left = f"{clock_time(took * (total - done) / done)} left, "
        names = [file for file, share in self._shares.items() if share < 1] or [self._opening]
        names = [printable(name) for name in names]
        several = len(self._files) > 1
        place = f"{self._finished()}/{len(self._files)} done: " if several else ""
        least = min(ENOUGH_OF_NAMES, len(", ".join(names)))
        fits = (
            head
            for head in (audio + speed + left, audio + left, left, "")
            if len(head + place) + least <= room
        )
        head = next(fits, "") + place
        return head + _shortened(names, room - len(head))

    def _update(self) -> None:
        if self._bar is None:
            return
        from rich.text import Text

        # Of thousands of files, many windows are done between two pictures of a bar.
        now = self._bar.get_time()
        if now - self._updated < UPDATE_SECONDS:
            return
        self._updated = now
        done, total = self._done_and_total()
        # What precedes it takes the percentage, the bar and the blanks between.
        width = self._bar.console.width
        room = width - min(LONGEST_BAR, width // 6) - 7
        state = Text(self.state(max(room, 0)))
        state.truncate(max(room, 0), overflow="ellipsis")
        share = done / total if total else 0.0
        self._bar.update(self._bar.task_ids[0], completed=share, state=state.plain)

    def _number(self, number: int, file: str) -> None:
        print_line(self._console, f"[{number}/{len(self._files)}] {file}")

    def _finished(self) -> int:
        return sum(share >= 1 for share in self._shares.values())

    def _done_and_total(self) -> tuple[float, float]:
        """Seconds done, and those of all files; one of unknown length counts as the others do."""
        known = self._seconds.values()
        usual = sum(known) / len(known) if known else 1.0
        done = sum(share * self._seconds.get(file, usual) for file, share in self._shares.items())
        return done, sum(self._seconds.get(file, usual) for file in self._files)


def _shortened(names: Sequence[str], room: float) -> str:
    """Names with commas between, or the first one's end, which tells it from its neighbours."""
    from rich.cells import cell_len

    whole = ", ".join(names)
    if cell_len(whole) <= room:
        return whole
    more = f" + {len(names) - 1}" if len(names) > 1 else ""
    shown = max(int(room) - len(more), 1)
    if cell_len(names[0]) <= shown:
        return names[0] + more
    end = names[0][-shown:]
    while end and cell_len(end) >= shown:
        end = end[1:]
    return f"…{end}{more}"


def _new_bar(console: Console) -> Progress:
    """A bar with one task, whose field `state` is shown beside it."""
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
        BarColumn(bar_width=min(LONGEST_BAR, console.width // 6)),
        TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        # Text for standard output must not end up on the console of this bar.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("", total=1.0, state="")
    return bar


def clock_time(seconds: float) -> str:
    """Seconds as minutes and hours: `0:07`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_speed(audio_seconds: float, work_seconds: float) -> str:
    """Say how fast work on audio goes."""
    speed = audio_seconds / work_seconds if work_seconds else 0.0
    return f"{audio_seconds:.1f} s of audio in {work_seconds:.1f} s ({speed:.1f} x real time)"


class StandardOutput:
    """Writes to standard output; what its encoding cannot hold becomes `?`.

    Attributes:
        lost: the encoding that could not hold some text; None if nothing was lost.
    """

    def __init__(self) -> None:
        self.lost: str | None = None

    def write(self, text: str) -> None:
        """Write text as it is, and flush.

        Raises:
            OSError: that cannot be done; what follows is written nowhere.
        """
        # Redirected under Windows, it may be of an encoding that knows few characters.
        encoding = sys.stdout.encoding or "utf-8"
        encoded = text.encode(encoding, errors="replace")
        if encoded.decode(encoding) != text:
            self.lost = encoding
        with _failing_once():
            sys.stdout.write(encoded.decode(encoding))
            sys.stdout.flush()

    def write_json(self, line: str) -> None:
        """Write a line of JSON in UTF-8, whatever the encoding, and flush.

        Raises:
            OSError: as `write`.
        """
        with _failing_once():
            sys.stdout.flush()
            sys.stdout.buffer.write(f"{line}\n".encode())
            sys.stdout.buffer.flush()


@contextmanager
def _failing_once() -> Iterator[None]:
    """Drop what is buffered where it cannot be written: the end of the process would try again."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise
