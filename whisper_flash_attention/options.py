"""Every option of users, declared once: name, type, default, range, help and command-line flag.

An option is a field of one of the dataclasses below. The fields' metadata (`Option`) is what the
command line (`cli/parameters.py`), validation, `help()` and the tables of the documentation
(`tools/option_tables.py`) derive from. Nothing here imports PyTorch or Transformers, so that
`--help` is quick.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from whisper_flash_attention import option_kinds as kinds
from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import OptionError
from whisper_flash_attention.languages import language_or_auto
from whisper_flash_attention.option_kinds import Kind

TASKS = ("transcribe", "translate")
MODES = ("sequential", "batched")
WORD_ALIGNMENTS = ("tokens", "characters")
DTYPES = ("auto", "float32", "float16", "bfloat16")
COMPUTE_TYPES = (*DTYPES, "int8")
# More than any machine has cores.
MOST_THREADS = 4096
# Commands that take most options.
TRANSCRIBING = ("transcribe", "batch")
WITH_A_DEVICE = (
    *TRANSCRIBING,
    *("serve", "parity", "benchmark", "throughput", "mlperf", "serving", "peers"),
)
DECODING_PANEL, SEARCH_PANEL = "Decoding", "Search and thresholds"
SUBTITLE_PANEL, LIMIT_PANEL = "Subtitles (srt, vtt, ass)", "Limits"

# Marks that belong to the word after them, and to the word before them (openai-whisper's).
PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"  # noqa: RUF001
# Decoding memory grows with the number of beams and samples; more than this find nothing better.
MOST_BEAMS = 100
# No result is longer than the decoder's positions, 448 in every checkpoint.
MOST_TOKENS = 10_000

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Option:
    """What is known about an option besides its name, type and default.

    Args:
        kind: its values.
        help: what it does, in a sentence or two.
        flags: of the command line; empty stands for the name with dashes.
        aliases: other names, of openai-whisper or faster-whisper, that the command line takes as
            well; those of `DecodeOptions` also in Python.
        panel: heading of the group in `--help`; empty for the first group.
        commands: that take it.
    """

    kind: Kind
    help: str
    flags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    panel: str = ""
    commands: tuple[str, ...] = TRANSCRIBING


def option(default: Any, kind: Kind, help: str, **about: Any) -> Any:
    """Declare an option as a field of a dataclass. `about` are further fields of `Option`."""
    return field(default=default, metadata={"option": Option(kind, help, **about)})


decoding = partial(option, panel=DECODING_PANEL)
search = partial(option, panel=SEARCH_PANEL)
subtitle = partial(option, panel=SUBTITLE_PANEL)
serving = partial(option, commands=("serve",))
limit = partial(serving, panel=LIMIT_PANEL)


def declared(options: Any) -> list[tuple[Field[Any], Option]]:
    """Return the options that a dataclass (or an instance) declares."""
    return [
        (each, each.metadata["option"]) for each in fields(options) if "option" in each.metadata
    ]


def is_optional(declared_field: Field[Any]) -> bool:
    """Whether None is among the values of an option."""
    return str(declared_field.type).endswith("| None")


def _documented(cls: type[Options]) -> type[Options]:
    """Add the options' help to the docstring of their class."""
    lines = [f"    {each.name}: {about.help}" for each, about in declared(cls)]
    cls.__doc__ = "\n".join([f"{cls.__doc__}\n", "Args:", *lines])
    return cls


def _keep_checked(options: Any, prefix: str = "") -> None:
    """Check every option of an instance, and keep the plain Python values."""
    for each, about in declared(options):
        value = getattr(options, each.name)
        if value is not None or not is_optional(each):
            # The dataclasses are frozen.
            object.__setattr__(options, each.name, about.kind.check(f"{prefix}{each.name}", value))


