"""Text of others is safe to print, and says what it was."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import whisper_flash_attention
from tests.batch.fakes import FakeModel, all_rows, write_wav
from tests.batch.test_results import bad
from tests.conftest import REPOSITORY
from tests.transcribe.fakes import FakeTranscriber
from whisper_flash_attention.audio import load_audio
from whisper_flash_attention.batch.items import Item
from whisper_flash_attention.batch.progress import ArchiveProgress
from whisper_flash_attention.cli import app
from whisper_flash_attention.cli import batch as batch_command
from whisper_flash_attention.cli import transcribe as transcribe_command
from whisper_flash_attention.terminal import FileProgress, json_line, print_line, printable
from whisper_flash_attention.transcribe import FORMATS, Segment, Transcription, render

PACKAGE = Path(whisper_flash_attention.__file__).parent
# Retitles a terminal, clears it, imitates a message, reorders what follows, is not UTF-8.
EVIL = "a\x1b]0;pwned\x07\x1b[2J\nerror: all is lost\r\u202egnp\u2028\x9b1m\udce9\u2066.wav"
ANY_TEXT = st.text(
    st.characters(exclude_categories=[])  # lone surrogates, too
    | st.sampled_from("\x1b\n\r\x07\x85\x9b\u2028\u202e\u2066\ufeff\udce9\\[]"),
    max_size=40,
)


def is_safe(text: str, *, lines: bool = False) -> bool:
    """Whether nothing in a text acts on a terminal; with `lines` it may have several."""
    bare = text.replace("\n", "") if lines else text
    overrides = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return not any(
        unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(each) in overrides
        for each in bare
    )


def check_printable(text: str) -> None:
    shown = printable(text)
    assert is_safe(shown)
    assert printable(shown) == shown
    shown.encode("utf-8")
    # All that was fit to be seen is there, and what was not can be found out.
    if "\\" not in text:
        undone = re.sub(
            r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])",
            lambda found: found[0].encode().decode("unicode_escape"),
            shown,
        )
        assert undone == text


@settings(deadline=None, max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_has_a_printable_form(text: str) -> None:
    check_printable(text)


@pytest.mark.slow
@settings(deadline=None, max_examples=20_000)
@given(text=ANY_TEXT)
def test_any_text_has_a_printable_form_at_length(text: str) -> None:
    check_printable(text)


@pytest.mark.parametrize("output_format", FORMATS)
@settings(deadline=None, max_examples=50)
@given(text=ANY_TEXT)
def test_no_text_of_a_model_acts_on_a_terminal(output_format: str, text: str) -> None:
    segments = (Segment(0.0, 1.0, text), Segment(1.0, 2.0, "then"))
    rendered = render(Transcription(text, "en", segments, 2.0), output_format)
    kept = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    if output_format != "json":  # subtitles in Arabic and Hebrew are written with these
        rendered = rendered.translate(dict.fromkeys(map(ord, kept)))
    assert is_safe(rendered.replace("\t", ""), lines=True)
    rendered.encode("utf-8")
    if output_format == "vtt":
        assert rendered.count("-->") == rendered.count("\n\n")
        assert not re.search(r"<(?!u>|/u>)", rendered.split("\n", 1)[1])


def test_lyrics_have_no_times_of_their_own() -> None:
    text = "[0:01.00]never <00:02.00>said"
    rendered = render(Transcription(text, "en", (Segment(3.0, 4.0, text),), 4.0), "lrc")
    assert re.findall(r"[\[<]\d+:\d", rendered) == ["[00:0"]


@settings(deadline=None, max_examples=200)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | ANY_TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    )
)
def test_a_line_of_json_is_safe_and_read_as_what_it_was(value: Any) -> None:
    line = json_line(value)
    assert is_safe(line)
    read = json.loads(line.encode("utf-8"))
    # Two halves of a pair that are side by side cannot be told from the pair, in any JSON.
    assert json.dumps(read) == json.dumps(value)


def test_letters_of_all_scripts_stay_as_they_are() -> None:
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # joined without width
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    for text in ("C:\\talks\\a.wav", "naïve ½ “x”", persian, family, "हिन्दी 日本語", "[b]:smile:"):
        assert printable(text) == text
    assert printable(EVIL) == (
        "a\\x1b]0;pwned\\x07\\x1b[2J\\nerror: all is lost\\r\\u202egnp\\u2028\\x9b1m\\udce9"
        "\\u2066.wav"
    )
    hebrew = "\u202b\u05e9\u05dc\u05d5\u05dd\u202c\u200f"
    assert printable(hebrew, is_speech=True) == hebrew
    assert printable("a\x1b\x85\u2028\udce9", is_speech=True) == "a\\x1b\\x85\\u2028\\udce9"


def test_a_line_is_printed_without_markup_or_emoji_codes_and_unwrapped() -> None:
    screen = io.StringIO()
    print_line(Console(file=screen, width=20), f"[b]:smile: {EVIL} {'long ' * 10}")
    assert screen.getvalue() == f"[b]:smile: {printable(EVIL)} {'long ' * 10}\n"


def test_what_is_shown_in_a_terminal_is_printable_too() -> None:
    """A bar has escape sequences of its own; those of the names are not among them."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=300)
    with FileProgress(console, [EVIL]) as progress:
        progress.begin(EVIL)
        progress.tell(f"error: {EVIL}")
    with ArchiveProgress(console, [Item("a\x1b]0;x\x07\n", "a")]) as archive:
        archive.add([bad("a\x1b]0;x\x07\nb") | {"error": EVIL}])
    text = screen.getvalue()
    assert "\\x1b]0;pwned\\x07" in text
    assert "\x1b]" not in text
    assert "\x07" not in text
    assert "\nerror: all" not in text
    assert "\u202e" not in text


