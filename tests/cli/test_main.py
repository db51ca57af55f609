from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.audio.encoding import encode, read_wave, write_wave
from whisper_flash_attention import __version__
from whisper_flash_attention.audio import BundledClip
from whisper_flash_attention.cli import app
from whisper_flash_attention.cli.main import COMMANDS, LazyCommand
from whisper_flash_attention.transcribe import Transcription

COMMAND = [sys.executable, "-m", "whisper_flash_attention"]


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def call(*arguments: str | Path) -> Outcome:
    """Run the command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def assert_one_line_error(outcome: Outcome, *expected: str, code: int = 2) -> None:
    assert outcome.code == code
    assert outcome.stdout == ""
    [line] = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    for part in expected:
        assert part in line


@pytest.fixture(scope="module")
def clip(bundled_recordings: tuple[BundledClip, ...]) -> BundledClip:
    return bundled_recordings[4]  # 3.3 s that tiny.en hears without a mistake


def test_version_and_help_are_quick_because_they_import_no_pytorch() -> None:
    script = (
        "import sys, whisper_flash_attention.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'av', 'numpy', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    script = (
        "import sys; sys.argv[1:] = ['--version']\n"
        "from whisper_flash_attention.cli import main; main()\n"
        "print('typer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"whisper-flash {__version__}\nFalse\n", done.stderr
    assert call("--version") == Outcome(0, f"whisper-flash {__version__}\n", "")


@pytest.mark.parametrize("command", ["transcribe", "doctor"])
def test_help_teaches_by_examples(command: str) -> None:
    outcome = call(command, "--help")
    assert outcome.code == 0
    assert "Examples" in outcome.stdout
    assert f"whisper-flash {command}" in outcome.stdout


def test_the_benchmark_brings_its_own_options() -> None:
    outcome = call("benchmark", "--help")
    assert outcome.code == 0
    assert "whisper-flash benchmark" in outcome.stdout
    assert "--setting" in outcome.stdout


def test_a_misused_benchmark_is_exit_code_2() -> None:
    assert_one_line_error(call("benchmark", "--no-such-option"), "no such option")


PARTS = [f"benchmark {part}" for part in ("throughput", "mlperf", "serve", "peers")]


@pytest.mark.parametrize("command", [*(str(each.name) for each in COMMANDS), *PARTS])
def test_help_has_whole_names_and_no_markup_and_a_short_flag(command: str) -> None:
    outcome = call(*command.split(), "-h")
    assert outcome.code == 0 and outcome.stderr == ""
    assert "…" not in outcome.stdout and "[b]" not in outcome.stdout
    for line in outcome.stdout.splitlines():
        # Paragraphs are wrapped once: only their last lines are short.
        assert len(line) <= 100 or "whisper-flash" in line


def test_help_shows_defaults_and_what_is_in_brackets() -> None:
    shown = " ".join(call("transcribe", "-h").stdout.split())
    assert "--condition-on-previous-text / --no-condition-on-previous-text" in shown
    assert "[default: 0.0,0.2,0.4,0.6,0.8,1.0; 0.0 with --preset fast]" in shown
    assert "[default: 5 with --preset accurate]" in shown
    assert "(sequential mode). [default: on]" in shown
    assert "fails `--logprob-threshold`" in shown
    assert "[mel, 3000]" in " ".join(call("parity", "--help").stdout.split())


def test_usage_errors_are_one_line_and_suggest() -> None:
    outcome = call("transcribe", "a.wav", "--modle", "tiny.en")
    assert_one_line_error(outcome, "no such option: --modle; did you mean", "--mode", "--model")
    assert_one_line_error(call("transcrib", "a.wav"), "Did you mean 'transcribe'")
    outcome = call("transcribe", "a.wav", "--model")
    assert_one_line_error(outcome, "requires an argument (whisper-flash transcribe --help")
    outcome = call("transcribe", "a.wav", "--chunk_size", "30")
    assert_one_line_error(outcome, "no such option: --chunk-size; the length of chunks is --mode")
    outcome = call("transcribe", "a.wav", "--vad_min_silence_duration_ms", "300")
    assert_one_line_error(outcome, "it is --vad --vad-parameters min_silence_duration_ms=VALUE")
    assert_one_line_error(
        call("batch", "a", "-o", "b", "--workers", "x"), "--workers", "valid integer"
    )


def test_a_recording_in_place_of_a_command_is_shown_where_it_belongs(clip: BundledClip) -> None:
    outcome = call(clip.path, "--model", "small")
    assert_one_line_error(outcome, f"to transcribe it: whisper-flash transcribe {clip.path}")
    assert "transcribe [OPTIONS] FILE...\n" in call("transcribe", "-h").stdout


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        ("batch a.flac b.flac -o c", "(b.flac); give one folder, manifest or quoted pattern"),
        ("parity -m tiny.en a.flac", "(a.flac); each recording or folder is given with --audio"),
        ("serve tiny.en", "(tiny.en); the model is given with --model"),
    ],
)
def test_an_argument_too_many_is_refused_with_what_to_do(command: str, instead: str) -> None:
    assert_one_line_error(call(*command.split()), "got unexpected extra argument", instead)


def test_messages_name_flags_on_the_command_line(clip: BundledClip) -> None:
    given = ("--hallucination-silence-threshold", "2")
    outcome = call("transcribe", clip.path, *given)
    assert_one_line_error(outcome, "needs --word-timestamps and --mode sequential")
    outcome = call("transcribe", clip.path, "--vad-parameters", "threshold=0.4")
    assert_one_line_error(outcome, "give --vad, too")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("large-v4", "large-v3"), ("smal", "small"), ("disti-large-v3", "distil-large-v3")],
)
def test_a_misspelt_model_gets_the_nearest_name(clip: BundledClip, wrong: str, near: str) -> None:
    outcome = call("transcribe", clip.path, "--model", wrong)
    assert_one_line_error(outcome, f"{wrong}: did you mean {near}?", "package:base")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_and_values(shell: str) -> None:
    script = CliRunner().invoke(
        app, [], prog_name="whisper-flash", env={"_WHISPER_FLASH_COMPLETE": f"source_{shell}"}
    )
    assert script.exit_code == 0 and "whisper-flash" in script.output

    def complete(typed: str) -> str:
        words = {
            "_WHISPER_FLASH_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split(" ")) - 1),
            "_TYPER_COMPLETE_ARGS": typed,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        return CliRunner().invoke(app, [], prog_name="whisper-flash", env=words).output

    assert "transcribe" in complete("whisper-flash trans")
    assert "--word-timestamps" in complete("whisper-flash transcribe --word-t")
    assert "batched" in complete("whisper-flash transcribe --mode b")
    assert "distil-large-v3.5" in complete("whisper-flash transcribe --model distil-")
    assert "package:tiny.en" in complete("whisper-flash serve --model p").replace("\\", "")
    assert "turbo" in complete("whisper-flash parity --model t")
    assert "german" in complete("whisper-flash batch --language g")


def test_a_process_prints_the_text_on_stdout_and_what_ran_on_stderr(
    tiny_en: str, clip: BundledClip
) -> None:
    arguments = ["transcribe", str(clip.path), "--model", tiny_en, "--device", "cpu"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{clip.transcript}\n"
    [line] = done.stderr.splitlines()
    speed = r"3\.3 s of audio in \d+\.\d s \(\d+\.\d x real time\)"
    assert re.fullmatch(rf"english, {speed}", line)


def test_verbose_says_what_ran(tiny_en: str, clip: BundledClip) -> None:
    outcome = call("transcribe", clip.path, "--model", tiny_en, "--device", "cpu", "--verbose")
    assert outcome.stdout == f"{clip.transcript}\n"
    assert (
        "package:tiny.en: decode engine (PyTorch); attention: encoder sdpa_flash; cpu, float32"
    ) in outcome.stderr.splitlines()


def test_several_files_go_on_after_a_bad_one_and_the_exit_code_tells(
    tmp_path: Path, tiny_en: str, clip: BundledClip
) -> None:
    mp3 = tmp_path / "copy.mp3"
    encode(mp3, read_wave(clip.path), codec="mp3", rate=44_100, layout="stereo")
    bad = tmp_path / "bad.wav"
    bad.write_text("This is not a recording.\n" * 20)
    cut = tmp_path / "cut.wav"
    write_wave(cut, read_wave(clip.path)[None], 16_000)
    cut.write_bytes(cut.read_bytes()[:-1001])

    outcome = call("transcribe", mp3, bad, cut, "--model", tiny_en, "--device", "cpu")
    assert outcome.code == 1
    assert outcome.stdout == (
        f"==> {mp3} <==\n{clip.transcript}\n==> {cut} <==\n{clip.transcript}\n"
    )
    lines = outcome.stderr.splitlines()
    # Recordings are decoded ahead: when damage is told depends on the threads.
    [damage] = [line for line in lines if line.startswith("warning:")]
    assert damage.startswith(f"warning: {cut}: is damaged or cut off")
    lines.remove(damage)
    [error] = [line for line in lines if line.startswith("error:")]
    assert error.startswith(f"error: {bad}: is not a recording")
    assert lines[lines.index(error) - 1].endswith(f"/3] {bad}")
    assert lines[0] == "loading the model for 3 files"
    numbered = [line for line in lines if line.startswith("[")]
    assert [line[:5] for line in numbered] == ["[1/3]", "[2/3]", "[3/3]"]  # when each is done
    assert {line[6:] for line in numbered} == {str(mp3), str(bad), str(cut)}
    assert lines[5] == "1 of 3 failed"
    assert lines[6].startswith("english: 2, 6.5 s of audio in ")
    assert len(lines) == 7


@pytest.mark.parametrize("output_format", ["json", "srt"])
def test_results_go_into_files_of_the_output_folder(
    tmp_path: Path, tiny_en: str, clip: BundledClip, output_format: str
) -> None:
    folder = tmp_path / "new" / "folder"
    outcome = call(
        *("transcribe", clip.path, "--model", tiny_en, "--device", "cpu"),
        *("--output-format", output_format, "--output-dir", folder, "--language", "english"),
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == ""
    [file] = folder.iterdir()
    assert file.name == f"{clip.path.stem}.{output_format}"
    text = file.read_text(encoding="utf-8")
    assert clip.transcript in text
    if output_format == "srt":
        assert re.search(r"00:00:00,000 --> 00:00:03,\d{3}\n", text)
    else:
        transcription = Transcription.from_dict(json.loads(text))
        assert transcription.seconds == clip.seconds
        assert transcription.segments[0].start == 0


def test_a_chosen_attention_back_end_is_the_one_that_runs(tiny_en: str, clip: BundledClip) -> None:
    model = ("--model", tiny_en, "--device", "cpu")
    outcome = call("transcribe", clip.path, *model, "--attention", "reference", "--verbose")
    assert outcome.stdout == f"{clip.transcript}\n"
    assert "attention: reference; cpu, float32" in outcome.stderr
    refused = call("transcribe", clip.path, *model, "--attention", "sdpa_cudnn")
    assert_one_line_error(refused, "sdpa_cudnn cannot run", "needs a CUDA GPU")


def test_a_missing_file_is_told_at_once() -> None:
    outcome = call("transcribe", "nowhere.wav")
    assert_one_line_error(outcome, "nowhere.wav: there is no such file")


def test_a_text_and_an_empty_recording_are_told(tmp_path: Path) -> None:
    text, empty = tmp_path / "notes.txt", tmp_path / "empty.wav"
    text.write_text("Not a sound.\n" * 50)
    write_wave(empty, np.zeros((1, 0), np.int16), 16_000)
    outcome = call("transcribe", text)
    assert_one_line_error(outcome, "notes.txt: there is no audio stream", code=1)
    assert_one_line_error(call("transcribe", empty), f"{empty}: ", code=1)
    assert_one_line_error(call("transcribe", tmp_path), f"{empty}: ", code=1)


@pytest.mark.parametrize(
    ("option", "wrong", "expected"),
    [
        ("--language", "germn", "--language is 'germn': did you mean german"),
        ("--task", "summarise", "--task is 'summarise': give transcribe or translate"),
        ("--mode", "foo", "--mode is 'foo': give sequential or batched"),
        ("--preset", "foo", "--preset is 'foo': give fast, balanced or accurate"),
        ("--channel", "foo", "--channel is 'foo': give mix, each, or the number of a channel"),
        ("--batch-size", "foo", "--batch-size is 'foo': give a whole number, 1 to "),
        ("--output-format", "doc", "--output-format is 'doc': give txt, json, srt, vtt, ass, tsv"),
        ("--device", "gpu", "--device is 'gpu': give auto, cpu"),
        ("--compute-type", "fp16", "--compute-type is 'fp16': give auto, float32"),
        ("--attention", "sdpa_flsh", "--attention is 'sdpa_flsh': give auto, "),
        ("--model", "./no/such/folder", "no/such/folder: does not exist"),
    ],
)
def test_an_unknown_value_is_one_line_that_says_what_is_possible(
    clip: BundledClip, option: str, wrong: str, expected: str
) -> None:
    assert_one_line_error(call("transcribe", clip.path, option, wrong), expected)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("batch a -o b --engine foo", "--engine is 'foo': give local or ray"),
        ("batch a -o b --format foo", "--format is 'foo': give jsonl or parquet"),
        ("batch a -o b --subtitles foo", "--subtitles is 'foo': give srt, vtt or ass"),
        (
            "parity -m small --audio a --mode foo",
            "--mode is 'foo': give greedy, timestamps, beams or",
        ),
        ("benchmark throughput --from foo", "--from is 'foo': give memory or files"),
        ("benchmark throughput --system foo", "--system is 'foo': give flash or sdpa"),
        ("benchmark --setting foo", "--setting is 'foo': give default, large or small"),
        ("benchmark --system foo", "--system is 'foo': give orig, sdpa, static, flash, flash:"),
    ],
)
def test_other_commands_name_their_flags(command: str, expected: str) -> None:
    assert_one_line_error(call(*command.split()), expected)


def test_an_unknown_model_says_where_else_models_are(clip: BundledClip) -> None:
    outcome = call("transcribe", clip.path, "--model", "nobody/nothing")
    assert_one_line_error(outcome, "cannot load model 'nobody/nothing'", "package:tiny.en")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_missing_gpu_is_told(clip: BundledClip) -> None:
    outcome = call("transcribe", clip.path, "--device", "cuda")
    assert_one_line_error(outcome, "--device cuda was requested", "use 'cpu'")


def test_an_english_only_model_refuses_german(tiny_en: str, clip: BundledClip) -> None:
    arguments = ("--model", tiny_en, "--device", "cpu", "--language", "de")
    outcome = call("transcribe", clip.path, *arguments)
    assert_one_line_error(outcome, "--language de needs a multilingual model")


def test_subtitles_of_several_files_need_a_folder() -> None:
    outcome = call("transcribe", "a.mp3", "b.mp3", "--output-format", "srt")
    assert_one_line_error(outcome, "srt of several files needs --output-dir")


def test_an_output_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = call("transcribe", "a.mp3", "b.mp3", "--output-dir", tmp_path / "file")
    assert_one_line_error(outcome, f"{tmp_path / 'file'}: cannot be made")


def test_no_file_is_a_usage_error() -> None:
    assert_one_line_error(call("transcribe"), "missing argument 'FILE'")


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_ends_it_with_130_and_no_traceback(
    tmp_path: Path, tiny_en: str, clip: BundledClip
) -> None:
    long = tmp_path / "long.wav"
    write_wave(long, np.tile(read_wave(clip.path), 30)[None], 16_000)
    arguments = ["transcribe", str(clip.path), str(long), "--model", tiny_en, "--device", "cpu"]
    arguments += ["--batch-size", "1"]  # the second begins when the first is done
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("[1/2]"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted: 1 of 2 files are done; to go on,")
    assert "Traceback" not in stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_standard_output_that_is_full_is_one_line(tiny_en: str, clip: BundledClip) -> None:
    arguments = ["transcribe", str(clip.path), "--model", tiny_en, "--device", "cpu"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    message = "error: standard output cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_the_list_of_commands_has_the_first_line_of_their_help(command: LazyCommand) -> None:
    help_text = command.home.load().help
    assert help_text is not None
    assert command.help == help_text.split("\n\n")[0]
    assert f"  {command.name:<10}  {command.help}\n" in call("--help").stdout