@_documented
@dataclass(frozen=True, slots=True)
class ModelOptions:
    """A checkpoint and where it runs: the arguments of `Transcriber.from_pretrained`.

    The values are checked when the model is loaded.
    """

    source: str = option(
        "small",
        kinds.text(),
        "Short name (tiny.en, base, small, medium, large-v3, turbo, distil-large-v3.5 ...), Hub "
        "id, folder (Transformers or faster-whisper), OpenAI .pt file, or an installed package: "
        "package:tiny.en, package:base.",
        flags=("--model", "-m"),
        commands=(*TRANSCRIBING, "mlperf", "peers", "serving"),
    )
    device: str = option(
        "auto",
        replace(kinds.text(), metavar="NAME"),
        "auto, cpu, cuda, cuda:N or mps.",
        commands=WITH_A_DEVICE,
    )
    compute_type: str = option(
        "auto",
        kinds.choice(*COMPUTE_TYPES),
        "auto (float16 on CUDA, float32 elsewhere, int8 on a CPU if the checkpoint holds that), "
        "float32, float16, bfloat16, int8 (transcription on a CPU).",
        flags=("--compute-type", "--dtype"),
        commands=WITH_A_DEVICE,
    )
    threads: int | None = option(
        None,
        kinds.whole_number(1, MOST_THREADS),
        "Threads of PyTorch on the CPU, for the whole process. Left out: one per core.",
        commands=(*TRANSCRIBING, "peers"),
        aliases=("cpu_threads",),
    )
    attention: str = option(
        "auto",
        replace(kinds.text(), metavar="NAME"),
        "Attention back-end, as `whisper-flash doctor` lists them.",
        commands=(*TRANSCRIBING, "serve", "parity"),
    )
    download_root: str | None = option(
        None,
        replace(kinds.text(), metavar="DIR"),
        "Folder of downloaded checkpoints. Left out: the Hub's cache.",
        flags=("--model-dir",),
        aliases=("model_dir", "model_directory"),
    )
    local_files_only: bool = option(
        False,
        kinds.flag(),
        "Use only what was downloaded before, without the network.",
    )


@_documented
@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """What is read of a recording, its language and the task.

    Raises:
        OptionError: an unknown language or task, or another impossible value.
    """

    language: str | None = option(
        None,
        Kind(
            lambda name, value: language_or_auto(value),
            "a name (german, deutsch), a code (de, de-AT), or auto",
        ),
        "Spoken language, by name (german, deutsch) or code (de, de-AT); auto, or left out: "
        "detected.",
        flags=("--language", "-l"),
    )
    task: str = option(
        "transcribe", kinds.choice(*TASKS), "transcribe, or translate (into English)."
    )
    channel: int | str = option(
        "mix",
        kinds.channel(),
        "Of several channels: mix (all in one), the number of one channel, from 1, or each (every "
        "channel by itself, as of a telephone call; segments have the number of their channel).",
    )
    audio_track: int | str | None = option(
        None,
        kinds.audio_track(),
        "Of a file with several audio tracks: number, from 1, or language. Left out: the file's "
        "default.",
    )

    def __post_init__(self) -> None:
        _keep_checked(self)

    def check_model(self, languages: Collection[str]) -> None:
        """Raise `OptionError` if a model of these languages (codes) cannot do this."""
        if self.task == "translate" and set(languages) == {"en"}:
            raise OptionError(
                'task="translate" needs a multilingual model, and this one is English-only; '
                "take one without '.en' in its name"
            )
        if self.language is None or self.language in languages:
            return
        if set(languages) == {"en"}:
            raise OptionError(
                f'language="{self.language}" needs a multilingual model, and this one is '
                "English-only; take one without '.en' in its name"
            )
        raise OptionError(
            f'this model does not know language="{self.language}"; '
            f"it knows {', '.join(sorted(languages))}"
        )


@_documented
@dataclass(frozen=True, slots=True)
class VadOptions:
    """Parameters of the voice activity detector; the names are faster-whisper's.

    Raises:
        OptionError: a value is out of its range.
    """

    threshold: float = option(
        0.5,
        kinds.number("a probability between 0 and 1", above=0, most=1),
        "A frame of 32 ms is speech from this probability on.",
    )
    neg_threshold: float | None = option(
        None,
        kinds.number("a probability between 0 and 1", above=0, most=1),
        "Speech ends where the probability falls below this. None: `threshold` less 0.15, at least "
        "0.01.",
    )
    min_speech_duration_ms: int = option(
        250, kinds.milliseconds(), "Shorter stretches of speech are dropped."
    )
    max_speech_duration_s: float | None = option(
        None,
        kinds.number(
            "seconds, 1 or more", "SECONDS", least=1
        ),  # room for the padding on both sides
        "Speech without a pause is cut at this length. None: 27 s in batched mode, where it is "
        "also the longest chunk (30 at most), and unlimited in sequential mode.",
    )
    min_silence_duration_ms: int | None = option(
        None,
        kinds.milliseconds(),
        "Shorter pauses do not end a stretch. None: 500 in batched mode, 2000 in sequential mode.",
    )
    speech_pad_ms: int | None = option(
        None,
        kinds.milliseconds(),
        "Added before and after each stretch. None: 200 in batched mode, 400 in sequential mode.",
    )

    def __post_init__(self) -> None:
        _keep_checked(self, "VAD ")
        if self.neg_threshold is not None and self.neg_threshold > self.threshold:
            raise OptionError(
                f"VAD neg_threshold is {self.neg_threshold!r}, above threshold "
                f"{self.threshold!r}: give a lower one"
            )


