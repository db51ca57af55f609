from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.terminal import printable
from whisper_flash_attention.transcribe import (
    FORMATS,
    Segment,
    SubtitleOptions,
    Transcription,
    Word,
    render,
    write,
)
from whisper_flash_attention.transcribe.writers import render_line

SPOKEN = Transcription(
    "Good morning. 1 < 2 & true.",
    "en",
    (
        Segment(0.0, 1.5, "Good morning.", (1, 2)),
        Segment(3661.25, 3662.0, "1 < 2 & true.", (3,)),
    ),
    3700.0,
)
SILENT = Transcription("", "en", (), 5.0)
TIME = r"(\d{2,}):(\d\d):(\d\d)[.,](\d{3})"


def milliseconds(clock: str) -> int:
    match = re.fullmatch(TIME, clock)
    assert match is not None
    hours, minutes, seconds, rest = map(int, match.groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest


def cues(rendered: str) -> list[tuple[int, int, str]]:
    """Read subtitles back: (start, end) in milliseconds and the text of each cue."""
    found = []
    for block in rendered.split("\n\n"):
        lines = block.strip("\n").split("\n")
        [place] = [i for i, line in enumerate(lines) if "-->" in line] or [None]
        if place is not None:
            start, end = lines[place].split(" --> ")
            found.append((milliseconds(start), milliseconds(end), "\n".join(lines[place + 1 :])))
    return found


def test_txt_is_a_line_per_segment() -> None:
    assert render(SPOKEN, "txt") == "Good morning.\n1 < 2 & true.\n"


def test_srt_has_numbers_and_commas() -> None:
    assert render(SPOKEN, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nGood morning.\n\n"
        "2\n01:01:01,250 --> 01:01:02,000\n1 < 2 & true.\n"
    )


def test_vtt_has_its_header_points_and_escapes() -> None:
    assert render(SPOKEN, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nGood morning.\n\n"
        "01:01:01.250 --> 01:01:02.000\n1 &lt; 2 &amp; true.\n"
    )


def test_tsv_is_openai_whispers_table() -> None:
    tabbed = Transcription("", "en", (Segment(0.0004, 1.2345, "one\ttwo\nthree"),), 2.0)
    assert render(tabbed, "tsv") == "start\tend\ttext\n0\t1234\tone two three\n"


def test_lrc_has_minutes_seconds_and_hundredths() -> None:
    assert render(SPOKEN, "lrc") == "[00:00.00]Good morning.\n[61:01.25]1 < 2 & true.\n"
    rounded = Transcription("", "en", (Segment(59.999, 60.0, "one"),), 60.0)
    assert render(rounded, "lrc") == "[01:00.00]one\n"


HIGHLIGHTED = Transcription(
    "a <b",
    "en",
    (Segment(0.0, 1.0, "a <b", words=(Word(0, 0.4, "a", 1), Word(0.5, 1, "<b", 1))),),
    1.0,
)


def test_the_spoken_word_is_underlined_word_by_word() -> None:
    options = SubtitleOptions(max_line_width=2, highlight_words=True)
    assert render(HIGHLIGHTED, "vtt", options) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.400\n<u>a</u>\n&lt;b\n\n"
        "00:00:00.400 --> 00:00:00.500\na\n&lt;b\n\n"
        "00:00:00.500 --> 00:00:01.000\na\n<u>&lt;b</u>\n"
    )
    wide = SubtitleOptions(highlight_words=True)
    assert render(HIGHLIGHTED, "srt", wide) == (
        "1\n00:00:00,000 --> 00:00:00,400\n<u>a</u> <b\n\n"
        "2\n00:00:00,400 --> 00:00:00,500\na <b\n\n"
        "3\n00:00:00,500 --> 00:00:01,000\na <u><b</u>\n"
    )


def test_options_change_subtitles_only() -> None:
    options = SubtitleOptions(max_line_width=5)
    changed = {name for name in FORMATS if render(SPOKEN, name, options) != render(SPOKEN, name)}
    assert changed == {"srt", "vtt", "ass"}
    assert "Good\nmorning.\n" in render(SPOKEN, "srt", options)


def test_json_holds_everything() -> None:
    assert Transcription.from_dict(json.loads(render(SPOKEN, "json"))) == SPOKEN


def test_json_keeps_other_scripts_readable() -> None:
    assert "おはよう" in render(Transcription("おはよう", "ja", (), 1.0), "json")


def test_silence_is_an_empty_but_valid_file() -> None:
    assert render(SILENT, "txt") == ""
    assert render(SILENT, "srt") == ""
    assert render(SILENT, "vtt") == "WEBVTT\n"
    assert render(SILENT, "tsv") == "start\tend\ttext\n"
    assert render(SILENT, "lrc") == ""
    assert json.loads(render(SILENT, "json"))["segments"] == []


