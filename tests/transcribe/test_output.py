from __future__ import annotations

import json
from pathlib import Path

import pytest

from whisper_flash_attention.errors import OptionError, WhisperFlashError
from whisper_flash_attention.terminal import StandardOutput
from whisper_flash_attention.transcribe import FORMATS, Segment, SubtitleOptions, Transcription
from whisper_flash_attention.transcribe.inputs import Input
from whisper_flash_attention.transcribe.output import Output, chosen_formats

TALK = Input("talks/2024/talk.v1.mp3", Path("2024/talk.v1.mp3"), named=False)
OTHER = Input("talks/2025/talk.v1.mp3", Path("2025/talk.v1.mp3"), named=False)
NAMED = Input("talks/2024/talk.v1.mp3", Path("talk.v1.mp3"))
TRANSCRIPTION = Transcription("Grüße.", "de", (Segment(0.0, 1.0, "Grüße.", (1,)),), 1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ("txt",)),
        (["srt"], ("srt",)),
        (["srt, txt", "srt"], ("srt", "txt")),
        (["lrc", "all"], ("lrc", *(name for name in FORMATS if name != "lrc"))),
    ],
)
def test_formats_may_be_repeated_or_joined(values: list[str], expected: tuple[str, ...]) -> None:
    assert chosen_formats(values) == expected


@pytest.mark.parametrize("value", ["doc", "txt,doc", "", "srt,,txt"])
def test_an_unknown_format_is_refused(value: str) -> None:
    with pytest.raises(OptionError, match=r"output_format is '(doc)?': give txt, json, srt, vtt"):
        chosen_formats([value])


def test_files_keep_their_folders_and_the_rest_of_their_names(tmp_path: Path) -> None:
    output = Output(("srt", "txt"), tmp_path / "out")
    output.prepare([TALK, OTHER])
    output.deliver(TALK, TRANSCRIPTION, headed=True)
    output.deliver(OTHER, TRANSCRIPTION, headed=True)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(map(Path.as_posix, written)) == [
        *("out/2024/talk.v1.srt", "out/2024/talk.v1.txt"),
        *("out/2025/talk.v1.srt", "out/2025/talk.v1.txt"),
    ]


def test_what_is_there_is_kept_and_what_is_missing_is_written(tmp_path: Path) -> None:
    output = Output(("srt", "txt"), tmp_path)
    by_hand = tmp_path / "2024" / "talk.v1.srt"
    by_hand.parent.mkdir()
    by_hand.write_text("by hand")
    output.prepare([TALK])
    assert not output.is_done(TALK)
    output.deliver(TALK, TRANSCRIPTION, headed=False)
    assert by_hand.read_text() == "by hand"
    assert output.is_done(TALK)
    assert output.resumes
    again = Output(("srt", "txt"), tmp_path, overwrite=True)
    assert not again.is_done(TALK)
    assert not again.resumes
    again.deliver(TALK, TRANSCRIPTION, headed=False)
    assert "Grüße." in by_hand.read_text(encoding="utf-8")


def test_the_only_recording_named_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "talk.v1.txt").touch()
    with pytest.raises(OptionError, match=r"talk.v1.txt: exists already; --overwrite replaces"):
        Output(folder=tmp_path).prepare([NAMED])
    Output(folder=tmp_path, overwrite=True).prepare([NAMED])
    Output(folder=tmp_path).prepare([NAMED, OTHER])


def test_a_line_of_json_per_segment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for output in (
        Output(json_lines=True),
        Output(("srt",), tmp_path, json_lines=True),
    ):
        output.prepare([NAMED])
        output.deliver(NAMED, TRANSCRIPTION, headed=True)
        [line] = capsys.readouterr().out.splitlines()
        assert "Grüße" in line
        assert json.loads(line) == {
            "file": NAMED.name,
            "segment": TRANSCRIPTION.to_dict()["segments"][0],
        }
    assert (tmp_path / "talk.v1.srt").is_file()


@pytest.mark.parametrize("headed", [True, False])
def test_text_on_standard_output(capsys: pytest.CaptureFixture[str], headed: bool) -> None:
    Output().deliver(TALK, TRANSCRIPTION, headed=headed)
    heading = f"==> {TALK.name} <==\n" if headed else ""
    assert capsys.readouterr().out == f"{heading}Grüße.\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (Output(("srt",)), "srt of several files needs --output-dir"),
        (Output(("srt", "txt")), r"several formats \(srt, txt\) need --output-dir"),
        (Output(("srt",), json_lines=True), "srt beside --json-lines needs --output-dir"),
        (Output(overwrite=True), "--overwrite is about files"),
        (
            Output(("txt", "lrc"), subtitles=SubtitleOptions(max_line_width=9)),
            "lines and cues are for srt, vtt, ass, and the output is txt, lrc",
        ),
    ],
)
def test_options_that_do_not_go_together(output: Output, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        output.prepare([TALK, OTHER])


def test_two_recordings_for_one_file_are_refused(tmp_path: Path) -> None:
    twin = Input("talks/2024/talk.v1.wav", Path("2024/talk.v1.wav"), named=False)
    with pytest.raises(OptionError, match=r"talk.v1.mp3 and .*talk.v1.wav would both be written"):
        Output(folder=tmp_path).prepare([TALK, twin])


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "2024").touch()
    with pytest.raises(OptionError, match="2024: cannot be made"):
        Output(folder=tmp_path).deliver(TALK, TRANSCRIPTION, headed=False)


def test_a_full_disk_is_told_and_nothing_of_the_trial_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()  # which a full disk allows
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OptionError, match=r"cannot be written to \(No space left on device"):
        Output(folder=tmp_path).prepare([TALK])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("json_lines", [False, True])
def test_standard_output_that_cannot_be_written_ends_the_run(json_lines: bool) -> None:
    class Full(StandardOutput):
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        write_json = write

    class Closed(StandardOutput):
        def write(self, text: str) -> None:
            raise BrokenPipeError

        write_json = write

    message = r"standard output cannot be written \(No space left on device\)"
    with pytest.raises(WhisperFlashError, match=message) as caught:
        Output(json_lines=json_lines, stdout=Full()).deliver(NAMED, TRANSCRIPTION, headed=False)
    assert not isinstance(caught.value, OptionError)  # which fails one recording
    with pytest.raises(BrokenPipeError):
        Output(json_lines=json_lines, stdout=Closed()).deliver(NAMED, TRANSCRIPTION, headed=False)