def vad_options(given: object) -> VadOptions | None:
    """Return the detector's parameters, of a mapping or as they are.

    Raises:
        OptionError: there is no such parameter, or its value is out of its range.
    """
    if given is None or isinstance(given, VadOptions):
        return given
    if is_dataclass(given) and not isinstance(given, type):  # faster-whisper's
        usual = {each.name: each.default for each in fields(given)}
        return vad_options({name: v for name, v in asdict(given).items() if v != usual[name]})
    if not isinstance(given, Mapping):
        raise OptionError(
            f"vad_parameters is {check.shown(given)}: give VadOptions, or a mapping of {_VAD_NAMES}"
        )
    for name in given:
        if name not in VadOptions.__dataclass_fields__:
            raise OptionError(
                f"there is no VAD parameter {check.shown(name)}; possible: {_VAD_NAMES}"
            )
    parameters: dict[str, Any] = dict(given)
    if parameters.get("max_speech_duration_s") == math.inf:  # as faster-whisper writes no limit
        del parameters["max_speech_duration_s"]
    return VadOptions(**parameters)


_VAD_NAMES = ", ".join(each.name for each in fields(VadOptions))


def _parse_vad_parameters(text: str) -> dict[str, float]:
    """Return the parameters of a text such as "threshold=0.4,speech-pad-ms=100"."""
    pairs = (setting.partition("=") for setting in text.split(","))
    return {name.strip().replace("-", "_"): float(value) for name, _, value in pairs}