@pytest.mark.parametrize("output_format", ["srt", "vtt"])
def test_text_cannot_break_out_of_its_cue(output_format: str) -> None:
    text = "first\n\n2\n00:00:09,000 --> 00:00:10,000\nsecond"
    rendered = render(Transcription(text, "en", (Segment(0, 1, text),), 1.0), output_format)
    [(start, end, _)] = cues(rendered)
    assert (start, end) == (0, 1000)
    assert rendered.count("-->") == 1


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 10**6)), max_size=5))
def test_times_in_milliseconds_come_back_exactly(times: list[tuple[int, int]]) -> None:
    segments = tuple(Segment(a / 1000, (a + length) / 1000, "word") for a, length in times)
    in_order = sorted(times, key=lambda pair: pair[0])
    expected = [(a, a + length, "word") for a, length in in_order]
    for output_format in ("srt", "vtt"):
        rendered = render(Transcription("", "en", segments, 0.0), output_format)
        assert cues(rendered) == expected


@given(st.text(min_size=1).filter(str.strip))
def test_vtt_text_comes_back_but_for_white_space(text: str) -> None:
    rendered = render(Transcription(text, "en", (Segment(0, 1, text),), 1.0), "vtt")
    written = rendered.split("\n", 3)[3].removesuffix("\n")
    assert "<" not in written
    assert ">" not in written
    unescaped = written.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert unescaped == printable(" ".join(text.split()), is_speech=True)
    if "&" not in text:
        assert html.unescape(written) == unescaped


@pytest.mark.parametrize("text", ["a --> b", "a ---> b", "a ------> b"])
def test_srt_breaks_arrows_up(text: str) -> None:
    rendered = render(Transcription(text, "en", (Segment(0, 1, text),), 1.0), "srt")
    assert rendered.count("-->") == 1
    assert rendered.endswith("\na -> b\n")


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_is_written_is_what_is_rendered(tmp_path: Path, output_format: str) -> None:
    path = tmp_path / f"talk.{output_format}"
    write(SPOKEN, path, output_format)
    assert path.read_bytes().decode("utf-8") == render(SPOKEN, output_format)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_in_text_chooses_the_format_by_its_end(tmp_path: Path) -> None:
    write(SPOKEN, f"{tmp_path}/talk.srt")
    assert (tmp_path / "talk.srt").read_text("utf-8") == render(SPOKEN, "srt")
    with pytest.raises(OptionError, match="output_format is '': give txt"):
        write(SPOKEN, f"{tmp_path}/talk")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "talk.txt"
    path.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OptionError, match=r"talk\.txt: cannot be written"):
        write(SPOKEN, path, "txt")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "talk.txt"
    path.write_text("by hand")
    with pytest.raises(OptionError, match=r"talk\.txt: exists already"):
        write(SPOKEN, path, "txt")
    assert path.read_text() == "by hand"
    write(SPOKEN, path, "txt", overwrite=True)
    assert path.read_text() == render(SPOKEN, "txt")
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 251}.txt"
    write(SPOKEN, path, "txt")
    assert path.is_file()
    with pytest.raises(OptionError, match="cannot be written"):
        write(SPOKEN, tmp_path / f"{'a' * 252}.txt", "txt")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        write(SPOKEN, tmp_path / "missing" / "talk.txt", "txt")


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="output_format is 'doc': give txt, json, srt, vtt, ass, tsv or lrc"
    ):
        render(SPOKEN, "doc")


def test_ass_colours_each_word_when_it_is_spoken() -> None:
    words = (Word(0.1, 0.4, " One", 1), Word(0.5, 0.8, " {two}\\N", 1), Word(0.8, 1.9, " three", 1))
    first = Segment(0, 2, "One {two}\\N three", words=words)
    second = Segment(3600, 36_000.125, "Without times, {here}.")
    text = render(Transcription("", "en", (first, second), 40_000.0), "ass")
    assert text.startswith("[Script Info]\nScriptType: v4.00+\n")
    rows = [line for line in text.splitlines() if line.startswith("Dialogue: ")]
    assert rows == [
        "Dialogue: 0,0:00:00.10,0:00:01.90,Default,,0,0,0,,"
        r"{\k30}One{\k10} {\k30}\{two\}" + "\\\u2060N" + r" {\k110}three",
        r"Dialogue: 0,1:00:00.00,10:00:00.13,Default,,0,0,0,,"
        r"{\1c&HFFFFFF&}Without times, \{here\}.",
    ]
    lines = render(Transcription("", "en", (first,), 2.0), "ass", SubtitleOptions(max_line_width=9))
    assert r"{\k30}One{\k10}\N" in lines or r"One\N" in lines


def test_words_on_a_terminal_have_the_colour_of_their_probability() -> None:
    words = (Word(0, 1, " Never", 0.05), Word(1, 2, " mind", 0.99), Word(2, 3, "\x1b[2J.", 0.5))
    segment = Segment(0, 3, "Never mind.", words=words, channel=2)
    assert render_line(segment, coloured=True) == (
        "[channel 2] \x1b[38;5;196mNever\x1b[0m \x1b[38;5;82mmind\x1b[0m"
        "\x1b[38;5;226m\\x1b[2J.\x1b[0m\n"
    )
    assert render_line(segment) == "[channel 2] Never mind.\n"