def test_every_print_goes_through_one_function() -> None:
    """Nothing in the package prints a string of its own making to a console."""
    allowed = {"cli/__init__.py", "cli/main.py", "cli/typer_commands.py", "terminal.py"}
    # Fixed text, tables made of printable text, and transcripts, which `one_line` has been over.
    fixed = {
        *("transcribe/output.py", "cli/doctor.py", "cli/benchmark.py", "cli/throughput.py"),
        *("parity/report.py", "cli/batch.py", "cli/peers.py", "cli/serving.py"),
        # Processes of the benchmark, whose lines another one reads.
        *("benchmark/serve_clients.py", "benchmark/serve_random.py"),
    }
    wrong = set()
    for path in PACKAGE.glob("**/*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or name in allowed:
                continue
            called = ast.unparse(node.func)
            if not called.endswith(".print") and called not in ("print", "typer.echo"):
                continue
            has_names = any(isinstance(each, ast.FormattedValue) for each in ast.walk(node))
            if name not in fixed or (has_names and "printable" not in ast.unparse(node)):
                wrong.add(f"{name}: {ast.unparse(node)}")
    # Of `doctor`: its own sentences.
    assert wrong == {
        "cli/doctor.py: console.print(f'  {reason}', soft_wrap=True)",
        "cli/doctor.py: console.print(f'\\n{verdict}', style='bold')",
    }


def evil_name(suffix: str = ".wav") -> str:
    """A name that this machine's file system can have, with as much evil as it takes."""
    return f"a\x1b]0;pwned\x07\x1b[2J\nerror: all is lost\r\u202e\u2028\x9b1m{suffix}"


@pytest.fixture
def evil_folder(tmp_path: Path) -> Path:
    """Recordings that are whole, damaged and none at all, under evil names in an evil folder."""
    folder = tmp_path / f"talks{evil_name('')}"
    folder.mkdir()
    write_wav(folder / evil_name("whole.wav"))
    (folder / evil_name("text.wav")).write_text("no sound")
    cut = write_wav(folder / evil_name("cut.wav"), 32_000)
    cut.write_bytes(cut.read_bytes()[:40_000])
    with open(os.fsencode(folder) + b"/caf\xe9.wav", "wb") as file:
        file.write(b"nothing")
    return folder


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.skipif(os.name != "posix", reason="names of files have no control characters there")
def test_transcribe_shows_evil_names_in_their_printable_form(
    evil_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTranscriber()
    monkeypatch.setattr(
        transcribe_command.Transcriber,
        "from_pretrained",
        classmethod(lambda cls, source, **options: fake),
    )
    for options in ((), ("--json-lines",), ("-o", tmp_path / "out", "-f", "all")):
        code, stdout, stderr = invoke("transcribe", evil_folder, *options)
        assert code == 1
        assert is_safe(stderr, lines=True)
        assert is_safe(stdout, lines=True)
        assert "\\x1b]0;pwned\\x07" in stderr
        assert not any(line.startswith("error: all") for line in stderr.splitlines())
    for line in invoke("transcribe", evil_folder, "--json-lines")[1].splitlines():
        assert json.loads(line)["file"].startswith(str(evil_folder))  # the true name
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(FORMATS)


@pytest.mark.skipif(os.name != "posix", reason="names of files have no control characters there")
def test_batch_shows_evil_names_in_their_printable_form(
    evil_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_command, "Model", lambda source, **where: FakeModel(source))
    out = tmp_path / f"out{evil_name('')}"
    code, stdout, stderr = invoke("batch", evil_folder, "-o", out, "--subtitles", "srt,vtt")
    assert (code, stdout) == (1, "")
    assert is_safe(stderr, lines=True)
    assert "error: a\\x1b]0;pwned\\x07" in stderr
    rows = all_rows(out)
    assert set(rows) == {*map(evil_name, ("cut.wav", "text.wav", "whole.wav")), "caf\\udce9.wav"}
    assert all(is_safe(path.name) for path in (out / "subtitles").iterdir())
    manifest = tmp_path / "archive.jsonl"
    lines = (
        {"id": evil_name(), "path": evil_name(), evil_name(): 1},
        {"id": "", "path": evil_name()},
        {"id": "b", "path": "b.wav", "task": evil_name()},
        {"id": "c", "path": "c.wav", "start": evil_name()},
        {"id": "d", "path": "d.wav", "language": evil_name()},
        {"id": "\udce9", "path": "d.wav"},
    )
    manifest.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for extra in ((), ("--retry-errors",), ("--no-resume",), ("--model", evil_name())):
        code, stdout, stderr = invoke("batch", manifest, "-o", tmp_path / "other", *extra)
        assert code in (1, 2)
        assert is_safe(stderr, lines=True), extra
    twice = [json.dumps({"id": evil_name(), "path": "a"})] * 2
    manifest.write_text("\n".join(twice))
    code, _, stderr = invoke("batch", manifest, "-o", tmp_path / "other")
    assert code == 2
    assert is_safe(stderr, lines=True)
    assert len(stderr.splitlines()) == 1


def test_mistakes_of_the_command_line_are_printable() -> None:
    for arguments in (
        ("transcribe", f"--{EVIL}"),
        ("transcribe", "a.wav", "b.wav", "--task", EVIL),
        ("transcribe", EVIL + "/*.wav"),
        ("transcribe", "a.wav", "b.wav", "-f", EVIL),
        ("batch", "a", "-o", "b", "--limit", EVIL.replace("\udce9", "")),
        ("batch", EVIL, "-o", EVIL),
        (EVIL,),
        (f"--{EVIL}",),
        ("benchmark", "--setting", EVIL),
        ("benchmark", f"--{EVIL}"),
        ("benchmark", "throughput", f"--{EVIL}"),
        ("benchmark", "mlperf", f"--{EVIL}"),
    ):
        code, stdout, stderr = invoke(*arguments)
        assert code == 2, arguments
        assert is_safe(stderr + stdout, lines=True), arguments
        shown = "".join(stderr.split()).replace("│", "")
        assert "pwned" in shown or "--limit" in arguments, arguments


def test_the_log_has_printable_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_wav(tmp_path / evil_name(), 32_000)
    path.write_bytes(path.read_bytes()[:40_000])
    with caplog.at_level(logging.WARNING):
        load_audio(path)
    assert caplog.messages
    assert all(map(is_safe, caplog.messages))


@pytest.mark.skipif(os.name != "posix", reason="names of files are text elsewhere")
def test_a_whole_process_prints_nothing_that_a_terminal_acts_on(tmp_path: Path) -> None:
    """Standard error of the program itself, bytes as they come."""
    folder = tmp_path / "talks"
    folder.mkdir()
    (folder / evil_name()).write_text("no sound")
    with open(os.fsencode(folder) + b"/caf\xe9\x9b.wav", "wb") as file:
        file.write(b"nothing")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    program = [sys.executable, "-m", "whisper_flash_attention", "transcribe", str(folder)]
    done = subprocess.run(program, capture_output=True, env=environment, check=False)
    assert done.returncode == 1
    assert is_safe(done.stderr.decode("utf-8"), lines=True)
    assert b"\\x1b]0;pwned" in done.stderr
    assert b"caf\\udce9\\udc9b.wav" in done.stderr
    shutil.rmtree(folder)