@_documented
@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How a recording is decoded; the names are those of openai-whisper and faster-whisper.

    Raises:
        OptionError: an impossible value, alone or with another.
    """

    mode: str = decoding(
        "sequential",
        kinds.choice(*MODES),
        "sequential (OpenAI's algorithm, window after window), or batched (chunks of speech side "
        "by side, without previous text; needs the extra vad, or vad_filter=False).",
    )
    temperature: float | tuple[float, ...] = search(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        kinds.temperatures(),
        "0 decodes greedily or with beams, above 0 samples. Of several, the next one is tried "
        "where a result fails a threshold.",
    )
    compression_ratio_threshold: float | None = search(
        2.4,
        kinds.number("a number, or None"),
        "A result whose text compresses better than this repeats itself and is decoded again at "
        "the next temperature.",
    )
    logprob_threshold: float | None = search(
        -1.0,
        kinds.number("a number, or None"),
        "A result whose average log-probability is below this is decoded again at the next "
        "temperature.",
        aliases=("log_prob_threshold",),
    )
    no_speech_threshold: float | None = search(
        0.6,
        kinds.number("a probability, 0 to 1", least=0, most=1),
        "A window is silence if the model's probability of no speech is above this and its result "
        "fails `logprob_threshold`.",
    )
    check_speech: bool = search(
        True,
        kinds.flag(),
        "Decode a window whose result fails a threshold once more with descriptions of sounds, "
        "such as [Music], which otherwise are suppressed: where that gives no words, nobody "
        "speaks. False does as openai-whisper.",
    )
    beam_size: int | None = search(
        None, kinds.whole_number(1, MOST_BEAMS), "Number of beams at temperature 0; 1 is greedy."
    )
    best_of: int | None = search(
        None,
        kinds.whole_number(1, MOST_BEAMS),
        "Number of samples at temperatures above 0; the likeliest is kept.",
    )
    patience: float | None = search(
        None,
        kinds.number("a number above 0, at most 100", above=0, most=100),
        "With beams: a window is done when this number times `beam_size` results have ended "
        "(openai-whisper's patience). Left out: when as many as there are beams have.",
    )
    length_penalty: float = search(
        1.0,
        kinds.number("a number from -10 to 10", least=-10, most=10),
        "Beams and samples are ranked by the sum of their log-probabilities, divided by their "
        "length to this power.",
    )
    repetition_penalty: float = search(
        1.0,
        kinds.number("a number above 0, at most 10", above=0, most=10),
        "Above 1, tokens that the result already holds become less likely; 1 disables.",
    )
    no_repeat_ngram_size: int = search(
        0,
        kinds.whole_number(0, MOST_TOKENS),
        "Forbid repeating any n-gram of this size; 0 disables.",
    )
    suppress_tokens: tuple[int, ...] = search(
        (-1,),
        kinds.token_ids(),
        "Ids of tokens that are never generated; -1 stands for the checkpoint's list. Tokens that "
        "steer the model (tasks, <|startoftranscript|> and the like) never are.",
    )
    suppress_blank: bool = search(
        True, kinds.flag(), "A result begins neither with a blank nor with its end."
    )
    min_new_tokens: int | None = decoding(
        None,
        kinds.whole_number(0, MOST_TOKENS),
        "Least number of tokens of a window's result, without prefix and end.",
    )
    max_new_tokens: int | None = decoding(
        None,
        kinds.whole_number(1, MOST_TOKENS),
        "Largest number of tokens of a window's result, without prefix and end. Left out: what the "
        "model has positions for.",
    )
    without_timestamps: bool = decoding(
        False, kinds.flag(), "Only text: a segment is a window of 30 s."
    )
    max_initial_timestamp: float | None = decoding(
        1.0,
        kinds.number("seconds from 0 to 30", "SECONDS", least=0, most=30),
        "Latest time within a window at which its first segment may begin.",
    )
    condition_on_previous_text: bool = decoding(
        True, kinds.flag(), "Give each window the previous text as context (sequential mode)."
    )
    initial_prompt: str | tuple[int, ...] | None = decoding(
        None,
        kinds.prompt(),
        "Context of the first window, in batched mode of every chunk: names, style, punctuation.",
    )
    carry_initial_prompt: bool = decoding(
        False, kinds.flag(), "Give every window the initial prompt, before the previous text."
    )
    hotwords: str | None = decoding(
        None, kinds.text(), "Words to expect; part of every window's context."
    )
    prefix: str | None = decoding(
        None,
        kinds.text(),
        "Text that the result of the first window begins with; that window gets no hotwords.",
    )
    clip_timestamps: tuple[float, ...] = decoding(
        (),
        kinds.ascending_seconds(),
        "Read only these parts: start,end,start,end ... The last end may be left out.",
    )
    word_timestamps: bool = decoding(
        False, kinds.flag(), "Give words their times: in json, and for subtitles."
    )
    word_alignment: str = decoding(
        "tokens",
        kinds.choice(*WORD_ALIGNMENTS),
        "What words are timed by: tokens, or characters, which is more accurate and takes longer.",
    )
    prepend_punctuations: str = decoding(
        PREPENDED, kinds.text(), "Marks that join the word after them, with word timestamps."
    )
    append_punctuations: str = decoding(
        APPENDED, kinds.text(), "Marks that join the word before them, with word timestamps."
    )
    hallucination_silence_threshold: float | None = decoding(
        None,
        kinds.number("seconds, 0 or more", "SECONDS", least=0),
        "Skip silence longer than this beside words that look hallucinated; needs word timestamps "
        "and sequential mode.",
    )
    vad_filter: bool | None = decoding(
        None,
        kinds.flag(),
        "Read only speech, found by Silero's detector (extra vad), or everything. Left out: speech "
        "in batched mode, everything in sequential mode. Batched mode without the detector cuts "
        "recordings where they are quietest.",
        flags=("--vad/--no-vad",),
    )
    vad_parameters: VadOptions | None = decoding(  # noqa: RUF009 (a field, as `field` returns)
        None,
        Kind(
            lambda name, value: vad_options(value),
            "name=number, such as threshold=0.4",
            _parse_vad_parameters,
            "NAME=VALUE",
            is_list=True,
        ),
        f"Of the detector: {_VAD_NAMES}.",
    )
    multilingual: bool = decoding(
        False,
        kinds.flag(),
        "Detect the language in every window, not only in the first; segments then carry their "
        "language.",
    )

    def __post_init__(self) -> None:
        _keep_checked(self)
        if self.vad_parameters is not None and not self.uses_vad:
            raise OptionError(
                "vad_parameters without a voice activity detector: give vad_filter=True, too"
            )
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and most is not None and most < least:
            raise OptionError(
                f"min_new_tokens is {least!r}, max_new_tokens {most!r}: give whole numbers, the "
                "second at least 1 and not below the first"
            )
        if self.patience is not None and (self.beam_size or 1) == 1:
            raise OptionError("patience is for beams: give beam_size, 2 or more, too")
        if self.word_alignment != "tokens" and not self.word_timestamps:
            raise OptionError(
                f"word_alignment {self.word_alignment} without word timestamps: give "
                "word_timestamps=True, too"
            )
        if self.hallucination_silence_threshold is not None and not (
            self.mode == "sequential" and self.word_timestamps
        ):
            raise OptionError(
                'hallucination_silence_threshold needs word_timestamps=True and mode="sequential"'
            )

    @property
    def uses_vad(self) -> bool:
        """Whether a voice activity detector finds what is read."""
        return self.mode == "batched" if self.vad_filter is None else self.vad_filter

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One temperature or more, in the order in which they are tried."""
        given = self.temperature
        return given if isinstance(given, tuple) else (given,)


