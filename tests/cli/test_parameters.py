"""Flags that are generated from the dataclasses of options."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tools.option_tables import PAGE, with_tables
from whisper_flash_attention.cli import app
from whisper_flash_attention.cli.parameters import decode_options, in_flags, options_of, takes
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.options import (
    PRESETS,
    DecodeOptions,
    ModelOptions,
    SubtitleOptions,
    TranscribeOptions,
    VadOptions,
    declared,
    flags_of,
)
from whisper_flash_attention.transcribe.arguments import TranscribeArguments

GROUPS = (ModelOptions, TranscribeOptions, DecodeOptions, SubtitleOptions)
# A value of every option about decoding, other than its default, as text and in Python.
VALUES: dict[str, tuple[list[str], Any]] = {
    "mode": (["--mode", "batched"], "batched"),
    "temperature": (["--temperature", "0", "--temperature", "0.5,1"], (0.0, 0.5, 1.0)),
    "compression_ratio_threshold": (["--compression-ratio-threshold", "none"], None),
    "logprob_threshold": (["--logprob-threshold", "-0.5"], -0.5),
    "no_speech_threshold": (["--no-speech-threshold", "None"], None),
    "check_speech": (["--no-check-speech"], False),
    "beam_size": (["--beam-size", "3"], 3),
    "best_of": (["--best-of", "2"], 2),
    "patience": (["--beam-size", "3", "--patience", "1.5"], 1.5),
    "prepend_punctuations": (["--prepend-punctuations", "("], "("),
    "append_punctuations": (["--append-punctuations", ")"], ")"),
    "length_penalty": (["--length-penalty", "0.5"], 0.5),
    "repetition_penalty": (["--repetition-penalty", "1.2"], 1.2),
    "no_repeat_ngram_size": (["--no-repeat-ngram-size", "3"], 3),
    "suppress_tokens": (["--suppress-tokens", ""], ()),
    "suppress_blank": (["--no-suppress-blank"], False),
    "min_new_tokens": (["--min-new-tokens", "2"], 2),
    "max_new_tokens": (["--max-new-tokens", "9"], 9),
    "without_timestamps": (["--without-timestamps"], True),
    "max_initial_timestamp": (["--max-initial-timestamp", "none"], None),
    "condition_on_previous_text": (["--no-condition-on-previous-text"], False),
    "initial_prompt": (["--initial-prompt", "Norland"], "Norland"),
    "carry_initial_prompt": (["--carry-initial-prompt"], True),
    "hotwords": (["--hotwords", "none"], "none"),
    "prefix": (["--prefix", "Well"], "Well"),
    "clip_timestamps": (["--clip-timestamps", "1,2.5"], (1.0, 2.5)),
    "word_timestamps": (["--word-timestamps"], True),
    "word_alignment": (["--word-timestamps", "--word-alignment", "characters"], "characters"),
    "hallucination_silence_threshold": (
        ["--word-timestamps", "--hallucination-silence-threshold", "2"],
        2.0,
    ),
    "vad_filter": (["--vad"], True),
    "vad_parameters": (
        ["--vad", "--vad-parameters", "threshold=0.4,speech-pad-ms=50"],
        VadOptions(threshold=0.4, speech_pad_ms=50),
    ),
    "multilingual": (["--multilingual"], True),
}


def given_by(*arguments: str, preset: str = "balanced") -> dict[str, Any]:
    """What a command is given by its flags."""
    found: dict[str, Any] = {}

    @takes("transcribe", *GROUPS)
    def command(**given: Any) -> None:
        found.update(given)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found


def test_every_option_about_decoding_has_a_value_here() -> None:
    assert set(VALUES) == {each.name for each, _ in declared(DecodeOptions)}


@pytest.mark.parametrize("name", VALUES)
def test_an_option_of_python_is_a_flag(name: str) -> None:
    arguments, expected = VALUES[name]
    found = getattr(decode_options("balanced", given_by(*arguments)), name)
    assert found == expected
    assert found != getattr(DecodeOptions(), name)


def test_without_flags_all_options_have_their_defaults() -> None:
    given = given_by()
    assert options_of(ModelOptions, given) == ModelOptions()
    assert options_of(TranscribeOptions, given) == TranscribeOptions()
    assert options_of(SubtitleOptions, given) == SubtitleOptions()
    for name, expected in PRESETS.items():
        assert decode_options(name, given) == expected


def test_a_flag_takes_precedence_over_the_preset() -> None:
    assert decode_options("accurate", given_by("--beam-size", "2")).beam_size == 2
    assert decode_options("fast", given_by("--mode", "sequential")).mode == "sequential"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam-size", "x"], "--beam-size is 'x': give a whole number, 1 to 100"),
        (["--beam-size", "1.5"], "--beam-size is '1.5': give a whole number"),
        (["--clip-timestamps", "1,b"], "--clip-timestamps is '1,b': give seconds"),
        (["--vad-parameters", "0.4"], "--vad-parameters is '0.4': give name=number"),
        (["--length-penalty", "none"], "--length-penalty is 'none': give a number from -10 to 10"),
    ],
)
def test_text_of_another_kind_is_an_option_error(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        given_by(*arguments)


@pytest.mark.parametrize("command", ["transcribe", "batch"])
def test_help_has_every_option_with_its_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "250"}).stdout
    words = "".join(shown.replace("│", " ").split())
    for group in GROUPS:
        for each, about in declared(group):
            if command in about.commands:
                assert flags_of(each)[0].split("/")[0] in shown
                assert "".join(about.help.split())[:30] in words


def test_every_option_is_a_keyword_argument_of_python() -> None:
    keywords = set(TranscribeArguments.__annotations__)
    for group in (TranscribeOptions, DecodeOptions):
        names = {each.name for each, _ in declared(group)}
        assert names <= keywords
    for each, about in declared(DecodeOptions):
        assert f"{each.name}: {about.help}" in (DecodeOptions.__doc__ or "")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("beam_size is 0: give 1", "--beam-size is 0: give 1"),
        ('needs mode="batched", or vad_filter=False', "needs --mode batched, or --no-vad"),
        (
            "give word_timestamps=True and task='translate'",
            "give --word-timestamps and --task translate",
        ),
        ("mode is 5: give text", "--mode is 5: give text"),
        ("no task is 'x'", "no task is 'x'"),
        ("talks/word_timestamps.wav: is no file", "talks/word_timestamps.wav: is no file"),
        ("unknown language 'beam_size'", "unknown language 'beam_size'"),
        ("the mode of a language", "the mode of a language"),
    ],
)
def test_messages_speak_the_language_of_the_command_line(message: str, expected: str) -> None:
    assert in_flags(message) == expected


def test_the_documentation_has_the_options_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run `python -m tools.option_tables`"
    for group in (*GROUPS, VadOptions):
        assert f"<!-- options: {group.__name__} -->\n| option |" in page
