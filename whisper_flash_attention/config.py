"""What a user may ask for, checked when it is asked: languages, tasks, devices and dtypes.

The only module that may read environment variables; nothing here needs one so far. PyTorch and
Transformers are imported inside the functions that need them, so that the command line starts fast.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from whisper_flash_attention.errors import DeviceError, OptionError

if TYPE_CHECKING:
    import torch

TASKS = ("transcribe", "translate")
MODES = ("sequential", "batched")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """What to do with a recording.

    Args:
        language: the language spoken, by name ("German") or code ("de"), kept as its code; None
            has the model detect it.
        task: "transcribe", or "translate" (into English).

    Raises:
        OptionError: a language or task that Whisper does not know.
    """

    language: str | None = None
    task: str = "transcribe"

    def __post_init__(self) -> None:
        if self.language is not None:
            object.__setattr__(self, "language", language_code(self.language))
        if self.task not in TASKS:
            raise OptionError(f"unknown task {self.task!r}; possible: {', '.join(TASKS)}")

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


def _check_count(name: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}: give a whole number, {least} or more")


def _ascending(seconds: Iterable[float]) -> tuple[float, ...]:
    found = tuple(seconds)
    if any(not 0 <= each < math.inf for each in found) or list(found) != sorted(set(found)):
        raise OptionError(
            f"clip_timestamps is {seconds!r}: give seconds from 0 on, each above the one before"
        )
    return found


def _token_ids(tokens: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(tokens)
    if not all(isinstance(each, int) and each >= -1 for each in found):
        raise OptionError(
            f"suppress_tokens is {tokens!r}: give ids of tokens, -1 for the checkpoint's list"
        )
    return found


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
        for name in ("threshold", "neg_threshold"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < 1):
                raise OptionError(f"VAD {name} is {value!r}: give a probability between 0 and 1")
        if self.neg_threshold is not None and self.neg_threshold > self.threshold:
            raise OptionError(
                f"VAD neg_threshold is {self.neg_threshold!r}, above threshold "
                f"{self.threshold!r}: give a lower one"
            )
        for name in ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < math.inf):
                raise OptionError(f"VAD {name} is {value!r}: give milliseconds, 0 or more")
        longest = self.max_speech_duration_s
        # Cutting needs some room for the padding on both sides.
        if longest is not None and not (_is_number(longest) and longest >= 1):
            raise OptionError(f"VAD max_speech_duration_s is {longest!r}: give seconds, 1 or more")


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
            f"vad_parameters is {given!r}: give VadOptions, or a mapping of {', '.join(known)}"
        )
    for name in given:
        if name not in known:
            raise OptionError(f"there is no VAD parameter {name!r}; possible: {', '.join(known)}")
    return VadOptions(**given)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        beam_size: at temperature 0, so many beams; None or 1 takes the likeliest token each time.
        best_of: at other temperatures, so many answers are drawn and the likeliest is kept; None
            draws one.
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
        if self.mode not in MODES:
            raise OptionError(f"unknown mode {self.mode!r}; possible: {', '.join(MODES)}")
        if not self.temperatures or any(not 0 <= each <= 2 for each in self.temperatures):
            raise OptionError(
                f"temperature is {self.temperature!r}: give numbers from 0 to 2, at least one"
            )
        object.__setattr__(self, "vad_parameters", vad_options(self.vad_parameters))
        if self.vad_parameters is not None and not self.uses_vad:
            raise OptionError(
                "vad_parameters without a voice activity detector: give vad_filter=True, too"
            )
        self._check_ranges()
        for name in ("beam_size", "best_of"):
            _check_count(name, getattr(self, name), 1)
        self._check_lengths()
        _check_count("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        object.__setattr__(self, "suppress_tokens", _token_ids(self.suppress_tokens))
        self._check_silence_to_skip()
        object.__setattr__(self, "clip_timestamps", _ascending(self.clip_timestamps))

    def _check_ranges(self) -> None:
        chance, latest = self.no_speech_threshold, self.max_initial_timestamp
        if chance is not None and not 0 <= chance <= 1:
            raise OptionError(f"no_speech_threshold is {chance!r}: give a probability, 0 to 1")
        if latest is not None and not 0 <= latest <= 30:
            raise OptionError(f"max_initial_timestamp is {latest!r}: give seconds from 0 to 30")
        if not -10 <= self.length_penalty <= 10:
            raise OptionError(
                f"length_penalty is {self.length_penalty!r}: give a number from -10 to 10"
            )
        if not 0 < self.repetition_penalty <= 10:
            raise OptionError(
                f"repetition_penalty is {self.repetition_penalty!r}: give a number above 0, at "
                "most 10"
            )

    def _check_lengths(self) -> None:
        least, most = self.min_new_tokens, self.max_new_tokens
        if (least or 0) < 0 or (most is not None and most < max(1, least or 0)):
            raise OptionError(
                f"min_new_tokens is {least!r}, max_new_tokens {most!r}: give whole numbers, the "
                "second at least 1 and not below the first"
            )

    def _check_silence_to_skip(self) -> None:
        least = self.hallucination_silence_threshold
        if least is None:
            return
        if not 0 <= least < math.inf:
            raise OptionError(
                f"hallucination_silence_threshold is {least!r}: give seconds, 0 or more"
            )
        if self.mode != "sequential" or not self.word_timestamps:
            raise OptionError(
                "hallucination_silence_threshold needs word_timestamps, and mode 'sequential'"
            )

    @property
    def uses_vad(self) -> bool:
        """Whether a voice activity detector finds what is read."""
        return self.mode == "batched" if self.vad_filter is None else self.vad_filter

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One temperature or more, in the order in which they are tried."""
        single = isinstance(self.temperature, int | float)
        return (self.temperature,) if single else tuple(self.temperature)  # type: ignore[return-value, arg-type]


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
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}; possible: {', '.join(PRESETS)}")
    given = {option: value for option, value in changes.items() if value is not None}
    return changed(PRESETS[name], given)


def changed(options: DecodeOptions, changes: Mapping[str, object]) -> DecodeOptions:
    """The options with changes.

    Raises:
        OptionError: there is no such option, or a change makes no sense.
    """
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

    wanted = language.strip().lower()
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

    match = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d+))?", name)
    if match is None:
        raise OptionError(f"unknown device {name!r}; possible: auto, cpu, cuda, cuda:N, mps")
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

    if name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}; possible: {', '.join(DTYPES)}")
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
