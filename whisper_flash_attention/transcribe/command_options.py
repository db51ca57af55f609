"""The command's options about decoding, as types for its signature; None leaves the preset's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.transcribe.arguments import MOST_ON_GPU, ON_CPU

Number = TypeVar("Number", int, float)

DECODING_PANEL, SEARCH_PANEL = "Decoding", "Search and thresholds"


def _decoding(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=DECODING_PANEL, **settings)


def _search(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=SEARCH_PANEL, **settings)


PresetName = Annotated[
    str,
    _decoding(
        "--preset",
        metavar="NAME",
        help="accurate (OpenAI's sequential algorithm with 5 beams), balanced (the same without "
        "beams) or fast (chunks of speech side by side, decoded once; needs the extra vad).",
    ),
]
Mode = Annotated[
    str | None,
    _decoding(metavar="NAME", help="sequential, or batched (needs the extra vad, or --no-vad)."),
]
Vad = Annotated[
    bool | None,
    _decoding(
        "--vad/--no-vad",
        help="Read only speech, found by Silero's detector (extra vad), or everything. Without the "
        "detector, batched mode cuts recordings where they are quietest.",
        show_default="--vad in batched mode",
    ),
]
VadParameters = Annotated[
    list[str] | None,
    _decoding(
        "--vad-parameters",
        metavar="NAME=VALUE",
        help="Of the detector, repeatable or with commas: threshold, neg_threshold, "
        "min_speech_duration_ms, max_speech_duration_s, min_silence_duration_ms, speech_pad_ms.",
    ),
]
Multilingual = Annotated[
    bool | None,
    _decoding("--multilingual", help="Detect the language in every window, not once."),
]
BatchSize = Annotated[
    str,
    _decoding(
        metavar="N",
        help="Windows at a time: of so many recordings, or chunks of speech in batched mode. auto "
        f"is {ON_CPU} on a CPU; on a GPU what fits into half of its free memory, at most "
        f"{MOST_ON_GPU['sequential']}, or {MOST_ON_GPU['batched']} chunks.",
    ),
]
WordTimestamps = Annotated[
    bool | None,
    _decoding("--word-timestamps", help="Give words their times: in json, and for subtitles."),
]
Channel = Annotated[
    str,
    typer.Option(
        metavar="N",
        help="Of stereo and the like: mix (all in one), the number of one channel, from 1, or each "
        "(every channel by itself, as of a telephone call; text is labelled).",
    ),
]
AudioTrack = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Of a file with several audio tracks: number, from 1, or language. Left out: the "
        "file's default.",
    ),
]
InitialPrompt = Annotated[
    str | None, _decoding(help="What was said before, as it were: names, spellings, style.")
]
CarryInitialPrompt = Annotated[
    bool | None,
    _decoding("--carry-initial-prompt", help="Tell every window the initial prompt."),
]
Hotwords = Annotated[str | None, _decoding(help="Words to listen for, told to every window.")]
Prefix = Annotated[str | None, _decoding(help="What the first window's answer begins with.")]
ConditionOnPreviousText = Annotated[
    bool | None,
    _decoding(
        help="Tell each window what was said before it. Sequential mode does.", show_default=False
    ),
]
WithoutTimestamps = Annotated[
    bool | None,
    _decoding("--without-timestamps", help="Text alone: a segment is a window of 30 s."),
]
MaxNewTokens = Annotated[int | None, _decoding(metavar="N", help="Of a window's answer.")]
ClipTimestamps = Annotated[
    str | None,
    _decoding(
        metavar="SECONDS",
        help="Read parts alone: start,end,start,end ... The last end may be left out.",
    ),
]
HallucinationSilence = Annotated[
    float | None,
    _decoding(
        "--hallucination-silence-threshold",
        metavar="SECONDS",
        help="Skip longer silence beside words that look invented; needs --word-timestamps.",
    ),
]
Temperature = Annotated[
    list[float] | None,
    _search(
        help="0 draws nothing at random. Repeatable: the next one is tried where an answer is bad."
    ),
]
BeamSize = Annotated[int | None, _search(metavar="N", help="Beams at temperature 0.")]
BestOf = Annotated[int | None, _search(metavar="N", help="Answers drawn at other temperatures.")]
LengthPenalty = Annotated[
    float | None,
    _search(help="Power of the length by which sums of log-probabilities are divided."),
]
RepetitionPenalty = Annotated[
    float | None, _search(help="Above 1: what was said becomes less likely.")
]
NoRepeatNgramSize = Annotated[
    int | None, _search(metavar="N", help="Never so many tokens in a row twice.")
]
SuppressTokens = Annotated[
    str | None,
    _search(metavar="IDS", help="Tokens never said, with commas; -1 is the checkpoint's list."),
]
CompressionRatioThreshold = Annotated[
    float | None, _search(help="An answer that compresses better repeats itself: bad.")
]
LogprobThreshold = Annotated[
    float | None, _search(help="An answer less likely than this, on average, is bad.")
]
NoSpeechThreshold = Annotated[
    float | None, _search(help="An unlikely answer is silence from this probability on.")
]


def token_ids(text: str | None) -> tuple[int, ...] | None:
    """The ids of a list with commas, as openai-whisper takes them; none of an empty one.

    Raises:
        OptionError: something between two commas is not a number.
    """
    return _numbers("--suppress-tokens", "ids of tokens", int, text)


def seconds(text: str | None) -> tuple[float, ...] | None:
    """The seconds of a list with commas; none of an empty one.

    Raises:
        OptionError: something between two commas is not a number.
    """
    return _numbers("--clip-timestamps", "seconds", float, text)


def vad_parameters(settings: list[str] | None) -> dict[str, float] | None:
    """The detector's parameters from `name=value` settings, several with commas.

    Raises:
        OptionError: a setting is not of this form.
    """
    if not settings:
        return None
    found: dict[str, float] = {}
    for setting in (each.strip() for text in settings for each in text.split(",")):
        name, equals, value = setting.partition("=")
        try:
            if not equals:
                raise ValueError
            found[name.strip().replace("-", "_")] = float(value)
        except ValueError as error:
            raise OptionError(
                f"--vad-parameters is {setting!r}: give name=number, such as threshold=0.4"
            ) from error
    return found


def _numbers(
    option: str, what: str, kind: Callable[[str], Number], text: str | None
) -> tuple[Number, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(each) for each in text.split(",")) if text.strip() else ()
    except ValueError as error:
        raise OptionError(f"{option} is {text!r}: give {what} with commas between") from error
