"""The command with a transcriber that loads nothing; `test_main.py` has it with a model."""

from __future__ import annotations

import io
import json
import re
import shutil
import wave
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from tests.transcribe.fakes import FakeTranscriber
from whisper_flash_attention.audio import BundledClip
from whisper_flash_attention.cli import app, transcribe
from whisper_flash_attention.errors import AudioError, NotFinite, OptionError
from whisper_flash_attention.options import DecodeOptions, VadOptions
from whisper_flash_attention.transcribe import Segment, Transcription, Word, output
from whisper_flash_attention.transcribe.inputs import Input
from whisper_flash_attention.transcribe.output import Output

SKIPPED = "recordings skipped: the files are there already (--overwrite replaces them)"


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def call(*arguments: str | Path, stdin: bytes | None = None) -> Outcome:
    words = ["transcribe", *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(app, words, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def transcriber(monkeypatch: pytest.MonkeyPatch) -> FakeTranscriber:
    fake = FakeTranscriber()

    def from_pretrained(cls: type, **options: Any) -> FakeTranscriber:
        fake.loaded = options
        return fake

    monkeypatch.setattr(transcribe.Transcriber, "from_pretrained", classmethod(from_pretrained))
    return fake


@pytest.fixture
def talks(tmp_path: Path, bundled_recordings: tuple[BundledClip, ...]) -> Path:
    """Three real recordings, two of them with the same name."""
    folder = tmp_path / "talks"
    clip = bundled_recordings[4].path
    for name in ("one/talk.wav", "two/talk.wav", "z.wav"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)
    (folder / "notes.txt").write_text("not a recording")
    return folder


def shorten(path: Path, seconds: int) -> None:
    with wave.open(str(path)) as file:
        parameters, frames = file.getparams(), file.readframes(seconds * file.getframerate())
    with wave.open(str(path), "wb") as file:
        file.setparams(parameters)
        file.writeframes(frames)


def files_in(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(found)


def test_a_folder_becomes_a_folder_like_it(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = call(talks, "-f", "srt,txt", "-o", out, "--max-line-width", "7")
    assert outcome.code == 0
    assert outcome.stdout == ""
    assert files_in(out) == [
        *("one/talk.srt", "one/talk.txt", "two/talk.srt", "two/talk.txt", "z.srt", "z.txt"),
    ]
    assert (out / "z.srt").read_text() == ("1\n00:00:00,000 --> 00:00:01,000\none two\nthree\n")
    lines = outcome.stderr.splitlines()
    assert lines[:3] == [
        "loading the model for 3 files",
        f"[1/3] {talks / 'one/talk.wav'}",
        f"[2/3] {talks / 'two/talk.wav'}",
    ]
    assert lines[4].startswith(f"english: 3, 6 files written to {out}, 9.9 s of audio in ")
    assert len(lines) == 5


def test_recordings_of_one_name_are_kept_apart(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    shutil.copy(talks / "z.wav", talks / "z.mp3")  # the contents tell what a file is
    outcome = call(talks, "-f", "srt", "-o", tmp_path / "out")
    assert outcome.code == 0
    expected = ["one/talk.srt", "two/talk.srt", "z.mp3.srt", "z.wav.srt"]
    assert files_in(tmp_path / "out") == expected
    assert call(talks, "-f", "srt", "-o", tmp_path / "out").stderr == f"4 {SKIPPED}\n"


def test_the_same_command_does_only_what_is_missing(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (talks, "--output-dir", out)
    call(*arguments)
    (out / "z.txt").unlink()
    outcome = call(*arguments)
    assert outcome.code == 0
    assert len(transcriber.calls) == 4
    assert outcome.stderr.splitlines()[-2] == f"2 {SKIPPED}"
    outcome = call(*arguments)
    assert outcome == Outcome(0, "", f"3 {SKIPPED}\n")
    (out / "z.txt").write_text("old")
    assert call(*arguments, "--overwrite").code == 0
    assert len(transcriber.calls) == 7
    assert (out / "z.txt").read_text() == "one two three\n"


def test_one_named_recording_is_not_done_again_unless_requested(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    arguments = (talks / "z.wav", "--output-dir", tmp_path / "out")
    assert call(*arguments).code == 0
    outcome = call(*arguments)
    assert outcome.code == 2
    assert outcome.stderr == (
        f"error: {tmp_path / 'out' / 'z.txt'}: exists already; --overwrite replaces it\n"
    )
    assert call(*arguments, "--overwrite").code == 0


def test_standard_input_is_a_recording(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    content = (talks / "z.wav").read_bytes()
    outcome = call("-", "--output-dir", tmp_path / "out", stdin=content)
    assert outcome.code == 0, outcome.stderr
    assert files_in(tmp_path / "out") == ["stdin.txt"]
    outcome = call("-", "--json-lines", "--language", "de", stdin=content)
    assert json.loads(outcome.stdout)["file"] == "stdin"
    arguments = transcriber.calls[-1]
    assert (arguments["language"], arguments["task"]) == ("de", "transcribe")
    assert arguments["options"] == DecodeOptions()


def test_decoding_options_reach_the_transcriber(transcriber: FakeTranscriber, talks: Path) -> None:
    arguments = ("--preset", "fast", "--no-vad", "--batch-size", "4", "--word-timestamps")
    more = ("--initial-prompt", "Names.", "--temperature", "0", "--temperature", "0.4")
    assert call(talks / "z.wav", *arguments, *more).code == 0
    arguments = transcriber.calls[-1]
    assert arguments["batch_size"] == 4
    assert arguments["options"] == DecodeOptions(
        mode="batched",
        vad_filter=False,
        temperature=(0.0, 0.4),
        initial_prompt="Names.",
        word_timestamps=True,
    )
    assert call(talks / "z.wav", "--no-condition-on-previous-text").code == 0
    assert not transcriber.calls[-1]["options"].condition_on_previous_text
    more = ("--beam-size", "2", "--best-of", "3", "--hotwords", "Istio", "--prefix", "So,")
    more += ("--suppress-tokens", "-1,11", "--without-timestamps", "--max-new-tokens", "20")
    more += ("--clip-timestamps", "0.5,2")
    assert call(talks / "z.wav", *more).code == 0
    assert transcriber.calls[-1]["options"] == DecodeOptions(
        beam_size=2,
        best_of=3,
        hotwords="Istio",
        prefix="So,",
        suppress_tokens=(-1, 11),
        without_timestamps=True,
        max_new_tokens=20,
        clip_timestamps=(0.5, 2.0),
    )
    outcome = call(talks / "z.wav", "--preset", "best")
    assert outcome == Outcome(2, "", "error: --preset is 'best': give fast, balanced or accurate\n")


def test_json_lines_are_one_per_segment(transcriber: FakeTranscriber, talks: Path) -> None:
    outcome = call(f"{talks}/*/talk.wav", "--json-lines")
    assert outcome.code == 0
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [row["file"] for row in rows] == [
        str(talks / f"{name}/talk.wav") for name in ("one", "two")
    ]
    assert all(row["segment"]["text"] == "one two three" for row in rows)


def test_words_are_highlighted_where_there_are_any(
    transcriber: FakeTranscriber, talks: Path
) -> None:
    arguments = (talks / "z.wav", "-f", "vtt", "--highlight-words")
    outcome = call(talks, *arguments[1:], "--output-dir", talks.parent / "out")
    assert outcome.stderr.count("warning: no word has times here") == 1
    words = (Word(0.0, 0.5, "one", 1), Word(0.5, 1.0, "two", 1))
    transcriber.segment = Segment(0.0, 1.0, "one two", words=words)
    outcome = call(*arguments)
    assert "<u>one</u> two" in outcome.stdout
    assert "one <u>two</u>" in outcome.stdout
    assert "warning" not in outcome.stderr


@pytest.mark.parametrize("error", [AudioError("too short"), NotFinite("the model computed NaN")])
def test_what_one_recording_brings_about_does_not_stop_the_others(
    transcriber: FakeTranscriber, talks: Path, error: Exception
) -> None:
    shorten(talks / "two" / "talk.wav", seconds=1)
    transcriber.bad[1.0] = error
    transcriber.side_by_side = 2  # the first recording is under way when the second fails
    outcome = call(talks)
    assert outcome.code == 1
    assert len(transcriber.calls) == 2
    assert f"error: {talks / 'two/talk.wav'}: {error}" in outcome.stderr.splitlines()
    assert outcome.stderr.splitlines()[-2] == "1 of 3 failed"
    headings = [line for line in outcome.stdout.splitlines() if line.startswith("==>")]
    assert headings == [f"==> {talks / name} <==" for name in ("one/talk.wav", "z.wav")]
    assert outcome.stdout.count("one two three\n") == 2


def test_recordings_are_delivered_as_they_are_done(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    transcriber.side_by_side = 3
    done: list[list[str]] = []
    transcriber.before = lambda count: done.append(files_in(tmp_path / "out"))
    assert call(talks, "--output-dir", tmp_path / "out").code == 0
    assert done == [[], ["z.txt"], ["two/talk.txt", "z.txt"]]
    assert files_in(tmp_path / "out") == ["one/talk.txt", "two/talk.txt", "z.txt"]
    assert transcriber.calls[0]["batch_size"] == 4
    outcome = call(talks, "--batch-size", "0")
    assert outcome.code == 2 and "--batch-size is 0: give a whole number" in outcome.stderr


def test_a_file_that_cannot_be_written_does_not_stop_the_others(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "one" / "talk.txt").mkdir(parents=True)
    outcome = call(talks, "--output-dir", tmp_path / "out")
    assert outcome.code == 1
    assert "talk.txt: cannot be written" in outcome.stderr
    assert files_in(tmp_path / "out") == ["two/talk.txt", "z.txt"]
    # Its text is not lost.
    assert outcome.stdout == f"==> {talks / 'one/talk.wav'} <==\none two three\n"


def test_what_is_wrong_with_every_recording_is_reported_once(
    transcriber: FakeTranscriber, talks: Path
) -> None:
    def refuse(count: int) -> None:
        raise OptionError("this model does not know language 'de'")

    transcriber.before = refuse
    outcome = call(talks)
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1] == "error: this model does not know language 'de'"


@pytest.mark.parametrize(
    ("options", "further"),
    [
        (("-o",), "the same command goes on with the others"),
        (("--overwrite", "-o"), "to go on, name the others"),
        ((), "to go on, name the others (into --output-dir, the same command would go on)"),
    ],
)
def test_ctrl_c_leaves_whole_files_and_shows_how_to_continue(
    transcriber: FakeTranscriber,
    talks: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    further: str,
) -> None:
    def interrupt(count: int) -> None:
        if count == 1:
            raise KeyboardInterrupt

    transcriber.before = interrupt
    out = tmp_path / "out"
    outcome = call(talks, *options, *([out] if options else []))
    assert outcome.code == 130
    assert outcome.stderr.splitlines()[-1] == f"interrupted: 1 of 3 files are done; {further}"
    if options:
        assert files_in(out) == ["one/talk.txt"]
        assert (out / "one" / "talk.txt").read_text() == "one two three\n"
    else:
        assert outcome.stdout == f"==> {talks / 'one/talk.wav'} <==\none two three\n"


def test_options_out_of_range_are_reported_before_any_work(talks: Path) -> None:
    for options, expected in (
        (("--suppress-tokens", "1,x"), "--suppress-tokens is '1,x': give ids"),
        (("--hallucination-silence-threshold", "2"), "--hallucination-silence-threshold needs --w"),
        (("--beam-size", "0"), "--beam-size is 0: give a whole number, 1 to 100"),
        (("-f", "srt", "--max-line-width", "0"), "--max-line-width is 0: give a whole number"),
        (("-f", "srt", "--max-line-count", "2"), "--max-line-count has no effect without"),
        (("-f", "srt", "--max-gap", "-1"), "--max-gap is -1.0: give seconds"),
        (("--patience", "2"), "--patience is for beams: give --beam-size, 2 or more"),
        (("--max-line-width", "40"), "lines and cues are for srt, vtt, ass"),
    ):
        outcome = call(talks / "z.wav", *options)
        assert outcome.code == 2
        assert outcome.stderr.startswith(f"error: {expected}")
        assert len(outcome.stderr.splitlines()) == 1


def test_the_detector_takes_parameters(transcriber: FakeTranscriber, talks: Path) -> None:
    some = ("--vad-parameters", "threshold=0.4, speech_pad_ms=100")
    more = ("--vad-parameters", "min-silence-duration-ms=800", "--vad", "--multilingual")
    assert call(talks / "z.wav", *some, *more).code == 0
    assert transcriber.calls[-1]["options"] == DecodeOptions(
        vad_filter=True,
        vad_parameters=VadOptions(threshold=0.4, speech_pad_ms=100, min_silence_duration_ms=800),
        multilingual=True,
    )
    outcome = call(talks / "z.wav", "--vad", "--vad-parameters", "threshold")
    assert outcome.code == 2 and "give name=number, such as threshold=0.4" in outcome.stderr
    outcome = call(talks / "z.wav", "--vad-parameters", "threshold=0.4")
    assert outcome.code == 2 and "without a voice activity detector" in outcome.stderr


def test_spellings_of_other_tools_are_taken(transcriber: FakeTranscriber, talks: Path) -> None:
    given = ("--word_timestamps", "True", "--condition_on_previous_text", "False")
    more = ("--beam_size", "5", "--patience", "2", "--log_prob_threshold=-0.5", "--fp16", "False")
    marks = ("--prepend_punctuations", "(", "--append_punctuations", ").")
    vad = ("--vad_filter", "true", "--vad_parameters", "threshold=0.4", "--temperature", "0,0.2")
    assert call(talks / "z.wav", *given, *more, *marks, *vad).code == 0
    assert transcriber.calls[-1]["options"] == DecodeOptions(
        word_timestamps=True,
        condition_on_previous_text=False,
        beam_size=5,
        patience=2.0,
        logprob_threshold=-0.5,
        prepend_punctuations="(",
        append_punctuations=").",
        vad_filter=True,
        vad_parameters=VadOptions(threshold=0.4),
        temperature=(0.0, 0.2),
    )
    assert call(talks / "z.wav", "--temperature_increment_on_fallback", "0.5").code == 0
    assert transcriber.calls[-1]["options"].temperatures == (0.0, 0.5, 1.0)
    fallback = ("--temperature", "0.4", "--temperature_increment_on_fallback", "None")
    assert call(talks / "z.wav", *fallback, "--verbose", "False").code == 0
    assert transcriber.calls[-1]["options"].temperatures == (0.4,)
    model = ("--model_dir", "models", "--local_files_only", "True", "--compute_type", "float16")
    cues = ("--output_format", "srt", "--max_words_per_line", "1", "--highlight_words", "False")
    place = ("--output_dir", str(talks / "out"), "--threads", "4", "--device", "cpu")
    assert call(talks / "z.wav", *model, *cues, *place).code == 0
    names = ("download_root", "local_files_only", "compute_type", "threads")
    assert [transcriber.loaded[name] for name in names] == ["models", True, "float16", 4]
    assert (talks / "out" / "z.srt").is_file()
    assert call(talks / "z.wav", "--cpu_threads", "2", "--fp16", "False").code == 0
    assert (transcriber.loaded["threads"], transcriber.loaded["compute_type"]) == (2, "float32")
    outcome = call(talks / "z.wav", "--temperature_increment_on_fallback", "x")
    assert outcome.stderr.startswith("error: --temperature-increment-on-fallback is 'x': give")


class Terminal(io.TextIOWrapper):
    """Standard output of a terminal."""

    def isatty(self) -> bool:
        return True


def terminal_output(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    written = io.BytesIO()
    monkeypatch.setattr(output.sys, "stdout", Terminal(written, "utf-8", write_through=True))
    return written


def outputs(**settings: Any) -> Output:
    return Output(**{"live": True, **settings})


def test_on_a_terminal_text_is_printed_as_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_output(monkeypatch)
    entry = Input("a.wav", Path("a.wav"))
    first, second = Segment(0.0, 1.0, "one"), Segment(61.5, 62.0, "two")
    transcription = Transcription("one two", "en", (first, second), 70.0)
    found = outputs()
    assert found.shows_text
    found.show(entry, [first])
    assert screen.getvalue() == b"one\n"
    found.deliver(entry, transcription, headed=False, shown=1)
    assert screen.getvalue() == b"one\ntwo\n"
    outputs(timed=True).show(entry, [second])
    assert screen.getvalue().endswith(b"[01:01.500 --> 01:02.000] two\n")
    assert not outputs(live=False).shows_text
    assert not outputs(formats=("srt",)).shows_text
    assert outputs(formats=("srt",), folder=Path("out")).shows_text


def test_into_a_pipe_nothing_is_printed_before_the_end(
    transcriber: FakeTranscriber, talks: Path
) -> None:
    outcome = call(talks / "z.wav", "--verbose")
    assert outcome.stdout == "one two three\n"
    assert call(talks / "z.wav", "--quiet") == Outcome(0, "one two three\n", "")


def test_json_lines_come_as_segments_do(
    transcriber: FakeTranscriber, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    show, deliver = Output.show, Output.deliver
    monkeypatch.setattr(
        Output, "show", lambda self, entry, rows: (order.append("show"), show(self, entry, rows))
    )
    monkeypatch.setattr(
        Output,
        "deliver",
        lambda self, *some, **more: (order.append("deliver"), deliver(self, *some, **more)),
    )
    outcome = call(talks / "z.wav", "--json-lines")
    assert order[:2] == ["show", "deliver"]
    assert len(outcome.stdout.splitlines()) == 1


def test_what_standard_output_cannot_hold_is_replaced_with_one_warning(
    transcriber: FakeTranscriber, talks: Path
) -> None:
    transcriber.segment = Segment(0.0, 1.0, "naïve Łódź")
    name = talks / "caf\u0142\udce9.wav"
    shutil.copy(talks / "z.wav", name)
    environment = {"PYTHONIOENCODING": "cp1252"}
    runner = CliRunner(charset="cp1252")
    result = runner.invoke(app, ["transcribe", str(name)], env=environment)
    assert result.exit_code == 0
    assert result.stdout_bytes.decode("cp1252") == "na\xefve ?\xf3d?\n"
    assert result.stderr.count("warning: standard output is cp1252") == 1
    result = runner.invoke(app, ["transcribe", str(name), "--json-lines"], env=environment)
    row = json.loads(result.stdout_bytes.decode("utf-8"))
    assert (row["file"], row["segment"]["text"]) == (str(name), "naïve Łódź")


def test_a_folder_that_cannot_be_written_to_is_reported_before_any_work(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    outcome = call(talks, "--output-dir", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.stderr == (
        f"error: {tmp_path / 'out'}: cannot be written to (No space left on device)\n"
    )
    assert not transcriber.calls


def test_the_last_line_says_the_language_and_the_files(
    transcriber: FakeTranscriber, talks: Path, tmp_path: Path
) -> None:
    transcriber.language = ("de", 0.976)
    outcome = call(talks / "z.wav", "-f", "srt", "-o", tmp_path / "out")
    [line] = outcome.stderr.splitlines()
    assert re.fullmatch(
        rf"german \(98 %\), 1 file written to {tmp_path / 'out'}, "
        r"3\.3 s of audio in \d\.\d s \(\d+\.\d x real time\)",
        line,
    )
