"""What a user may ask for, checked when it is asked: languages, tasks, devices and dtypes.

The only module that may read environment variables; nothing here needs one so far. PyTorch and
Transformers are imported inside the functions that need them, so that the command line starts fast.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from whisper_flash_attention import validation as check
from whisper_flash_attention.errors import DeviceError, OptionError

if TYPE_CHECKING:
    import torch

TASKS = ("transcribe", "translate")
MODES = ("sequential", "batched")
CHANNELS = ("mix", "each")
DTYPES = ("auto", "float32", "float16", "bfloat16")

# Decoding memory grows with the number of beams and draws; beyond this they find nothing better.
MOST_BEAMS = 100
# No answer is longer than the decoder's positions, 448 in every checkpoint.
MOST_TOKENS = 10_000
# Vocabularies have about 52,000 tokens.
MOST_TOKEN = 1_000_000

# Fields of `DecodeOptions` that are checked alike; whole numbers with the least and the most.
FLAGS = (
    *("suppress_blank", "without_timestamps", "condition_on_previous_text"),
    *("carry_initial_prompt", "word_timestamps", "multilingual"),
)
TEXTS = ("initial_prompt", "hotwords", "prefix")
COUNTS: Mapping[str, tuple[int, int]] = {
    "beam_size": (1, MOST_BEAMS),
    "best_of": (1, MOST_BEAMS),
    "no_repeat_ngram_size": (0, MOST_TOKENS),
    "min_new_tokens": (0, MOST_TOKENS),
    "max_new_tokens": (1, MOST_TOKENS),
}
NUMBERS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "compression_ratio_threshold": ("a number, or None", {}),
    "logprob_threshold": ("a number, or None", {}),
    "no_speech_threshold": ("a probability, 0 to 1", {"least": 0, "most": 1}),
    "max_initial_timestamp": ("seconds from 0 to 30", {"least": 0, "most": 30}),
    "length_penalty": ("a number from -10 to 10", {"least": -10, "most": 10}),
    "repetition_penalty": ("a number above 0, at most 10", {"above": 0, "most": 10}),
    "hallucination_silence_threshold": ("seconds, 0 or more", {"least": 0}),
}
NOT_NONE = ("length_penalty", "repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """What to do with a recording.

    Args:
        language: the language spoken, by name ("German") or code ("de"), kept as its code; None
            has the model detect it.
        task: "transcribe", or "translate" (into English).
        channel: "mix" for all channels mixed into one; the number of one channel, from 1; or "each"
            for every channel by itself, merged by time into one transcription whose segments have
            the number of their channel.
        audio_track: of a file with several, the number of an audio track, from 1, or the language
            that its tag names; None takes the file's default.

    Raises:
        OptionError: a language or task that Whisper does not know, or another impossible value.
    """

    language: str | None = None
    task: str = "transcribe"
    channel: int | str = "mix"
    audio_track: int | str | None = None

    def __post_init__(self) -> None:
        if self.language is not None:
            object.__setattr__(self, "language", language_code(self.language))
        check.one_of("task", self.task, TASKS)
        object.__setattr__(self, "channel", checked_channel(self.channel))
        object.__setattr__(self, "audio_track", checked_track(self.audio_track))

    def check_model(self, languages: Collection[str]) -> None:
        """Raise `OptionError` if a model of these languages (codes) cannot do what is asked."""
        if self.task == "translate" and set(languages) == {"en"}:
            raise OptionError(
                "task 'translate' needs a multilingual model, and this one is English-only; "
                "take one without '.en' in its name"
            )
        if self.language is None or self.language in languages:
            return
        if set(languages) == {"en"}:
            raise OptionError(
                f"language {self.language!r} needs a multilingual model, and this one is "
                "English-only; take one without '.en' in its name"
            )
        raise OptionError(
            f"this model does not know language {self.language!r}; "
            f"it knows {', '.join(sorted(languages))}"
        )


def checked_channel(given: Any) -> int | str:
    """Return a `channel` as it is kept. Raises `OptionError` if it is none."""
    expected = "mix, each, or the number of a channel, from 1"
    if isinstance(given, str) and given in CHANNELS:
        return str(given)
    return check.whole_number("channel", given, least=1, expected=expected)


def checked_track(given: Any) -> int | str | None:
    """Return an `audio_track` as it is kept. Raises `OptionError` if it is none."""
    if given is None:
        return None
    expected = "the number of a track, from 1, or a language"
    if isinstance(given, str) and check.text("audio_track", given).strip():
        return given.strip()
    return check.whole_number("audio_track", given, least=1, expected=expected)


def parse_channel(text: str) -> int | str:
    """Return what the text of a command line or a table means as a `channel`.

    Raises `OptionError` if it is neither "mix" nor "each" nor a number from 1.
    """
    return checked_channel(_number_or_text(text))


def parse_audio_track(text: str) -> int | str | None:
    """Return what the text of a command line or a table means as an `audio_track`.

    Raises `OptionError` if it is empty, or a number below 1.
    """
    return checked_track(_number_or_text(text))


def _number_or_text(given: str) -> int | str:
    plain = given.strip().lower()
    return int(plain) if re.fullmatch(r"-?[0-9]{1,9}", plain) else plain


def _ascending(given: Any) -> tuple[float, ...]:
    expected = "seconds from 0 on, each above the one before"
    found = [
        check.number("clip_timestamps", each, expected, least=0)
        for each in check.values("clip_timestamps", given, expected)
    ]
    if found != sorted(set(found)):
        raise OptionError(f"clip_timestamps is {check.shown(given)}: give {expected}")
    return tuple(found)


def _token_ids(given: Any) -> tuple[int, ...]:
    expected = "ids of tokens, -1 for the checkpoint's list"
    return tuple(
        check.whole_number("suppress_tokens", each, least=-1, most=MOST_TOKEN, expected=expected)
        for each in check.values("suppress_tokens", given, expected)
    )


def _temperatures(given: Any) -> float | tuple[float, ...]:
    """One number as it is, several as a tuple."""
    expected = "numbers from 0 to 2, at least one"
    if not isinstance(given, Iterable):
        return check.number("temperature", given, expected, least=0, most=2)
    found = check.values("temperature", given, expected)
    if not found:
        raise OptionError(f"temperature is {check.shown(given)}: give {expected}")
    return tuple(check.number("temperature", each, expected, least=0, most=2) for each in found)


# Of a day: no pause or stretch of speech is longer.
MOST_MILLISECONDS = 86_400_000


@dataclass(frozen=True, slots=True)
class VadOptions:
    """Parameters of the voice activity detector; the names are faster-whisper's.

    Args:
        threshold: a frame of 32 ms is speech from this probability on.
        neg_threshold: speech ends where the probability falls below this; None is `threshold` less
            0.15, at least 0.01.
        min_speech_duration_ms: shorter stretches of speech are dropped.
        max_speech_duration_s: speech without a pause is cut at this length. None is 27 s in batched
            mode, where it is also the longest chunk (30 at most), and unlimited in sequential mode,
            which reads on within a stretch.
        min_silence_duration_ms: shorter pauses do not end a stretch. None is 500 in batched mode
            and 2000 in sequential mode.
        speech_pad_ms: added before and after each stretch. None is 200 in batched mode and 400 in
            sequential mode.

    Raises:
        OptionError: a value is out of its range.
    """

    threshold: float = 0.5
    neg_threshold: float | None = None
    min_speech_duration_ms: int = 250
    max_speech_duration_s: float | None = None
    min_silence_duration_ms: int | None = None
    speech_pad_ms: int | None = None

    def __post_init__(self) -> None:
        def keep(name: str, expected: str, **bounds: float) -> None:
            value = getattr(self, name)
            found = check.optional(check.number, f"VAD {name}", value, expected, **bounds)
            object.__setattr__(self, name, value if type(value) is int else found)

        if self.threshold is None:
            raise OptionError("VAD threshold is None: give a probability between 0 and 1")
        for name in ("threshold", "neg_threshold"):
            keep(name, "a probability between 0 and 1", above=0, most=1)
        if self.neg_threshold is not None and self.neg_threshold > self.threshold:
            raise OptionError(
                f"VAD neg_threshold is {self.neg_threshold!r}, above threshold "
                f"{self.threshold!r}: give a lower one"
            )
        for name in ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"):
            keep(name, f"milliseconds, 0 to {MOST_MILLISECONDS}", least=0, most=MOST_MILLISECONDS)
        if self.min_speech_duration_ms is None:
            raise OptionError("VAD min_speech_duration_ms is None: give milliseconds, 0 or more")
        # Cutting needs some room for the padding on both sides.
        keep("max_speech_duration_s", "seconds, 1 or more", least=1)


def vad_options(given: object) -> VadOptions | None:
    """Return the detector's parameters, of a mapping or as they are.

    Raises:
        OptionError: there is no such parameter, or its value is out of its range.
    """
    if given is None or isinstance(given, VadOptions):
        return given
    known = [field.name for field in fields(VadOptions)]
    if not isinstance(given, Mapping):
        raise OptionError(
            f"vad_parameters is {check.shown(given)}: give VadOptions, or a mapping of "
            f"{', '.join(known)}"
        )
    for name in given:
        if name not in known:
            raise OptionError(
                f"there is no VAD parameter {check.shown(name)}; possible: {', '.join(known)}"
            )
    return VadOptions(**given)


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How a recording is decoded; the names are those of openai-whisper and faster-whisper.

    Args:
        mode: "sequential" (OpenAI's algorithm: window after window), or "batched" (chunks of
            speech side by side, found by a voice activity detector; none is told what was said
            before).
        temperature: one, or several of which the next is taken while an answer is bad; 0 draws no
            random numbers.
        compression_ratio_threshold: an answer whose text compresses better repeats itself: bad.
        logprob_threshold: an answer whose tokens are less likely than this, on average, is bad.
        no_speech_threshold: an answer is silence if the model gives that a higher probability, and
            the answer is unlikely. None for any of the three does without it.
        beam_size: number of beams at temperature 0, at most 100; None or 1 takes the likeliest
            token each time.
        best_of: number of answers drawn at other temperatures, at most 100, of which the likeliest
            is kept; None draws one.
        length_penalty: answers of beams and draws are compared by the sum of their tokens'
            log-probabilities, divided by their number to this power.
        repetition_penalty: above 1 makes tokens that the answer has less likely; 1 does nothing.
        no_repeat_ngram_size: the answer has no so many tokens in a row twice; 0 does nothing.
        suppress_tokens: ids that are never said; -1 stands for the checkpoint's own list. Tokens
            that steer the model (tasks, <|startoftranscript|> and the like) never are.
        suppress_blank: an answer begins neither with a blank nor with its end.
        min_new_tokens, max_new_tokens: of an answer, its prefix and its end not counted; None
            leaves that to the model and its positions.
        without_timestamps: text alone; a segment is a whole window then.
        max_initial_timestamp: the latest second at which a window's first segment may begin.
        condition_on_previous_text: tell every window what was said before.
        initial_prompt: what the first window is told was said before: names, spellings, style.
            In batched mode every chunk is told.
        carry_initial_prompt: tell all windows, before what was said before.
        hotwords: words to listen for; every window is told, as if they had been said before.
        prefix: what the answer of a recording's first window begins with; that window is told no
            hotwords.
        clip_timestamps: start, end, start, end ... in seconds of what is read; the last end may be
            left out, and without any all is read.
        word_timestamps: give segments their words, with times.
        hallucination_silence_threshold: silence longer than this (seconds) beside words that look
            invented is skipped; needs `word_timestamps`, and is for sequential mode.
        vad_filter: read only what a voice activity detector takes for speech. None is True in
            batched mode and False in sequential mode. Batched mode without the detector cuts
            recordings where they are quietest.
        vad_parameters: of the detector, a `VadOptions` or a mapping with its fields; kept as
            `VadOptions`. None leaves all of them at their defaults.
        multilingual: detect the language in every window, not only in the first one; segments
            then carry their language. Needs a multilingual model, and no `language`.

    Raises:
        OptionError: an option makes no sense, alone or with another.
    """

    mode: str = "sequential"
    temperature: float | tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    beam_size: int | None = None
    best_of: int | None = None
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = (-1,)
    suppress_blank: bool = True
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0
    condition_on_previous_text: bool = True
    initial_prompt: str | None = None
    carry_initial_prompt: bool = False
    hotwords: str | None = None
    prefix: str | None = None
    clip_timestamps: tuple[float, ...] = ()
    word_timestamps: bool = False
    hallucination_silence_threshold: float | None = None
    vad_filter: bool | None = None
    vad_parameters: VadOptions | None = None
    multilingual: bool = False

    def __post_init__(self) -> None:
        # The dataclass is frozen; values are kept as plain Python types.
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
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
        if self.hallucination_silence_threshold is not None and not (
            self.mode == "sequential" and self.word_timestamps
        ):
            raise OptionError(
                "hallucination_silence_threshold needs word_timestamps, and mode 'sequential'"
            )

    def _checked(self) -> dict[str, Any]:
        """Every field's value as a plain Python value within its range."""
        found: dict[str, Any] = {
            "mode": check.one_of("mode", self.mode, MODES),
            "temperature": _temperatures(self.temperature),
            "suppress_tokens": _token_ids(self.suppress_tokens),
            "clip_timestamps": _ascending(self.clip_timestamps),
            "vad_filter": check.optional(check.flag, "vad_filter", self.vad_filter),
            "vad_parameters": vad_options(self.vad_parameters),
        }
        for name in FLAGS:
            found[name] = check.flag(name, getattr(self, name))
        for name in TEXTS:
            found[name] = check.optional(check.text, name, getattr(self, name))
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            found[name] = check.optional(check.whole_number, name, value, least=least, most=most)
        for name, (expected, limits) in NUMBERS.items():
            found[name] = check.optional(
                check.number, name, getattr(self, name), expected, **limits
            )
        for name in NOT_NONE:
            if found[name] is None:
                raise OptionError(f"{name} is None: give a number")
        return found

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
    """The options of a preset, with changes; those that are None change nothing.

    Raises:
        OptionError: there is no such preset or option, or a change makes no sense.
    """
    check.one_of("preset", name, tuple(PRESETS))
    given = {option: value for option, value in changes.items() if value is not None}
    return changed(PRESETS[name], given)