# From quick to careful; what is given beside a preset counts instead of it.
PRESETS = {
    "fast": DecodeOptions(mode="batched", temperature=0.0),
    "balanced": DecodeOptions(),
    "accurate": DecodeOptions(beam_size=5, best_of=5),
}


def preset(name: str, **changes: object) -> DecodeOptions:
    """Return the options of a preset, with changes; those that are None change nothing.

    Raises:
        OptionError: there is no such preset or option, or a change makes no sense.
    """
    check.one_of("preset", name, tuple(PRESETS))
    given = {each: value for each, value in changes.items() if value is not None}
    return changed(PRESETS[name], given)


def changed(options: DecodeOptions, changes: Mapping[str, object]) -> DecodeOptions:
    """Return the options with changes.

    Raises:
        OptionError: there is no such option, or a change makes no sense.
    """
    if not isinstance(options, DecodeOptions):
        raise OptionError(f"options is {check.shown(options)}: give `DecodeOptions`")
    found: dict[str, Any] = {}
    for name, value in changes.items():
        known = _DECODE_NAMES.get(name)
        if known is None:
            if name in _ELSEWHERE:
                raise OptionError(f"{name} is no option of transcribing: {_ELSEWHERE[name]}")
            near = difflib.get_close_matches(name, _DECODE_NAMES, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"there is no option {name!r}{hint}")
        if known in found:
            raise OptionError(f"{name} and {known} are one option: give one of them")
        found[known] = value
    return replace(options, **found)


# Other names of options -> ours.
DECODE_ALIASES = {
    name: each.name for each, about in declared(DecodeOptions) for name in about.aliases
}
_DECODE_NAMES = {each.name: each.name for each, _ in declared(DecodeOptions)} | DECODE_ALIASES
# Arguments of openai-whisper and faster-whisper that are something else here.
_ELSEWHERE = {
    "fp16": "give `dtype` to Transcriber.from_pretrained",
    "verbose": "take the segments from Transcriber.stream, or give `on_progress`",
    "log_progress": "give `on_progress`",
    "chunk_length": "give vad_parameters={'max_speech_duration_s': ...} and mode=\"batched\"",
    "language_detection_segments": "give multilingual=True, or language",
    "language_detection_threshold": "give multilingual=True, or language",
    "prompt_reset_on_temperature": "it is fixed at 0.5; condition_on_previous_text=False never "
    "gives previous text",
    "preset": 'give options=preset("fast"), of whisper_flash_attention.options',
}


