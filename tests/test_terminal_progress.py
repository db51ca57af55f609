from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.conftest import REPOSITORY
from whisper_flash_attention.cli.transcribe import spoken
from whisper_flash_attention.terminal import (
    FileProgress,
    PlainConsole,
    describe_speed,
    error_console,
)


def progress_on(terminal: bool, *files: str) -> tuple[FileProgress, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80, highlight=False)
    return FileProgress(console, files), screen


def test_outside_a_terminal_several_files_give_a_line_each() -> None:
    progress, screen = progress_on(False, "a.wav", "[b].wav")
    with progress:
        progress.begin("a.wav")
        progress.advance("a.wav", 0.5)
        progress.tell("error: [a] is bad")
        progress.begin("[b].wav")
    assert screen.getvalue() == "[1/2] a.wav\nerror: [a] is bad\n[2/2] [b].wav\n"


def test_lines_of_files_that_are_opened_ahead_come_when_they_are_done() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False, width=80, highlight=False)
    with FileProgress(console, ["a.wav", "b.wav", "c.wav"], ahead=True) as progress:
        with progress.loading():
            pass
        for name in ("a.wav", "b.wav", "c.wav"):
            progress.begin(name)
        assert screen.getvalue() == "loading the model for 3 files\n"
        progress.advance("b.wav", 1.0)
        for name in ("b.wav", "a.wav"):
            progress.end(name)
    assert screen.getvalue().endswith(" files\n[1/3] b.wav\n[2/3] a.wav\n")


def test_outside_a_terminal_one_file_gives_no_line() -> None:
    progress, screen = progress_on(False, "a.wav")
    with progress:
        progress.begin("a.wav")
    assert screen.getvalue() == ""


def test_in_a_terminal_the_bar_shows_all_files_and_names_those_under_way() -> None:
    progress, screen = progress_on(True, "a.wav", "b.wav", "c.wav")
    with progress:
        for name, seconds in (("a.wav", 100.0), ("b.wav", 300.0)):
            progress.begin(name)
            progress.measured(name, seconds)
        progress.advance("a.wav", 0.0)
        progress.advance("b.wav", 0.0)
        progress.begin("c.wav")
        progress.advance("b.wav", 0.5)
        assert progress.state().endswith("0/3 done: a.wav, b.wav")
        progress.advance("a.wav", 1.0)
        # c.wav counts as the mean of the others.
        assert progress.state().startswith("4:10 of 10:00, ")
        assert progress.state().endswith("1/3 done: b.wav")
        progress.tell("warning: b.wav: is cut off")
    assert " 42%" in screen.getvalue()
    assert "warning: b.wav: is cut off\n" in screen.getvalue()


def test_loading_shows_a_line_where_the_bar_was() -> None:
    for terminal, shown in ((True, True), (False, False)):
        progress, screen = progress_on(terminal, "a.wav")
        with progress, progress.loading():
            assert screen.getvalue().endswith("loading the model\r") is shown


def test_text_for_standard_output_does_not_end_up_on_the_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress, screen = progress_on(True, "a.wav")
    before = sys.stdout
    with progress, progress.aside():
        assert sys.stdout is before
        print("the text")
    assert capsys.readouterr().out == "the text\n"
    assert "the text" not in screen.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("folder", ["folder/" * 20, "長い名前/" * 20])
def test_the_percentage_and_the_end_of_the_name_stay_at_any_width(width: int, folder: str) -> None:
    name = f"{folder}0016.wav"
    now = iter(range(0, 1000, 10))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, highlight=False)
    progress = FileProgress(console, [name], clock=lambda: float(next(now)))
    with progress:
        progress.begin(name)
        progress.measured(name, 100.0)
        progress.advance(name, 0.0)
        progress.advance(name, 0.5)
        state = progress.state()
    assert re.fullmatch(rf"0:50 of 1:40, \d\.\d x real time, 0:\d\d left, {name}", state)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]", plain) if line.strip()]
    assert re.search(r" 50% .* left, …\S*/0016.wav$" if width > 40 else "….*0016.wav$", lines[-1])
    assert all(cell_len(line) <= width for line in lines)