def changed(options: DecodeOptions, changes: Mapping[str, object]) -> DecodeOptions:
    """The options with changes.

    Raises:
        OptionError: there is no such option, or a change makes no sense.
    """
    if not isinstance(options, DecodeOptions):
        raise OptionError(f"options is {check.shown(options)}: give `DecodeOptions`")
    known = [field.name for field in fields(DecodeOptions)]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"there is no option {name!r}{hint}")
    return replace(options, **changes)  # type: ignore[arg-type]


def language_code(language: str) -> str:
    """Return Whisper's code of a language that is given by name or code, in any case.

    Raises `OptionError`, with the nearest names, if Whisper does not know it.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    wanted = check.text("language", language).strip().lower()
    codes = set(TO_LANGUAGE_CODE.values())
    if wanted in codes:
        return wanted
    if wanted in TO_LANGUAGE_CODE:
        return str(TO_LANGUAGE_CODE[wanted])
    near = difflib.get_close_matches(wanted, [*TO_LANGUAGE_CODE, *sorted(codes)], n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise OptionError(
        f"unknown language {language!r}; {hint}"
        f"Whisper knows {len(codes)}, by name ('german') or code ('de')"
    )


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of this name: "auto", "cpu", "cuda", "cuda:N" or "mps".

    "auto" is the first CUDA GPU where PyTorch sees one, else the CPU.

    Raises:
        OptionError: the name is none of these.
        DeviceError: there is no such device here; says what there is.
    """
    import torch

    known = isinstance(name, str)
    match = re.fullmatch(r"auto|cpu|mps|cuda(?::([0-9]{1,9}))?", name) if known else None
    if match is None:
        raise OptionError(
            f"unknown device {check.shown(name)}; possible: auto, cpu, cuda, cuda:N, mps"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but PyTorch finds no Apple GPU; use 'cpu'")
    if name.startswith("cuda"):
        _check_cuda(name, index=int(match[1] or 0))
    return torch.device(name)


def _check_cuda(name: str, index: int) -> None:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"device {name!r} was asked for, but this PyTorch ({torch.__version__}) is built for "
            "CPUs only; use 'cpu', or install a CUDA build (pytorch.org)"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise DeviceError(
            f"device {name!r} was asked for, but PyTorch finds no GPU; use 'cpu', or see "
            "whether `nvidia-smi` runs"
        )
    if index >= count:
        found = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise DeviceError(f"device {name!r} was asked for; found: {found}")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name: "auto" is float16 on a CUDA GPU and float32 elsewhere.

    Raises `OptionError` if the name is not one of `DTYPES`.
    """
    import torch

    check.one_of("dtype", name, DTYPES)
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