@_documented
@dataclass(frozen=True, slots=True)
class SubtitleOptions:
    """How subtitles are cut into cues and lines; by default a segment is a cue of one line.

    Raises:
        OptionError: a number is out of range, or `max_line_count` is given without the
            `max_line_width` that makes lines.
    """

    max_line_width: int | None = subtitle(
        None,
        kinds.whole_number(1),
        "Largest number of characters of a line. A longer word has a line of its own.",
    )
    max_line_count: int | None = subtitle(
        None,
        kinds.whole_number(1),
        "Largest number of lines of a cue; needs the line width. With word timestamps, cues then "
        "continue from one segment into the next, as openai-whisper's do.",
    )
    max_gap: float | None = subtitle(
        3.0,
        kinds.number("seconds, 0 or more", "SECONDS", least=0),
        "Silence between words that have times, above which a new cue starts.",
    )
    highlight_words: bool = subtitle(
        False,
        kinds.flag(),
        "Underline each word while it is spoken; the command line then gives words their times.",
    )
    max_words_per_line: int | None = subtitle(
        None,
        kinds.whole_number(1),
        "Largest number of words that have times in a cue; not beside the line width.",
    )

    def __post_init__(self) -> None:
        _keep_checked(self)
        if self.max_line_count is not None and self.max_line_width is None:
            raise OptionError("max_line_count has no effect without max_line_width; give both")
        if self.max_words_per_line is not None and self.max_line_width is not None:
            raise OptionError("give max_words_per_line or max_line_width, not both")


# What commands take flags from.
GROUPS = (ModelOptions, TranscribeOptions, DecodeOptions, SubtitleOptions)


API_KEY_VARIABLE = "WHISPER_FLASH_API_KEY"


@_documented
@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where the server listens, and what it takes.

    Raises:
        OptionError: a value is out of its range.
    """

    host: str = serving(
        "127.0.0.1",
        replace(kinds.text(), metavar="ADDRESS"),
        "Address to listen on; 0.0.0.0 is every one of this machine.",
    )
    port: int = serving(8000, kinds.whole_number(0, 65535), "0 takes a free one.")
    api_key: str | None = serving(
        None,
        kinds.text(),
        f"What clients must send as their key. Left out: that of the environment variable "
        f"{API_KEY_VARIABLE}; without it, no key is needed.",
    )
    cors_origin: str | None = serving(
        None,
        replace(kinds.text(), metavar="ORIGIN"),
        "Pages of this origin may call the server from a browser (https://example.org, or *).",
    )
    slots: int | None = limit(
        None,
        kinds.whole_number(1, 10_000),
        "Windows that are decoded side by side, per model. Left out: what suits the device.",
    )
    idle_unload: float | None = limit(
        None,
        kinds.number("seconds, more than 0", "SECONDS", above=0),
        "Drop a model after this long without a request; the next one loads it again.",
    )
    max_upload_mb: float = limit(
        1024.0,
        kinds.number("megabytes, more than 0", "MB", above=0),
        "Refuse a larger request (413).",
    )
    memory_upload_mb: float = limit(
        4.0,
        kinds.number("megabytes, 0 or more", "MB", least=0),
        "Keep an upload in memory up to this size, and a larger one in a temporary file.",
    )
    max_seconds: float = limit(
        43_200.0,
        kinds.number("seconds, more than 0", "SECONDS", above=0),
        "Refuse a longer recording (413).",
    )
    max_requests: int = limit(
        512, kinds.whole_number(1), "Refuse a request while this many are in progress (429)."
    )
    timeout: float = limit(
        3600.0,
        kinds.number("seconds, more than 0", "SECONDS", above=0),
        "Give up a request that takes longer (504).",
    )

    def __post_init__(self) -> None:
        if self.api_key is None:
            object.__setattr__(self, "api_key", os.environ.get(API_KEY_VARIABLE) or None)
        _keep_checked(self)


def default_text(declared_field: Field[Any]) -> str:
    """Return the default of an option as `--help` and the documentation show it."""
    value = declared_field.default
    if value is None or value is MISSING or value == ():
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def flags_of(declared_field: Field[Any]) -> tuple[str, ...]:
    """Return the flags of an option on the command line.

    A flag that is on by default can be turned off with `--no-`.
    """
    about: Option = declared_field.metadata["option"]
    if about.flags:
        return about.flags
    name = declared_field.name.replace("_", "-")
    is_on = about.kind.parse is None and declared_field.default is True
    return (f"--{name}/--no-{name}",) if is_on else (f"--{name}",)