def test_what_there_is_no_room_for_gives_way_to_the_names() -> None:
    names = ["recordings/friday/call-0016001.flac", "recordings/friday/call-0016002.flac"]
    now = iter((0.0, *[20.0] * 9))
    progress = FileProgress(PlainConsole(), names, clock=lambda: next(now))
    for name in names:
        progress.measured(name, 60.0)
        progress.advance(name, 0.0)
    progress.advance(names[1], 0.5)
    both = ", ".join(names)
    whole = f"0:30 of 2:00, 1.5 x real time, 1:00 left, 0/2 done: {both}"
    assert progress.state(len(whole)) == whole
    shortened = "…cordings/friday/call-0016001.flac + 1"
    assert progress.state(90) == whole.replace(both, shortened)
    assert progress.state(63) == "0:30 of 2:00, 1:00 left, 0/2 done: …riday/call-0016001.flac + 1"
    assert progress.state(43) == "1:00 left, 0/2 done: …call-0016001.flac + 1"
    assert progress.state(24) == "0/2 done: …6001.flac + 1"


def test_nothing_is_shown_where_that_is_not_wanted() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False, width=80)
    progress = FileProgress(console, ["a.wav", "b.wav"], shown=False)
    with progress:
        progress.begin("a.wav")
        progress.tell("error: a.wav: is bad")
    assert screen.getvalue() == "error: a.wav: is bad\n"


def test_a_thread_with_a_message_waits_for_what_is_printed() -> None:
    progress, screen = progress_on(False, "a.wav")
    with progress:
        with progress.aside():
            thread = threading.Thread(target=progress.tell, args=("second",))
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
            screen.write("first\n")
        thread.join()
    assert screen.getvalue() == "first\nsecond\n"


def test_the_documentation_shows_the_bar_and_the_last_line() -> None:
    page = (REPOSITORY / "docs" / "command-line.md").read_text("utf-8")
    now = iter((0.0, 10.0, 10.0, 10.0, 10.0, 10.0))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    progress = FileProgress(console, ["a.wav", "b.wav", "c.wav"], clock=lambda: next(now, 10.0))
    for name, seconds in (("a.wav", 100.0), ("b.wav", 300.0)):
        progress.begin(name)
        progress.measured(name, seconds)
    progress.advance("b.wav", 0.5)
    progress.advance("a.wav", 1.0)
    assert progress.state() in page
    summary = describe_speed(600.0, 24.0)
    assert f"{spoken([('de', 0.976)])}, 2 files written to texts, {summary}" in page


@pytest.mark.parametrize("terminal", [False, True])
def test_each_of_many_files_costs_the_same(terminal: bool) -> None:
    """Not one look at all files for every window."""
    names = [f"{number}.wav" for number in range(5_000)]
    progress, _ = progress_on(terminal, *names)
    progress._lined = False
    start = time.process_time()
    with progress:
        for name in names:
            progress.begin(name)
            progress.measured(name, 10.0)
            progress.advance(name, 0.5)
            progress.advance(name, 1.0)
    # One look takes a millisecond; of 15,000 there are ten in each second.
    assert time.process_time() - start < 4.0


def test_standard_error_that_is_no_terminal_gets_lines(monkeypatch, capsys) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    console = error_console()
    assert isinstance(console, PlainConsole)
    with FileProgress(console, ["a.mp3", "b.mp3"]) as progress:
        progress.begin("a.mp3")
        progress.measured("a.mp3", 5.0)
        progress.advance("a.mp3", 0.5)
        progress.tell("error: \x1b[31m")
    assert capsys.readouterr().err == "[1/2] a.mp3\nerror: \\x1b[31m\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(error_console(), Console)
