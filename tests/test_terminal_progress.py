from __future__ import annotations

import io
import sys
import threading

import pytest
from rich.console import Console

from whisper_flash_attention.terminal import FileProgress


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


def test_outside_a_terminal_one_file_gives_no_line() -> None:
    progress, screen = progress_on(False, "a.wav")
    with progress:
        progress.begin("a.wav")
    assert screen.getvalue() == ""


def test_in_a_terminal_a_bar_moves_within_a_file() -> None:
    progress, screen = progress_on(True, "a.wav", "b.wav")
    with progress:
        progress.begin("a.wav")
        progress.begin("b.wav")
        progress.advance("b.wav", 0.5)
        progress.advance("a.wav", 0.25)
        progress.advance("a.wav", 1.0)
        progress.tell("warning: b.wav: is cut off")
    assert "[2/2] b.wav" in screen.getvalue()
    assert " 75%" in screen.getvalue()
    assert "warning: b.wav: is cut off\n" in screen.getvalue()


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


def test_in_a_terminal_the_bar_shows_the_speed() -> None:
    name = f"{'folder/' * 20}a.wav"
    progress, screen = progress_on(True, name)
    with progress:
        progress.begin(name)
        progress.measure(0.0, 0.0)
        progress.measure(30.0, 1.5)
        progress.tell("a line")
    assert "30 s, 20.0 x real time" in screen.getvalue()
    assert "[1/1] fol…" in screen.getvalue()
    assert "/folder/a.wav " in screen.getvalue()


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
